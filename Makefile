# The only commands to know. Each makes what it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: setup demo test test-slow check fix bench

setup: $(STAMP)  ## a working checkout

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## the main job on real data: runs/demo, with its report
	$(BIN)/dougong demo $(if $(wildcard runs/demo),--out runs/demo-$(shell date +%H%M%S))

# On two processes; a file stays on one, so that what its tests share is made once.
test: $(STAMP)  ## every test that is not slow
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(STAMP)  ## the slow ones
	$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## formatting, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## measure the claims
	$(BIN)/dougong bench

fix: $(STAMP)  ## what a tool can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
