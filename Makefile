# Each target sets up what it needs. `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lint check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run ## images to features, PCA and its metrics; only what changed is computed
	@dvc repro
	@printf '\n'; cat reports/evaluation/summary.txt
	@printf '\nNext:  source .venv/bin/activate\n       dvc exp run -S reduce.k=16\n       dvc exp show --drop ".*" --keep "Experiment|reduce.k|explained|embedding"\n'

test: .venv/dev ## what takes minutes; run it before each commit
	@pytest

test-slow: .venv/dev ## the rest: the whole pipeline, real networks, killed runs
	@pytest -m slow

lint: .venv/dev ## ruff and mypy
	@ruff check . && ruff format --check . && mypy

check: # what the machine must have, said before anything else fails
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit(f"Python 3.11, 3.12 or 3.13 is needed, and {sys.executable} is {sys.version.split()[0]}. Set PYTHON, as in: make PYTHON=python3.11 run")'
	@$(PYTHON) bootstrap/submit.py --check

.venv/run: requirements.txt constraints.txt | check
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv: some 2 GB, minutes' && pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	@pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@
