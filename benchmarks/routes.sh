#!/usr/bin/env bash
# Every figure on routes that differ, on this machine: speed under every bound and its targets, what the bounds cost in
# quality, and what a user would pick instead. Wants a quiet machine. What is there is not measured again: run it again to
# go on.
#
#   benchmarks/routes.sh RUN DATA OUT [GGUF]
#
# RUN: run folder of BUDDY; DATA: folder of data sets from `buddy data` (alpaca; SCORED names more to be scored); OUT: what
# is measured; GGUF: the backbone for llama.cpp.
#
# Environment: PYTHON (python3), REMOVED (8,15), DEPTH (15: what the bounds are measured at), BATCHES ("1 4 8 16"),
# REPEATS (5), NEW_TOKENS (24), SCORED (alpaca), QUALITY and INSTEAD (further options of slack.py and instead.py).
set -euo pipefail

(($# == 3 || $# == 4)) || {
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RUN=$1 DATA=$2 OUT=$3 GGUF=${4:-}
: "${PYTHON:=python3}" "${REMOVED:=8,15}" "${DEPTH:=15}" "${BATCHES:=1 4 8 16}" "${REPEATS:=5}" "${NEW_TOKENS:=24}"
: "${SCORED:=alpaca}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }

mkdir -p "$OUT"
for batch in $BATCHES; do
    folder=$OUT/latency/dataset~alpaca
    if [[ -e $folder/batch~$batch ]]; then # written at the end, whole or not at all
        say "speed, batch $batch: there"
        continue
    fi
    say "speed, batch $batch"
    "$PYTHON" -m buddy latency --run "$RUN" --data "$DATA/alpaca" --removed "$REMOVED" --batch-sizes "$batch" \
        --prompts "$((batch > 3 ? batch : 3))" --new-tokens "$NEW_TOKENS" --repeats "$REPEATS" \
        --executions dense,sliced,full,recompute,varied,mixed,nested --slack 0,2,4 --out "$folder"
done
say "what the bounds cost"
scored=$(sed "s|[^,]*|$DATA/&|g" <<< "$SCORED")
# shellcheck disable=SC2086 # options are several words
"$PYTHON" "$ROOT/benchmarks/slack.py" "$RUN" --data "$scored" --removed "$DEPTH" --repeats "$REPEATS" \
    --out "$OUT/slack" ${QUALITY:-}
say "instead"
# shellcheck disable=SC2086
"$PYTHON" "$ROOT/benchmarks/instead.py" "$RUN" --data "$DATA/alpaca" --repeats "$REPEATS" --out "$OUT/instead" \
    ${GGUF:+--gguf "$GGUF"} ${INSTEAD:-}
say "targets"
"$PYTHON" "$ROOT/benchmarks/targets.py" "$OUT/latency" | tee "$OUT/targets.txt"
