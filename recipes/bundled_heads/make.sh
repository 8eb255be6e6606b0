#!/usr/bin/env bash
# Trains both heads for the bundled model on one GPU: bash recipes/bundled_heads/make.sh BUNDLE OUT
set -euo pipefail
bundle=$1 out=$2
outrider=(python -m outrider)
python recipes/bundled_heads/tokens.py --data "$bundle" --out "$out" --tokens 60000000

common=(--held-out "$out/validation.jsonl" --batch-tokens 65536 --norm-before-fc --optimizer muon --warmup-steps 50)
peagle=(--method peagle --num-layers 4 --freeze-lm-head --num-speculative-tokens 7)
eagle3=(--method eagle3 --num-speculative-tokens 5)

# 1. The target's training text, teacher-forced.
first=(--data "$out/train.jsonl" --max-length 1024 --lr 2e-3 --muon-lr 0.02)
"${outrider[@]}" train "${peagle[@]}" "${common[@]}" "${first[@]}" --minutes 8 --out "$out/peagle-text"
"${outrider[@]}" train "${eagle3[@]}" "${common[@]}" "${first[@]}" --minutes 6 --out "$out/eagle3-text"

# 2. What the target itself writes after beginnings of those documents.
data=(--data "$out/train.jsonl")
for length in 64 96 192; do
    "${outrider[@]}" train --method eagle3 --device cpu --data "$out/train.jsonl" --on-policy 8000 --generate-only \
        --prompt-length $length --continuation-length 144 --on-policy-temperature 0 --out "$out/written-$length"
    data+=(--data "$out/written-$length/on_policy.jsonl" --data "$out/written-$length/on_policy.jsonl")
done
second=("${data[@]}" --max-length 512 --lr 1e-3 --muon-lr 0.01)
"${outrider[@]}" train "${peagle[@]}" "${common[@]}" "${second[@]}" --minutes 8 --init "$out/peagle-text" --out "$out/peagle"
"${outrider[@]}" train "${eagle3[@]}" "${common[@]}" "${second[@]}" --minutes 4 --init "$out/eagle3-text" --out "$out/eagle3"

for head in peagle eagle3; do
    for drafts in 4 5 7; do
        "${outrider[@]}" accept --draft "$out/$head" -k $drafts --record "$out/$head/acceptance.json"
    done
done
