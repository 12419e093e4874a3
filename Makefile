# `make demo` and `make test` work from a fresh clone: they make .venv first, once.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := blocks peers averaging swarm

# Workers of `make test`: a test mostly waits for others or has one busy thread. tests/spread.py says who does what.
WORKERS ?= 2

# Tests start many small processes; more than one thread in each would only make them wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow check style types format bench docs install clean

demo: $(STAMP)
	$(BIN)/swarm demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=7200

check: style types

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for file in examples/benchmarks/*.py; do echo "$$file" >&2; $(BIN)/python "$$file" --json || exit 1; done

docs: $(STAMP)
	$(BIN)/mkdocs build
	@echo "the site is in build/site; open build/site/index.html, or: $(BIN)/mkdocs serve"

install: $(STAMP)

# torch goes first: it is by far the largest, and pip then resolves the rest against it.
$(STAMP): pyproject.toml constraints.txt
	@set -e; for python in python3.11 python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "Python 3.11 or newer was not found on PATH; install it first" >&2; exit 1; fi; \
	test -x $(BIN)/python || $$found -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
