VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@echo "installing into $(VENV) (once; under a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## create the virtual environment

demo: $(STAMP)  ## run a small experiment on simulated models and show its results
	@$(BIN)/pgharness demo

test: $(STAMP)  ## run the tests (a private Postgres is started for them)
	@$(BIN)/python -m pytest -n auto --ignore=tests/crash --ignore=tests/chaos
	@$(BIN)/python -m pytest tests/crash
	@$(BIN)/python -m pytest tests/chaos

check: $(STAMP)  ## formatting, lint, types, SQL lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/squawk --config .squawk.toml sql/migrations/*.sql

bench: $(STAMP)  ## print the benchmark table, as ratios to baselines of the same run
	@$(BIN)/python tests/benchmarks/run.py $(ARGS)

chaos: $(STAMP)  ## break everything for 30 minutes and see that nothing is lost (ARGS='--minutes 2': less)
	@$(BIN)/python tests/chaos/run.py $(ARGS)

docs: $(STAMP)  ## write docs/sql.md from the comments in the database
	@$(BIN)/python -m pgharness.sqldoc > docs/sql.md.new && mv docs/sql.md.new docs/sql.md

clean:  ## remove the virtual environment and caches
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup demo test check bench chaos docs clean
