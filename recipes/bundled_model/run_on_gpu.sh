#!/usr/bin/env bash
# Trains the bundled model on a machine where a command may run for ten minutes at most.
#   run_on_gpu.sh start     copies code and .bundle/ to /root/bundle, starts training as a daemon, shows its output
#   run_on_gpu.sh finish    waits for the daemon and copies the results to $OUT; may be called again
# Settings: MINUTES (default 16), WAIT (seconds to wait at most, default 575).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=/root/bundle
results=/root/bundle_out
deadline=$((SECONDS + ${WAIT:-575}))

follow() {
    tail -n "${1}" -F "$results/stdout.log" 2>/dev/null &
    local tail_id=$!
    while [ ! -e "$results/rc" ] && [ "$SECONDS" -lt "$deadline" ]; do sleep 1; done
    sleep 1
    kill "$tail_id" 2>/dev/null || true
    if [ -e "$results/rc" ]; then echo "finished with status $(cat "$results/rc")"; else echo "still training"; fi
}

case "${1:-}" in
start)
    rm -rf "$work" "$results"
    mkdir -p "$work" "$results"
    cp -r "$here" "$work/recipe"
    cp -r "$here/../../.bundle" "$work/data"
    export PYTHONUNBUFFERED=1 MINUTES=${MINUTES:-16}
    # Without a passed self-check the run is tried again without compilation.
    setsid nohup bash -c "
        cd $work/recipe
        train() { python3 train.py --data $work/data --out $results --minutes \$MINUTES \"\$@\"; }
        train; rc=\$?
        if [ \$rc != 0 ] && [ ! -e $results/self_check.ok ]; then
            echo 'FALLBACK: eager, in 8 parts a step'
            train --no-compile --accumulate 8; rc=\$?
        fi
        echo \$rc > $results/rc.new; mv $results/rc.new $results/rc
    " > "$results/stdout.log" 2>&1 < /dev/null &
    follow +1
    if [ -n "${OUT:-}" ]; then cp "$results"/{stdout.log,log.jsonl} "$OUT/" 2>/dev/null || true; fi
    ;;
finish)
    follow 20
    cd "$results"
    for name in log.jsonl metrics.json samples.txt stdout.log; do
        if [ -e "$name" ]; then cp "$name" "$OUT/"; fi
    done
    if [ -e checkpoint/model.safetensors ]; then
        split -b 13M checkpoint/model.safetensors "$OUT/model.safetensors.part-"
        tar -cf "$OUT/checkpoint_files.tar" -C checkpoint --exclude 'model.safetensors*' .
        sha256sum checkpoint/model.safetensors
    fi
    ls -l "$OUT"
    ;;
*)
    sed -n '2,5p' "$0"
    exit 2
    ;;
esac
