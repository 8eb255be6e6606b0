"""`outrider generate`: text as it comes, accepted drafts in colour, and what they were worth."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.common import (
    Drafting,
    Json,
    Model,
    describe_acceptance,
    describe_drafting,
    describe_head,
    drafting_flags,
    engine_options,
    err,
    loading,
    out,
    print_json,
    say_if_unfaithful,
    single_engine_flags,
    starting,
    waiting,
    without_drafts,
)
from outrider.cli.flags import with_flags
from outrider.core.output import AcceptanceReport
from outrider.core.sampling import SamplingParams
from outrider.errors import PromptError
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.engine.llm import LLM
    from outrider.engine.outputs import Piece
    from outrider.verify.base import Verifier

COLOURS = ("green", "cyan", "blue", "magenta")
"""Of the first, second, third accepted draft of a round, and all that follow."""

ANSI = {"green": 32, "cyan": 36, "blue": 34, "magenta": 35}

WARM_UP_TOKENS = 8
COMPARED_RUNS = 3

sampling_flags = with_flags(
    SamplingParams,
    "sampling",
    skip=("n", "detokenize", "include_stop_str_in_output", "extra_args"),
    defaults={"temperature": 0.0, "max_tokens": 128, "seed": 0},
)


@dataclass(slots=True)
class _Run:
    text: str
    token_ids: list[int]
    seconds: float
    acceptance: AcceptanceReport
    finish_reason: str

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


@single_engine_flags
@drafting_flags
@sampling_flags
def generate(
    engine: EngineOptions,
    drafting: Drafting,
    sampling: SamplingParams,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="text to continue; - reads it from stdin")
    ] = None,
    chat: Annotated[str | None, typer.Option("--chat", help="a user's message, put in the chat template")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="run without drafts too: same text? how much faster?")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt and show the text as it comes; accepted drafts are coloured by their position."""
    with starting():
        from outrider.engine.llm import LLM

        options = engine_options(engine, drafting, model)
        with loading(quiet=as_json) as callbacks:
            llm = LLM.from_options(options, *callbacks)
    say_if_unfaithful(_verifier(llm).faithful, _verifier(llm).name)
    ids = _prompt_ids(llm, prompt, chat)
    _warm_up(llm, ids, as_json)
    if prompt is not None and not as_json:
        _show_prompt(llm.tokenizer.decode(ids))
    run = _run(llm, ids, sampling, show=not as_json)
    result = _result(run, llm)
    if compare:
        with loading(quiet=as_json) as callbacks:
            baseline = LLM.from_options(without_drafts(options), *callbacks)
        _warm_up(baseline, ids, as_json)
        result |= _compare(llm, baseline, ids, sampling, run)
    if as_json:
        print_json(result)
    else:
        _print_figures(result, run, describe_drafting(llm.engine.resolved))
    if compare and not result["identical"] and _keeps_tokens(llm):
        raise typer.Exit(1)


def _verifier(llm: LLM) -> Verifier:
    return llm.engine.resolved.runner.verifier


def _keeps_tokens(llm: LLM) -> bool:
    """Whether drafts may not change a token; other faithful verifiers keep the distribution they come from."""
    from outrider.tensors import Purpose

    return _verifier(llm).draft_noise is Purpose.TARGET


def _prompt_ids(llm: LLM, prompt: str | None, chat: str | None) -> list[int]:
    if (prompt is None) == (chat is None):
        raise PromptError("give either --prompt or --chat")
    if chat is not None:
        return llm.encode_conversation([{"role": "user", "content": _read(chat)}])
    assert prompt is not None
    return llm.tokenizer.encode(_read(prompt))


def _read(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _warm_up(llm: LLM, ids: list[int], quiet: bool) -> None:
    """A few tokens first: kernels are compiled, once a machine, or read from their cache, and pages touched."""
    few = SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True, detokenize=False)
    with waiting("preparing kernels (compiled on the first run only)", quiet):
        llm.generate({"prompt_token_ids": ids}, few)


def _run(llm: LLM, ids: list[int], sampling: SamplingParams, show: bool = False) -> _Run:
    start = time.perf_counter()
    stream = llm.stream({"prompt_token_ids": ids}, sampling)
    for piece in stream:
        if show:
            _write(piece)
    seconds = time.perf_counter() - start
    if show:
        sys.stdout.write("\n")
    completion = stream.output.outputs[0]
    return _Run(
        text=completion.text,
        token_ids=completion.token_ids,
        seconds=seconds,
        acceptance=stream.output.acceptance,
        finish_reason=completion.finish_reason or "",
    )


def _show_prompt(text: str) -> None:
    """The prompt in grey, on a terminal alone: a file gets what the model wrote and nothing else."""
    if out.is_terminal and not out.no_color:
        sys.stdout.write(f"\x1b[2m{text}\x1b[0m")


def _write(piece: Piece) -> None:
    """The text as it is: nothing of it is wrapped or expanded. Colours only on a terminal."""
    text = piece.text
    if text and piece.draft_position and out.is_terminal and not out.no_color:
        colour = COLOURS[min(piece.draft_position, len(COLOURS)) - 1]
        text = f"\x1b[1;{ANSI[colour]}m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()


def _compare(llm: LLM, baseline: LLM, ids: list[int], sampling: SamplingParams, first: _Run) -> dict[str, Any]:
    """Runs both in turn, so that a machine whose speed drifts is fair to both; medians, and the ratio of those."""
    pairs = [(_run(llm, ids, sampling), _run(baseline, ids, sampling)) for _ in range(COMPARED_RUNS)]
    runs = [run for pair in pairs for run in pair]
    with_drafts = statistics.median(run.tokens_per_second for run, _ in pairs)
    without = statistics.median(run.tokens_per_second for _, run in pairs)
    return {
        "identical": all(run.token_ids == first.token_ids for run in runs),
        "speedup": with_drafts / without,
        "tokens_per_second": {"with": with_drafts, "without": without},
    }


def _result(run: _Run, llm: LLM) -> dict[str, Any]:
    return {
        "text": run.text,
        "token_ids": run.token_ids,
        "finish_reason": run.finish_reason,
        "runner": llm.choice.runner.name,
        "method": llm.engine.resolved.method,
        "num_speculative_tokens": llm.engine.resolved.runner.draft_options.num_speculative_tokens,
        "head": describe_head(llm.engine.resolved),
        "verifier": _verifier(llm).name,
        "faithful": _verifier(llm).faithful,
        "same_tokens_promised": _keeps_tokens(llm),
        "tokens_per_second": run.tokens_per_second,
        "acceptance": run.acceptance.to_dict(),
    }


def _print_figures(result: dict[str, Any], run: _Run, drafting: str) -> None:
    err.print(
        f"\n{len(run.token_ids)} tokens, {run.tokens_per_second:.0f} a second, {describe_acceptance(run.acceptance)}"
    )
    if run.acceptance.drafts:
        colours = [*COLOURS, *[COLOURS[-1]] * len(run.acceptance.rates)]
        shares = zip(colours, enumerate(run.acceptance.rates, start=1), strict=False)
        shown = "  ".join(f"[bold {colour}]{position}[/] {share:.2f}" for colour, (position, share) in shares)
        err.print(f"accepted by position: {shown}")
    err.print(f"[dim]drafting {drafting}; verifier {result['verifier']}; runner {result['runner']}[/]")
    if "identical" in result:
        _print_comparison(result, run)


def _print_comparison(result: dict[str, Any], run: _Run) -> None:
    """What drafts were worth, and why: what a step with them yields beside what it costs."""
    speeds, speedup = result["tokens_per_second"], result["speedup"]
    same = "[green]the same text[/]" if result["identical"] else "[bold red]a DIFFERENT text[/]"
    if not result["identical"] and not result["same_tokens_promised"]:
        same = f"another text, as verifier {result['verifier']} keeps the distribution and not the tokens"
    err.print(f"without drafts: {same}. Medians of {COMPARED_RUNS} runs each, in turn:")
    err.print(
        f"  {speeds['without']:.0f} tokens a second without drafts, {speeds['with']:.0f} with: [bold]{speedup:.2f}x[/]"
    )
    if run.acceptance.drafts:
        length = run.acceptance.length
        err.print(
            f"  a step with drafts gives {length:.2f} tokens and takes as long as {length / speedup:.2f} steps without"
        )
        if speedup < 1:
            err.print(
                "[bold yellow]drafts are slower here[/]: a step with them costs more than it gives. "
                "Try a smaller -k, or --draft none"
            )
