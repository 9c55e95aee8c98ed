#!/usr/bin/env bash
# All that needs a GPU, in under 9 minutes: install, tests, times of each layer, `healpass bench`. The
# tables come last; logs and CSVs go to $OUT (default: gpu-results). Usage, from the repository's root:
# bash tests/gpu/run_all.sh. With the argument "attention" there are times of attention alone.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="${OUT:-gpu-results}"
mkdir -p "$out"
export PYTHONUNBUFFERED=1
python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

timeout 240 python3 -m pytest tests/gpu -q -rA --tb=short >"$out/tests.log" 2>&1
tests=$?
grep -E '^(FAILED|ERROR)|passed|failed' "$out/tests.log" | tail -25

# No speed without green: times of wrong kernels would only mislead.
if [ "$tests" -ne 0 ]; then
    echo "the GPU tests failed (exit code $tests): no times taken; see $out/tests.log"
    exit "$tests"
fi
if [ "${1:-}" = attention ]; then exec timeout 290 python3 -m tests.gpu.bench_attention "$out"; fi
timeout 170 python3 -m tests.gpu.bench "$out" >"$out/bench.log" 2>&1
layers=$?
tail -20 "$out/bench.log"

# Every contender that a GPU has, one block of Llama-3-8B. Rows are kept as they come, so a run that
# the time ends (exit code 124) is a shorter one.
COLUMNS=140 timeout 115 python3 -c 'from healpass.cli import main; main()' bench --device cuda --rounds 5 \
    --shapes llama-3-8b --what decode,attention,prefill:512 --csv "$out/contenders.csv" \
    >"$out/contenders.log" 2>&1
contenders=$?
tail -90 "$out/contenders.log"
if [ "$contenders" -eq 124 ]; then
    echo "healpass bench was ended by the clock: what it measured is in $out/contenders.csv"
    contenders=0
fi
exit "$((layers ? layers : contenders))"
