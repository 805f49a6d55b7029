#!/usr/bin/env bash
# What a CUDA machine measures, in stages; each can be repeated and leaves its files in OUT.
#   benchmarks/gpu_day.sh tests | kernels | warm-up | bench | study
# PYTHON is the interpreter (python3), OUT the folder (build/gpu), PROCESSES how many runs of the study go side by side (12).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" build
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

case "${1:-}" in
tests)  # every test that needs CUDA
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -m gpu -n 14 --dist worksteal -p no:cacheprovider --durations 15 tests/test_cuda.py tests/ops/test_mixture_triton.py \
    tests/ops/test_router.py tests/test_devices.py tests/test_quantization.py tests/test_benchmarks.py 2>&1 | tee "$OUT/tests.log" | grep -E '^(FAILED|ERROR)|passed|failed'
  ;;
kernels)  # time by kernel, beside the floor
  "$PYTHON" -m benchmarks.kernels --output "$OUT/kernels.json" 2>&1 | tee "$OUT/kernels.log"
  ;;
warm-up)  # the groups of the benchmark side by side, once, which compiles their kernels
  for group in layer "layer of rank 32" "4-bit layer" experts rank tokens width; do
    "$PYTHON" -m benchmarks gpu --only "$group" --rounds 1 --output "$OUT/warm-up.json" >> "$OUT/warm-up.log" 2>&1 &
  done
  wait
  rm -f "$OUT/warm-up.json"
  ;;
bench)  # the benchmark, after warm-up; what is measured is written after each case
  "$PYTHON" -m benchmarks gpu --output "$OUT/gpu.json" > "$OUT/bench.log" 2>&1
  tail -3 "$OUT/bench.log"
  ;;
study)  # the retention study's variant for a GPU
  "$PYTHON" -m research.retention.base_model > /dev/null
  "$PYTHON" -m peft_loramoe anchors --model build/retention/model --number 5000 --batch-size 512 --output build/retention/anchors.jsonl > "$OUT/anchors.log" 2>&1
  "$PYTHON" -m research.retention variant gpu --device cuda --processes "${PROCESSES:-12}" --output "$OUT/gpu.jsonl" > "$OUT/study.log" 2>&1
  ;;
*)
  sed -n 2,4p "$0"
  exit 2
  ;;
esac
