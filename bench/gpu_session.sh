#!/usr/bin/env bash
# Everything a GPU is needed for, in one run of under 10 minutes: correctness of every kernel, tuning, times of kernels and of models,
# compute-sanitizer where it is installed. Needs Python, torch, Triton, and nvcc for the CUDA kernels.
#   bench/gpu_session.sh               on a GPU; writes bench/sessions/<gpu>/ and kernels/tuned/<gpu>.measured.json
#   bench/gpu_session.sh --rehearse    the same code with no GPU, in triton's interpreter; writes no measurement
#   bench/gpu_session.sh --help        the rest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import llmopt, triton' 2>/dev/null; then
  cuda=$(command -v nvcc >/dev/null && echo ON || echo OFF)
  echo "gpu_session: $python has no llmopt or no triton. Choose another with PYTHON=…, or install them:" >&2
  echo "  $python -m pip install '.[triton]' -C cmake.define.LLMOPT_CUDA=$cuda" >&2
  [ "$cuda" = ON ] || echo "nvcc is missing: that leaves the CUDA C++ kernels out" >&2
  exit 2
fi
for argument in "$@"; do
  [ "$argument" = --rehearse ] && export TRITON_INTERPRET=1
done
# Asking torch whether there is a GPU must not begin to use it: processes that do are forked from the one that asks.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
exec "$python" -m bench.gpu.session "$@"
