#!/usr/bin/env bash
# Tests and measures on a GPU: benchmarks/gpu.sh [part ...], by default every part.
#
#   build          pip install . for this GPU alone (no CUDA toolkit needed; with one, the CUDA kernels, too)
#   probe          every op on every backend and dtype against fp64, small and real sizes; a line each, at once
#   memcheck       compute-sanitizer's memcheck over the first case of each CUDA kernel
#   tests          contract tests of the Triton and, where they are built, CUDA backends, masks against the CPU's, a
#                  training step in a CUDA graph; without those that trace many times (opcheck, fifty mixes of lengths)
#   sanitize       compute-sanitizer's memcheck, racecheck and synccheck over the CUDA kernels at small sizes
#   resources      registers, spills, shared memory and tensor-core instructions of every kernel
#   ops            the memory-bound ops, Triton and CUDA, against eager and compiled PyTorch
#   linear         linear, against the same
#   attention      varlen_attention, Triton and CUDA, against SDPA's backends, varlen_attn, xformers, FlashAttention-2
#                  and -3; makes the record of the choice between Triton and CUDA (docs/cuda.md)
#   cross_entropy  linear_cross_entropy, against eager, compiled, torch's chunked and Liger's
#   step           a training step of M3AE S, L, B, eager, compiled and with CUDA graphs, and of MAMO S, B, against the
#                  padded models
#   integrations   a training step of FLAVA, ViTMAE and timm's models before and after accelerate()
#
# `benchmarks/gpu.sh first` is for a machine that is lent for ten minutes: what a first run has to show, in the order of
# what is worth most, each part stopped at its own limit (`budget`), and fewer cases of the memory-bound ops.
#
# Needs torch >= 2.10 with CUDA, Triton, pytest, pytest-benchmark and pytest-xdist; to build without a network also
# scikit-build-core, pybind11, cmake and ninja. Peers that are missing are named. The installed package is what runs,
# and where there is none the source tree. Tables go to $OUT (docs) as ${NAME}_<part>.md and .json, what became of each
# part and its seconds to ${NAME}_parts.jsonl; NAME is "gpu". PACK=1: all of it as one $OUT/${NAME}.tar.gz, written
# after every part. COMMIT names the commit where git cannot. A part is stopped after LIMIT (600) seconds; what it
# measured until then is written. SMOKE=1: a dry run on the CPU that measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
parts=(build probe memcheck tests sanitize resources ops linear attention cross_entropy step integrations)
declare -A budget=([build]=110 [probe]=90 [memcheck]=40 [attention]=100 [step]=110 [tests]=60 [ops]=60)  # seconds
first=(build probe memcheck attention step tests ops)
name=${NAME:-gpu}
out=${OUT:-docs}
tables=$out
[ -z "${PACK:-}" ] || tables=$(mktemp -d)
smoke=${SMOKE:+1}
seconds=6 ops_cases=''  # for one case at most; of the memory-bound ops, all
device=cuda
extent=--all
[ -z "$smoke" ] || { device=cpu && extent=--smoke; }

run() {  # with the installed package before the source tree, if there is one
  local installed safe=()
  installed=$(cd / && python3 -c "import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec('m3ae_fast').origin).parents[1])" 2> /dev/null) \
    && safe=(PYTHONSAFEPATH=1 "PYTHONPATH=$installed:$PWD")
  env "${safe[@]}" timeout --signal=INT --kill-after=30 "$limit" "$@"
}
measure() {  # measure <part> <files and options>
  run python3 -m pytest "${@:2}" --benchmark-only -q --device $device $extent --seconds $seconds \
    --table "$tables/${name}_$1.md"
}

build() {
  [ -z "$smoke" ] || return 0
  local options=() capability  # no network is needed where everything that builds it is there
  if python3 -c "import scikit_build_core, pybind11" 2> /dev/null; then options=(--no-build-isolation); fi
  capability=$(python3 -c "import torch; print('{}{}'.format(*torch.cuda.get_device_capability()))")
  case $capability in 90 | 10?) capability+=a ;; esac
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CMAKE_ARGS="-DM3AE_CUDA_ARCHITECTURES=$capability-real ${CMAKE_ARGS:-}" \
    timeout "$limit" python3 -m pip install --no-deps "${options[@]}" .
}
probe() {
  local options=(--device cuda --cases all --jobs 12)
  [ -z "$smoke" ] || options=(--device cpu --cases first --op layer_norm)
  run python3 -m benchmarks.probe "${options[@]}" --limit $((limit - 10)) --json "$tables/${name}_probe.jsonl"
}
memcheck() {
  [ -z "$smoke" ] || return 0
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
    python3 -m benchmarks.probe --impl cuda --cases first
}
tests() {
  if [ -n "$smoke" ]; then
    run python3 -m pytest -q --all tests/ops/test_contract.py -k "layer_norm and small and not opcheck and not at_most_twice"
  else  # these files alone: others need packages of integrations to be collected
    M3AE_FAST_REQUIRE=triton run python3 -m pytest -q --all -n 8 --dist worksteal tests/ops tests/models/test_cuda_graph.py \
      -k "cuda and not opcheck and not at_most_twice"
  fi
}
sanitize() {
  [ -z "$smoke" ] || return 0
  local tool status=0
  for tool in memcheck racecheck synccheck; do  # uncached: tensors in one allocation hide what is read past them
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest -q --all \
      tests/ops/test_contract.py -k "cuda-cuda and (aligned or (error_rule and not m3ae and not mae))" || status=1
  done
  return $status
}
resources() {
  run python3 -m benchmarks.resources || return 1
  if run python3 -c "import m3ae_fast._cuda" 2> /dev/null; then run python3 -m benchmarks.resources --cuda; fi
}
ops() { measure ops benchmarks/ops --ignore-glob="*_linear*.py" --ignore-glob="*_attention.py" -k "$ops_cases"; }
linear() { measure linear benchmarks/ops/bench_linear.py; }
attention() {
  local status=0
  M3AE_FAST_ATTENTION=triton measure attention benchmarks/ops/bench_varlen_attention.py || status=$?
  if [ -z "$smoke" ] && [ -e "$tables/${name}_attention.json" ]; then
    run python3 -m benchmarks.choose "$tables/${name}_attention.json" "$tables" || status=1
  fi
  return $status
}
cross_entropy() { measure cross_entropy benchmarks/ops/bench_linear_cross_entropy.py; }
step() { measure step benchmarks/models/bench_m3ae.py benchmarks/models/bench_mamo.py; }
integrations() {
  measure integrations benchmarks/models --ignore=benchmarks/models/bench_m3ae.py \
    --ignore=benchmarks/models/bench_mamo.py
}

quick=''
if [ "$*" = first ]; then
  quick=1 && seconds=1 && ops_cases="(bf16 and small and not forward-) or sample_mask"
  set -- "${first[@]}"
fi
for part in "$@"; do
  case " ${parts[*]} " in
    *" $part "*) ;;
    *) echo "gpu.sh: a part must be one of ${parts[*]}, or first alone, got '$part'" >&2 && exit 2 ;;
  esac
done
if [ -z "$smoke" ] && ! python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu.sh: no GPU that the torch of $(command -v python3) sees; SMOKE=1 makes a dry run on the CPU" >&2
  exit 2
fi
[ $# -gt 0 ] || set -- "${parts[@]}"
mkdir -p "$out" "$tables"
failed=()
for part in "$@"; do
  began=$SECONDS status=passed
  limit=${LIMIT:-600}
  if [ -n "$quick" ] && [ -z "$smoke" ]; then limit=${budget[$part]}; fi
  printf '\n== %s (after %s s, %s s at most)\n' "$part" "$SECONDS" "$limit"
  "$part" || { failed+=("$part") && status="failed or stopped"; }
  printf '{"part": "%s", "status": "%s", "seconds": %s, "limit": %s}\n' "$part" "$status" $((SECONDS - began)) \
    "$limit" | tee -a "$tables/${name}_parts.jsonl"
  [ -z "${PACK:-}" ] || tar -czf "$out/$name.tar.gz" -C "$tables" .
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu.sh: failed or stopped: ${failed[*]}" >&2
  exit 1
fi
