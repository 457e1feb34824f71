# Both commands of the README set up all they need in .venv first.
PYTHON3 ?= python3
PYTHON := .venv/bin/python
ARGS ?=
FAST := tests/unit tests/torch tests/mlx
SLOW := tests/e2e tests/faults tests/parity tests/gguf tests/templates
# Compiled modules are kept, whatever the environment says: the tests start hundreds of processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest --dist loadfile

.PHONY: example test test-long check docs setup

example: setup  ## train the built-in example; make example ARGS="--backend mlx"
	$(PYTHON) cli.py train $(ARGS)
	$(PYTHON) -m examples.score --trained $(ARGS)

test: check  ## then the tests with real models and the real llama.cpp
	$(PYTEST) -m "slow and not long" -n auto --maxprocesses 4 --no-loadscope-reorder $(SLOW) $(FAST)

test-long: setup  ## what takes long by nature: planted faults, and the wheel in an environment of its own
	$(PYTHON) -m pytest tests/long
	$(PYTEST) -m long -n 2 $(SLOW)

check: setup docs  ## lint, format, types, docs and the fast tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTEST) -m "not slow" -n 3 $(FAST)

docs: setup  ## the site from docs/ into site/; a broken link is an error
	$(PYTHON) -m zensical build --strict --clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Twintune needs Python 3.11.4 or newer: make PYTHON3=python3.11 ...")'
	$(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install torch==2.13.0
	$(PYTHON) -m pip install -e ".[dev]"
	touch .venv/ready
