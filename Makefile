# make demo   every step on a small real data set (creates the environment first)
# make test   all tests except the slow ones; make test-unit: the fastest tests, make test-slow: the slow tests
# make lint   format, lint, types           make check   lint and test
# make faults inject kills, truncated files and full disks for half an hour; resumes after an interruption
# make lock   requirements/*.lock: the versions of this environment, with hashes
# make docs   the documentation as a site, in build/site
# VENV=DIR uses an existing environment as it is; the default is .venv, created if needed.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
STAMP := $(VENV)/.collm-dist-installed
# The default wheel of this release is for CPUs; a range would install gigabytes of CUDA libraries without a GPU.
TORCH := $(if $(shell command -v nvidia-smi),"torch>=2.11$(,)<2.14",torch==2.13.0)
, := ,

export DS_BUILD_OPS := 0

.PHONY: demo test test-unit test-slow faults lint check reference lock docs environment

demo: environment
	$(PYTHON) launch/run_pipeline.py --config configs/ml100k_demo.yaml
	@echo
	@echo "To look at its rankings:  $(PYTHON) launch/serve.py --config runs/ml100k_demo/config.yaml"
	@echo "and open http://127.0.0.1:8000 in a browser."

# Two processes. Each test file stays in one, so that its fixtures are built once; the slowest folders come first, so that
# no process waits at the end.
PYTEST := $(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-unit: environment
	$(PYTEST) -m "not slow and not gpu" tests/unit tests/invariants

test: environment
	$(PYTEST) -m "not slow and not gpu"

# PEFT and DeepSpeed import the first two wherever they are installed, which would make each process of the other tests start
# a quarter later.
test-slow: environment
	$(PYTHON) -m pip install --quiet --editable ".[mlflow,quantization,docs]"
	$(PYTHON) -m pytest -q -m "slow and not gpu"

faults: environment
	$(PYTHON) -m tests.faults
	$(PYTHON) -m tests.faults.corruption

lint: environment
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

check: lint test

reference: environment
	$(PYTHON) -m collm_dist.config.reference configs/README.md

LOCK := $(PYTHON) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --no-header --constraints build/tested.txt

lock: environment
	mkdir -p build requirements
	$(PYTHON) -m pip freeze --exclude-editable | grep --invert-match --regexp '^torch==' --regexp ' @ ' > build/tested.txt
	echo 'torch; python_version < "3"' > build/without-torch.txt
	$(LOCK) --output-file requirements/gpu.lock
	$(LOCK) --overrides build/without-torch.txt --output-file requirements/cpu.lock

docs: environment
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

ifeq ($(origin VENV),file)
environment: $(STAMP)
else
environment:
	@test -x $(PYTHON) || { echo "VENV=$(VENV): there is no environment"; exit 2; }
endif

$(STAMP): pyproject.toml
	@test -n "$(BASE_PYTHON)" || { echo "needs Python 3.11 or newer"; exit 2; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet $(TORCH)
	$(PYTHON) -m pip install --quiet --editable ".[dev]"
	@touch $@
