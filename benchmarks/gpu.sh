#!/usr/bin/env bash
# Tests and measures on a GPU: benchmarks/gpu.sh [part ...], by default every part.
#
#   build          pip install . (no CUDA toolkit needed)
#   tests          contract tests of the Triton and, where they are built, CUDA backends, masks against the CPU's, a training step in a CUDA graph
#   sanitize       compute-sanitizer's memcheck, racecheck and synccheck over the CUDA kernels at small sizes
#   resources      registers, spills, shared memory and tensor-core instructions of every kernel
#   ops            the memory-bound ops, against eager and compiled PyTorch
#   linear         linear, against the same
#   attention      varlen_attention, against SDPA's backends, varlen_attn, xformers, FlashAttention-2 and -3
#   cross_entropy  linear_cross_entropy, against eager, compiled, torch's chunked and Liger's
#   step           a training step of M3AE S, B, L, also with CUDA graphs, and of MAMO S, B, against the padded models
#
# Needs torch >= 2.10 with CUDA, Triton, pytest and pytest-benchmark; peers that are missing are named. The installed
# package is what runs, and where there is none the source tree. Tables go to $OUT (docs) as ${NAME}_<part>.md and .json;
# NAME is "gpu". COMMIT names the commit where git cannot. A part is stopped after LIMIT (600) seconds; what it measured
# until then is written. SMOKE=1: a dry run on the CPU that measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
parts=(build tests sanitize resources ops linear attention cross_entropy step)
smoke=${SMOKE:+1}
device=(--device cuda)
[ -z "$smoke" ] || device=(--device cpu --smoke)

run() {
  local safe=()  # away from the source tree, if the package is installed
  if (cd / && python3 -c "import m3ae_fast") 2> /dev/null; then safe=(PYTHONSAFEPATH=1); fi
  env "${safe[@]}" timeout --signal=INT --kill-after=60 "${LIMIT:-600}" "$@"
}
measure() {  # measure <part> <files and options>
  local table=${OUT:-docs}/${NAME:-gpu}_$1.md
  run python3 -m pytest "${@:2}" --benchmark-only -q "${device[@]}" --table "$table"
}

build() {
  local options=()  # no network is needed where everything that builds it is there
  if python3 -c "import scikit_build_core, pybind11" 2> /dev/null; then options=(--no-build-isolation); fi
  python3 -m pip install --no-deps "${options[@]}" .
}
tests() {
  if [ -n "$smoke" ]; then
    run python3 -m pytest -q tests/ops/test_contract.py -k "layer_norm and small"
  else
    M3AE_FAST_REQUIRE=triton run python3 -m pytest -q tests -k cuda
  fi
}
sanitize() {
  [ -z "$smoke" ] || return 0
  local tool status=0
  for tool in memcheck racecheck synccheck; do  # uncached: tensors in one allocation hide what is read past them
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest -q \
      tests/ops/test_contract.py -k "cuda-cuda and (aligned or (error_rule and not m3ae and not mae))" || status=1
  done
  return $status
}
resources() {
  timeout --signal=INT "${LIMIT:-600}" python3 -m benchmarks.resources || return 1
  if python3 -c "import m3ae_fast._cuda" 2> /dev/null; then python3 -m benchmarks.resources --cuda; fi
}
ops() { measure ops benchmarks/ops --ignore-glob="*_linear*.py" --ignore-glob="*_attention.py"; }
linear() { measure linear benchmarks/ops/bench_linear.py; }
attention() { measure attention benchmarks/ops/bench_varlen_attention.py; }
cross_entropy() { measure cross_entropy benchmarks/ops/bench_linear_cross_entropy.py; }
step() { measure step benchmarks/models; }

for part in "$@"; do
  case " ${parts[*]} " in
    *" $part "*) ;;
    *) echo "gpu.sh: a part must be one of ${parts[*]}, got '$part'" >&2 && exit 2 ;;
  esac
done
if [ -z "$smoke" ] && ! python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: no GPU that the torch of $(command -v python3) sees; SMOKE=1 makes a dry run on the CPU" >&2
  exit 2
fi
[ $# -gt 0 ] || set -- "${parts[@]}"
failed=()
for part in "$@"; do
  printf '\n== %s (%ss)\n' "$part" "$SECONDS"
  "$part" || failed+=("$part")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu.sh: failed or stopped: ${failed[*]}" >&2
  exit 1
fi
