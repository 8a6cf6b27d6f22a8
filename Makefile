# make demo   the whole way on MovieLens-100K with SmolLM2-135M, about a quarter of an hour on two CPU cores
# make test   the tests (minutes);  make test-slow  also those that take longer;  make check  format, lint, types
# VENV=DIR    use an environment that is there already; it gets what is missing
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.collm-dist-installed

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-slow check install
install: $(STAMP)

# Without a GPU the CPU build of torch comes first: a range alone would pull several GB of CUDA.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c "import torch" 2>/dev/null; \
	then $(BIN)/python -m pip install --quiet "torch==2.13.0"; fi
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python launch/run_pipeline.py --config configs/ml100k_demo.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" tests/unit tests/invariants
