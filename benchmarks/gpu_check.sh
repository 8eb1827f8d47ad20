#!/usr/bin/env bash
# Everything that needs a CUDA device, within eight minutes: `make gpu-check`, or with python on PATH
#
#     OUT=folder bash benchmarks/gpu_check.sh
#
# Builds the CUDA library for this device, runs the tests on device tensors, compute-sanitizer on small cases,
# and the benchmarks; writes gpu.json and gpu.md to OUT (benchmarks/results). Checks go on after one that
# failed, and the last line says which did. Ends with 1 if any did, at once where there is no device.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT

if ! python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-check: torch finds no CUDA device on this machine; nothing was checked." >&2
  exit 1
fi
python - <<'PYTHON' || exit 1
import torch
print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON

failed=()
outcomes=()
# finish NAME STATUS LOG: keeps the outcome, and shows the log of what failed
finish() {
  local how=passed
  if [ "$2" -eq 124 ]; then how="took too long"; elif [ "$2" -ne 0 ]; then how=failed; fi
  echo "gpu-check: $1: $how: $(tail -n 1 "$3")"
  outcomes+=("$1=$how")
  if [ "$2" -ne 0 ]; then
    failed+=("$1")
    tail -n 60 "$3"
  fi
}

CAPABILITY=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
CUDA_ARCH_LIST=$CAPABILITY CMIM_KERNELS_CUDA=1 timeout 60 \
  python setup.py -q build_ext --inplace >"$LOGS/build" 2>&1
status=$?
finish build $status "$LOGS/build"
if [ $status -ne 0 ]; then exit 1; fi

# A process for each file and backend, twelve at a time: compiling and the CPU's side take the time, not the GPU.
run_file() { # NAME FILE: its log, and in .status how it ended; 5: it has no test for this backend
  local log
  log=$LOGS/tests-$1-$(basename "$2" .py)
  if [ "$1" = device ]; then
    timeout 150 python -m pytest -q -m gpu -p no:cacheprovider "$2" >"$log" 2>&1
  else
    timeout 150 python -m pytest -q -m gpu -p no:cacheprovider -k "$1-cuda" "$2" >"$log" 2>&1
  fi
  echo $? >"$log.status"
}
export -f run_file
export LOGS
names=(device cuda triton reference) # the last three as tests/conftest.py names the places
{
  echo device tests/test_gpu.py
  for name in "${names[@]:1}"; do
    grep -l "place: Place" tests/test_*.py | grep -v test_cuda_ | sed "s/^/$name /"
  done
} >"$LOGS/jobs"
timeout 160 xargs -P 12 -L 1 bash -c 'run_file "$@"' run_file <"$LOGS/jobs"
for name in "${names[@]}"; do
  worst=0
  : >"$LOGS/tests-$name"
  while read -r of file; do
    if [ "$of" != "$name" ]; then continue; fi
    log=$LOGS/tests-$name-$(basename "$file" .py)
    status=$(cat "$log.status" 2>/dev/null || echo 124) # none: there was no time for it
    if [ "$status" -ne 0 ] && [ "$status" -ne 5 ]; then
      worst=$status
      echo "gpu-check: $name, $file: ended with $status"
      tail -n 60 "$log" 2>/dev/null
    fi
    grep -hE "^(FAILED|ERROR)| passed| failed| error" "$log" >>"$LOGS/tests-$name" 2>/dev/null
  done <"$LOGS/jobs"
  finish "tests, $name" "$worst" "$LOGS/tests-$name"
done

# Without PyTorch's cache of freed memory, so that what lies beyond an allocation is nobody's.
SANITIZER=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
tools=(memcheck racecheck initcheck synccheck)
pids=()
for tool in "${tools[@]}"; do
  if [ -z "$SANITIZER" ]; then
    (echo "there is no compute-sanitizer: it comes with the CUDA toolkit" && exit 1) >"$LOGS/$tool" 2>&1 &
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 80 "$SANITIZER" --tool "$tool" --error-exitcode 3 \
      python benchmarks/gpu_cases.py >"$LOGS/$tool" 2>&1 &
  fi
  pids+=($!)
done
for i in "${!tools[@]}"; do
  wait "${pids[$i]}"
  finish "compute-sanitizer ${tools[$i]}" $? "$LOGS/${tools[$i]}"
done

timeout 90 python -m pytest benchmarks --benchmark-only --device cuda -p no:cacheprovider \
  -k "fused and (256x1000 or 4096x1000) and not spread" --benchmark-json="$OUT/gpu.json" >"$LOGS/benchmarks" 2>&1
finish benchmarks $? "$LOGS/benchmarks"
timeout 90 python benchmarks/gpu_bars.py "$OUT/gpu.json" "$OUT/gpu.md" "${outcomes[@]}" >"$LOGS/bars" 2>&1
finish bars $? "$LOGS/bars"
cat "$LOGS/bars"
if [ -f "$OUT/gpu.json" ]; then
  python benchmarks/report.py "$OUT/gpu.json" --plots "$LOGS" >>"$OUT/gpu.md" 2>"$LOGS/report"
  finish report $? "$LOGS/report"
fi

if [ ${#failed[@]} -ne 0 ]; then
  printf 'gpu-check: failed: %s\n' "$(IFS=';' && echo "${failed[*]}")" >&2
  exit 1
fi
echo "gpu-check: passed; results in $OUT/gpu.json and $OUT/gpu.md"
