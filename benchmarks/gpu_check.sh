#!/usr/bin/env bash
# Everything that needs a CUDA device, within eight minutes: `make gpu-check`, or with python on PATH
#
#     OUT=folder bash benchmarks/gpu_check.sh
#
# Builds the CUDA library for this device, runs the tests on device tensors, compute-sanitizer on small cases,
# and the benchmarks; writes gpu.json and gpu.md to OUT (benchmarks/results). Checks go on after one that
# failed, and the last line says which did. Ends with 1 if any did, at once where there is no device.
# The tests and compute-sanitizer may take POOL_SECONDS (240): fewer than 16 cores need more.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the package need not be installed
export COLUMNS=200                                # pytest's summary says why a test failed

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
  if [ "$2" -eq 124 ] || [ "$2" -eq 137 ]; then how="took too long"; elif [ "$2" -ne 0 ]; then how=failed; fi
  echo "gpu-check: $1: $how after $SECONDS s: $(tail -n 1 "$3")"
  outcomes+=("$1=$how")
  if [ "$2" -ne 0 ]; then
    failed+=("$1")
    tail -n 60 "$3"
  fi
}

CAPABILITY=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
CUDA_ARCH_LIST=$CAPABILITY CMIM_KERNELS_CUDA=1 timeout 150 \
  python setup.py -q build_ext --inplace >"$LOGS/build" 2>&1
status=$?
finish build $status "$LOGS/build"
if [ $status -ne 0 ]; then exit 1; fi

# Tests and compute-sanitizer share the cores, a process each: compiling and the CPU's side take the time.
SANITIZER=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
END=$(($(date +%s) + ${POOL_SECONDS:-240}))
export LOGS SANITIZER END

# job NUMBER tests BACKEND FILE SHARD, or NUMBER sanitizer TOOL CASES: its log, and in .status how it ended
job() {
  local number=$1 kind=$2 of=$3 left=$((END - $(date +%s)))
  local command=(python -m pytest -q -m gpu -p no:cacheprovider --tb=short)
  shift 3
  if [ "$left" -le 0 ]; then return; fi
  if [ "$kind" = tests ]; then
    if [ "$of" != device ]; then command+=(-k "$of-cuda"); fi
    TORCHINDUCTOR_COMPILE_THREADS=1 timeout -k 5 "$left" "${command[@]}" "$1" --shard "$2"
  elif [ -z "$SANITIZER" ]; then
    echo "there is no compute-sanitizer: it comes with the CUDA toolkit"
    false
  else
    command=("$SANITIZER" --tool "$of" --error-exitcode 3 --print-limit 20 --show-backtrace device)
    command+=(--launch-timeout 60 --port $((49152 + 16 * number)))
    # The library's own kernels only; initcheck has to see what PyTorch's write, too.
    if [ "$of" != initcheck ]; then command+=(--kernel-name kns=4cmim4cuda); fi
    # Without PyTorch's cache of freed memory, so that what lies beyond an allocation is nobody's.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$left" "${command[@]}" python benchmarks/gpu_cases.py "$@"
  fi >"$LOGS/$number" 2>&1
  echo $? >"$LOGS/$number.status"
}
export -f job

# parts BACKEND FILE: over how many processes a file is shared out
parts() {
  case $1-$(basename "$2" .py) in
    triton-test_budget) echo 8 ;;
    triton-test_extreme_temperatures | triton-test_untouched) echo 6 ;;
    device-* | cuda-test_budget) echo 3 ;;
    triton-test_collapse | triton-test_compile | triton-test_degenerate) echo 2 ;;
    cuda-test_extreme_temperatures) echo 2 ;;
    *) echo 1 ;;
  esac
}
# Backends as tests/conftest.py names the places. The reference is plain PyTorch: a few files do.
{
  echo device tests/test_gpu.py
  grep -l "place: Place" tests/test_*.py | grep -v test_cuda_ | sed "s/^/triton /; p; s/^triton/cuda/"
  printf "reference tests/%s.py\n" test_cross_entropy test_degenerate
} | while read -r name file; do
  n=$(parts "$name" "$file")
  for ((i = 1; i <= n; i++)); do echo "tests $name $file $i/$n"; done
done | sort -s -t / -k 3,3nr >"$LOGS/tests" # what takes longest first
tools=(memcheck racecheck initcheck synccheck)
for tool in "${tools[@]}"; do
  for path in fused tiled; do
    for dtypes in "float32 float64" "bfloat16 float16"; do echo "sanitizer $tool $path $dtypes"; done
  done
done >"$LOGS/sanitizer"
paste -d '\n' "$LOGS/tests" "$LOGS/sanitizer" | grep . | awk '{print NR, $0}' >"$LOGS/jobs"
xargs -P "$(nproc)" -L 1 bash -c 'job "$@"' job <"$LOGS/jobs"

# ended NAME KIND OF PATTERN: the outcome of all jobs of a kind, with what their logs say by PATTERN counted
ended() {
  local worst=0 status number kind of what
  : >"$LOGS/ended"
  while read -r number kind of what; do
    if [ "$kind $of" != "$2 $3" ]; then continue; fi
    status=$(cat "$LOGS/$number.status" 2>/dev/null || echo 124) # none: there was no time for it
    if [ "$status" -ne 0 ] && [ "$status" -ne 5 ]; then          # 5: it has no test for this backend
      if [ $worst -eq 0 ] || [ $worst -eq 124 ]; then worst=$status; fi
      echo "gpu-check: $of, $what: ended with $status"
      tail -n 40 "$LOGS/$number" 2>/dev/null
    fi
    grep -ohE "$4" "$LOGS/$number" 2>/dev/null >>"$LOGS/ended"
  done <"$LOGS/jobs"
  if [ $worst -eq 0 ] && [ ! -s "$LOGS/ended" ]; then worst=1; fi # nothing was checked
  awk '{n = 1} /^[0-9]/ {n = $1; $1 = ""; sub(" ", "")} {sum[$0] += n}
    END {for (what in sum) printf "%s%d %s", (some++ ? ", " : ""), sum[what], what; print ""}' \
    "$LOGS/ended" >"$LOGS/sums"
  finish "$1" "$worst" "$LOGS/sums"
}
for name in device cuda triton reference; do
  ended "tests, $name" tests "$name" "[0-9]+ (passed|failed|skipped|errors?)"
done
for tool in "${tools[@]}"; do
  ended "compute-sanitizer $tool" sanitizer "$tool" "[A-Z]+ SUMMARY: .*"
done

# Nothing else runs beside what is timed.
rm -f "$OUT/gpu.json" "$OUT/gpu.md"
timeout 90 python -m pytest benchmarks --benchmark-only --device cuda -p no:cacheprovider -q --tb=short \
  --no-header -k "fused and both" --benchmark-json="$OUT/gpu.json" \
  >"$LOGS/benchmarks" 2>&1
status=$?
# Without the table of times, which would hide what failed
grep -E "^(E  |FAILED|ERROR|INTERNALERROR)|[0-9] (passed|failed|errors?)" "$LOGS/benchmarks" >"$LOGS/short" ||
  cp "$LOGS/benchmarks" "$LOGS/short"
finish benchmarks $status "$LOGS/short"
timeout 90 python benchmarks/gpu_bars.py "$OUT/gpu.json" "$OUT/gpu.md" "${outcomes[@]}" >"$LOGS/bars" 2>&1
finish bars $? "$LOGS/bars"
timeout -k 5 90 python benchmarks/gpu_bars.py "$OUT/gpu.json" "$OUT/gpu.md" compiled >"$LOGS/compiled" 2>&1
finish "bars, compiled" $? "$LOGS/compiled"
if [ -f "$OUT/gpu.md" ]; then cat "$OUT/gpu.md"; fi
if [ -f "$OUT/gpu.json" ]; then
  { echo && python benchmarks/report.py "$OUT/gpu.json" --plots "$LOGS"; } >>"$OUT/gpu.md" 2>"$LOGS/report"
  finish report $? "$LOGS/report"
fi

if [ ${#failed[@]} -ne 0 ]; then
  printf 'gpu-check: failed: %s\n' "$(IFS=';' && echo "${failed[*]}")" >&2
  exit 1
fi
echo "gpu-check: passed after $SECONDS s; results in $OUT/gpu.json and $OUT/gpu.md"
