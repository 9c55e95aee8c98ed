#!/usr/bin/env bash
# All that needs a GPU, in under 9 minutes: install, tests, times. The table comes last; logs and
# the CSV go to $OUT (default: gpu-results). Usage, from the repository's root: bash tests/gpu/run_all.sh
# With the argument "attention" the times are those of attention instead of matmuls.
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
timeout 290 python3 -m tests.gpu.bench "$out" >"$out/bench.log" 2>&1
bench=$?
tail -20 "$out/bench.log"
exit "$bench"
