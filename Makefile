# make run: from nothing to a trained, proven, deployed model.   make test: everything that must hold.
.DEFAULT_GOAL := help
.PHONY: help run test lint bench notebook clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
# Threads that wait spin for some microseconds, then sleep: where something else needs a core too, long spinning makes
# runs many times slower, and sleeping at once makes steps up to twice as long.
export GOMP_SPINCOUNT ?= 5000
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' Makefile

run: $(VENV)/installed  ## install what a run needs, then python train.py
	@$(BIN) train.py

test: $(VENV)/installed-dev  ## install with the dev extra, then lint, types and the whole test suite
	@$(BIN) -m ruff check .
	@$(BIN) -m mypy
	@$(BIN) -m pytest qat tests

lint: $(VENV)/installed-dev  ## style and types only
	@$(BIN) -m ruff check .
	@$(BIN) -m mypy

bench: $(VENV)/installed  ## speed and memory of training steps and of inference, a quarter of an hour
	@$(BIN) benchmarks/training_step.py
	@$(BIN) benchmarks/inference.py

notebook: $(VENV)/installed-dev  ## execute the notebooks' sources again and store what they show
	@$(BIN) tests/test_notebooks.py

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, and brought up to date when one of the two files changes.
$(BIN):
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "qat needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)
	@echo "Installing into $(VENV) (about a minute, once)."
	@$(PIP) --editable '.[logging]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)
	@echo "Installing into $(VENV), with the tools of the tests (about a minute, once)."
	@$(PIP) --editable '.[dev]'
	@touch $(VENV)/installed $@
