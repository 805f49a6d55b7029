#!/usr/bin/env bash
# What a CUDA machine measures, in stages of under eight minutes; each can be repeated and leaves its files in OUT.
#   benchmarks/gpu_day.sh tests | kernels | bench | study
# PYTHON is the interpreter (python3), OUT the folder (build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}; PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" build
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

case "${1:-}" in
tests)  # environment, every test that needs CUDA
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  "$PYTHON" -m pytest -q -m gpu -n 12 --dist worksteal -p no:cacheprovider --durations 15 tests/ops tests/test_cuda.py tests/test_devices.py \
    tests/test_quantization.py tests/test_benchmarks.py 2>&1 | tee "$OUT/tests.log" | tail -60
  ;;
kernels)  # time by kernel, beside the floor
  "$PYTHON" -m benchmarks.kernels --output "$OUT/kernels.json" 2>&1 | tee "$OUT/kernels.log"
  ;;
bench)  # groups side by side once, which compiles their kernels; then everything in turn
  groups=$("$PYTHON" -c "
from benchmarks.cases import SETS
print('\n'.join(sorted({case.group for case in SETS['gpu']})))")
  while read -r group; do
    "$PYTHON" -m benchmarks gpu --only "$group" --rounds 1 --output "/tmp/warm-up-$RANDOM.json" > /dev/null 2>> "$OUT/warm-up.log" &
  done <<< "$groups"
  wait
  "$PYTHON" -m benchmarks gpu --output "$OUT/gpu.json" 2>&1 | tee "$OUT/bench.log" | tail -5
  ;;
study)  # the retention study's variant for a GPU
  "$PYTHON" -m research.retention variant gpu --device cuda --processes "${PROCESSES:-8}" --output "$OUT/gpu.jsonl" > "$OUT/study.log" 2>&1
  ;;
*)
  sed -n 2,4p "$0"; exit 2
  ;;
esac
