"""Completes a batch of prompts with the bundled model and n-gram drafts."""

from outrider import LLM, SamplingParams

with LLM(speculative_config={"method": "ngram", "num_speculative_tokens": 4}) as llm:
    print(f"runner: {llm.choice.runner.name}")
    prompts = ["def fibonacci(n):\n", "class Stack:\n", "import argparse\n\n\ndef main():\n"]
    for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=48)):
        print("=" * 40)
        print(f"{output.prompt}{output.outputs[0].text}")
        print(f"--- acceptance length {output.acceptance.length:.2f}")
