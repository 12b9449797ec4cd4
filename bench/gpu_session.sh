#!/usr/bin/env bash
# Everything a GPU is needed for, in one run of under 10 minutes: correctness of every kernel, tuning, times of kernels and of a model,
# compute-sanitizer where it is installed. Needs Python, torch, Triton, and nvcc for the CUDA kernels.
#   bench/gpu_session.sh               on a GPU; writes bench/sessions/<gpu>/ and kernels/tuned/<gpu>.measured.json
#   bench/gpu_session.sh --rehearse    the same code with no GPU, in triton's interpreter; writes no measurement
#   bench/gpu_session.sh --help        the rest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import llmopt, triton' 2>/dev/null; then
  echo "gpu_session: llmopt or triton is missing in $("$python" -c 'import sys; print(sys.prefix)'); installing llmopt" >&2
  cuda=$(command -v nvcc >/dev/null && echo ON || echo OFF)
  [ "$cuda" = ON ] || echo "gpu_session: nvcc is missing: the CUDA C++ kernels are left out" >&2
  "$python" -m pip install --quiet ".[triton]" -C "cmake.define.LLMOPT_CUDA=$cuda"
fi
for argument in "$@"; do
  [ "$argument" = --rehearse ] && export TRITON_INTERPRET=1
done
exec "$python" -m bench.gpu.session "$@"
