# Every target does its own set-up: the first one creates .venv, later ones find it there.
PYTHON ?= python3
# without CUDA; for a GPU machine: make test-gpu TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-fast test-gpu lint format clean

demo: $(READY)
	$(BIN)/oribi demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-fast: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

test-gpu: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist src/*.egg-info

# the stamp is written last, so an interrupted install is started again
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
