PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-odd test-even long lint types contracts wheel

help:  ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## Make .venv with the pinned dependencies and this package, editable

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)  ## Train, segment and evaluate on synthetic breast exams: about 12 minutes
	$(BIN)/tokenseg demo runs/demo

# These fork, which is safe only where no other test has started threads: they come first.
FORKING := tests/test_faults.py tests/test_fuzz.py tests/test_hostile.py
REST := $(filter-out $(FORKING),$(sort $(wildcard tests/test_*.py)))
# Two processes with a thread each take half the time of one with two. Neighbours in the list are alike, so every other
# file is about half of the work.
COVERED := OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest --quiet --no-header -m "not long"

test: $(READY)  ## Run the tests, two processes at a time, with branch coverage and its floor
	$(BIN)/python -m coverage erase
	$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync test-odd test-even
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

test-odd:
	@$(COVERED) $(FORKING) $(shell printf '%s\n' $(REST) | awk 'NR % 2')
test-even:
	@$(COVERED) $(shell printf '%s\n' $(REST) | awk 'NR % 2 == 0')

long: $(READY)  ## Run the tests that take minutes: thousands of damaged files, killed commands, a cluster, the quickstart
	$(BIN)/python -m pytest -m long $(FORKING)
	$(BIN)/python -m pytest -m long $(REST)

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)  ## Check the types
	$(BIN)/mypy

contracts: $(READY)  ## Check who may import whom
	$(BIN)/lint-imports

wheel: $(READY)  ## Build the wheel and segment with it in a clean environment
	scripts/check_wheel.sh
