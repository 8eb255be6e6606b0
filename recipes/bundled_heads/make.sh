#!/usr/bin/env bash
# Trains both heads for the bundled model on one GPU: bash recipes/bundled_heads/make.sh BUNDLE OUT
set -euo pipefail
bundle=$1 out=$2
python recipes/bundled_heads/tokens.py --data "$bundle" --out "$out" --tokens 50000000
common=(--data "$out/train.jsonl" --held-out "$out/validation.jsonl" --max-length 1024 --batch-tokens 65536
        --optimizer muon --lr 2e-3 --warmup-steps 100 --eval-every 500 --save-every 500)
python -m outrider train --method peagle --num-layers 4 --minutes 8 --out "$out/peagle" "${common[@]}"
python -m outrider train --method eagle3 --num-layers 1 --minutes 5 --out "$out/eagle3" "${common[@]}"
for head in peagle eagle3; do
    python -m outrider accept --speculative-config "{\"model\": \"$out/$head\", \"num_speculative_tokens\": 5}" \
        --record "$out/$head/acceptance.json"
done
