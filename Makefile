# make quickstart and make test do everything on a fresh machine, set-up included.
# Set-up runs when pyproject.toml or constraints.txt changed since the last one, and never otherwise.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin/python
# The first is written when an installation has ended well, the second lies there while one runs.
READY := $(VENV)/.sat-ready
UNFINISHED := $(VENV)/.sat-unfinished

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-long lint format clean
# One stage after the other, so that what fails stands last in the output.
.NOTPARALLEL:

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(READY)  ## set up, then learn a sparse attention pattern on a small data set
	$(BIN) -m sat.train --config quickstart.yaml

test: lint  ## set up, then check style, types and behaviour
	$(BIN) -m pytest -n auto

test-long: $(READY)  ## the long tests: killed and fuzzed runs, several processes
	$(BIN) -m pytest -m long

lint: $(READY)  ## style and types only
	$(BIN) -m ruff check
	$(BIN) -m ruff format --check
	$(BIN) -m mypy

format: $(READY)  ## rewrite the code in the project's style
	$(BIN) -m ruff check --fix
	$(BIN) -m ruff format

setup: $(READY)  ## make the virtual environment in .venv

clean:  ## remove the virtual environment and caches; runs and data stay
	@if [ -e "$(READY)" ] || [ -e "$(UNFINISHED)" ]; then rm -rf "$(VENV)"; fi
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# An installation that was cut short is thrown away and begun again: pip cannot tell half a package from a whole one.
# A virtual environment that somebody else made at this place is installed into, but never deleted.
$(READY): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. SAT needs Python 3.11 or newer; name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "SAT needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	    "$$("$(PYTHON)" --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments (no venv or no ensurepip)." \
	    "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if [ -e "$(UNFINISHED)" ]; then echo "An earlier set-up was cut short: beginning again."; rm -rf "$(VENV)"; fi
	@if [ -e "$(READY)" ] || [ ! -e "$(VENV)" ]; then mkdir -p "$(VENV)" && touch "$(UNFINISHED)" && rm -f "$(READY)"; fi
	@[ -x "$(BIN)" ] || "$(PYTHON)" -m venv "$(VENV)"
	@echo "Installing into $(VENV); the first time this takes some minutes, most of them for PyTorch."
	@"$(BIN)" -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f "$(UNFINISHED)"
	@touch "$(READY)"
