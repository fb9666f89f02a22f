#!/usr/bin/env bash
# What a CUDA machine is asked for, in under 9 minutes with the gpu tests: the ladder, the training step beside other
# programs', decoding. JSON into $OUT. Each part has its share of the time; one that fails does not stop the others.
#
#   PY=python                       interpreter
#   OUT=DIR                         where the JSON goes (default benchmarks/results)
#   NANOGPT=DIR BUILD_NANOGPT=DIR   your own checkouts, compared with where they are given
#   GPT2_SMOKE=1                    tiny shapes on any device: whether the script runs
set -u -o pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OUT="${OUT:-$PWD/benchmarks/results}"
PY="${PY:-python3}"
failed=0

part() { # part SECONDS NAME COMMAND…: runs it within its time
    local seconds="$1" name="$2"
    shift 2
    echo "── $name"
    timeout --signal=INT --kill-after=15 "$seconds" "$@" || { echo "$name failed with $?" >&2; failed=1; }
}

has() { "$PY" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

against=()
[ -n "${NANOGPT:-}" ] && against+=("nanogpt=$NANOGPT")
[ -n "${BUILD_NANOGPT:-}" ] && against+=("build-nanogpt=$BUILD_NANOGPT")
has transformers && against+=(transformers)
has litgpt && against+=(litgpt)
[ "${#against[@]}" -gt 0 ] && against=(--against "${against[@]}")

if [ "${GPT2_SMOKE:-}" = 1 ]; then
    shapes=(--preset tiny --batch 2 --rounds 2 --minutes 1)
    part 120 ladder "$PY" benchmarks/training.py ladder "${shapes[@]}" --steps 2 --without compile
    part 120 "bench train" "$PY" benchmarks/training.py train "${shapes[@]}" --no-compile ${against[@]+"${against[@]}"}
else
    # 16 windows of 1,024 at once: with more, the plainest rung (float32, explicit attention) needs over 60 GB. The
    # same in both parts, so that the second finds its graphs compiled.
    part 240 ladder "$PY" benchmarks/training.py ladder --preset gpt2-124m --batch 16 --context 1024 --minutes 3.4
    # 524,288 tokens a step = 32 micro-batches of 16 windows.
    part 190 "bench train" "$PY" benchmarks/training.py train --preset gpt2-124m --batch 16 --accumulation 32 \
        --context 1024 --rounds 5 --minutes 2.6 ${against[@]+"${against[@]}"}
fi
if [ -f benchmarks/decode.py ]; then
    part 60 decode "$PY" benchmarks/decode.py
fi
exit "$failed"
