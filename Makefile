# make setup | run | test | lint | bench | large | power | chaos | sim; every target sets up what it
# needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test lint bench large power chaos sim

setup: .venv/.installed

run: setup
	$(BIN)/broker serve

test: .venv/.installed-dev lint
	tests/setup/system.sh
	PYTHON=$(PYTHON) tests/setup/python_sdk_tests.sh
	tests/setup/node.sh
	tests/setup/rust.sh
	@# A machine that stands still for seconds fails tests with real processes: what failed gets
	@# one more try, on its own, and both runs are shown.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile \
		|| $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench

power: .venv/.installed-dev
	$(BIN)/python -m tests.power --cuts $(or $(CUTS),10000) $(and $(SEED),--seed $(SEED))

chaos: .venv/.installed-dev
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),10) $(and $(SEED),--seed $(SEED))

# One of them again, with its log: .venv/bin/python -m tests.sim --seed 7 --verbose
sim: .venv/.installed-dev
	$(BIN)/python -m tests.sim --seeds $(or $(SEEDS),1000)

large: .venv/.installed-dev
	$(BIN)/python -m bench.large

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "venv is missing: on Debian, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: requirements.lock pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

.venv/.installed-dev: requirements-dev.lock .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	touch $@
