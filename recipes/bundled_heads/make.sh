#!/usr/bin/env bash
# Trains both heads for the bundled model on one GPU: bash recipes/bundled_heads/make.sh BUNDLE OUT
set -euo pipefail
bundle=$1 out=$2
outrider=(python -m outrider)
python recipes/bundled_heads/tokens.py --data "$bundle" --out "$out" --tokens 60000000

common=(--held-out "$out/validation.jsonl" --batch-tokens 65536 --norm-before-fc --optimizer muon --warmup-steps 50)
peagle=(--method peagle --num-layers 4 --freeze-lm-head --num-speculative-tokens 7 --unreached-weight 0.2)
eagle3=(--method eagle3 --num-speculative-tokens 5)

# 1. The target's training text, teacher-forced.
first=(--data "$out/train.jsonl" --max-length 1024 --lr 2e-3 --muon-lr 0.02)
"${outrider[@]}" train "${peagle[@]}" "${common[@]}" "${first[@]}" --minutes 8 --out "$out/peagle-text"
"${outrider[@]}" train "${eagle3[@]}" "${common[@]}" "${first[@]}" --minutes 6 --out "$out/eagle3-text"

# 2. What the target itself writes after lines of those documents, and half of the documents.
python recipes/bundled_heads/write.py --data "$out/train.jsonl" --out "$out/written.jsonl" --minutes 6
head -16000 "$out/train.jsonl" > "$out/mix.jsonl"
second=(--data "$out/written.jsonl" --data "$out/mix.jsonl" --max-length 512 --lr 1e-3 --muon-lr 0.01)
"${outrider[@]}" train "${peagle[@]}" "${common[@]}" "${second[@]}" --minutes 16 --init "$out/peagle-text" --out "$out/peagle"
"${outrider[@]}" train "${eagle3[@]}" "${common[@]}" "${second[@]}" --minutes 10 --init "$out/eagle3-text" --out "$out/eagle3"

for head in peagle eagle3; do
    for drafts in 4 5 7; do
        "${outrider[@]}" accept --draft "$out/$head" -k $drafts --record "$out/$head/acceptance.json"
    done
done
