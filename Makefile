# Every target does its own set-up: the first one creates .venv, later ones find it there.
PYTHON ?= python3
# On Linux x86-64 the package registry's torch includes CUDA, about 3 GB. For the CPU build pass
# TORCH_INDEX=<the CPU index from pytorch.org's install page>; it is asked for torch alone.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready

# says before the download what it may bring where no NVIDIA driver would use it
define install_torch
@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null; then \
	echo "installing $(TORCH): no NVIDIA driver was found, and the package registry's build for Linux x86-64 may include CUDA"; \
	echo "(about 3 GB); for the CPU build: make $(MAKECMDGOALS) TORCH_INDEX=<the CPU index from pytorch.org's install page>"; \
fi
$(1) -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
endef

.PHONY: demo test test-fast test-gpu lint format clean test-faults test-matrix soak

demo: $(READY)
	$(BIN)/oribi demo

# One process per core without threads of its own, because tiny models gain nothing from them. worksteal keeps the tests of a file
# together, so their fixtures are made once.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow"

test-gpu: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

# long: a hundred kills at random moments, and thousands of damaged files
test-faults: $(READY)
	HF_HUB_OFFLINE=1 ORIBI_KILLS=100 ORIBI_FUZZ=20000 $(BIN)/python -m pytest tests/trust

soak: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.trust.soak 2000

# oldest and newest releases that pyproject.toml allows, each in a virtual environment of its own
OLDEST := transformers==5.17.* trl==1.15.* peft==0.21.* datasets==4.8.*
NEWEST := transformers==5.24.* trl==1.16.* peft==0.21.* datasets==5.2.*
MATRIX_TESTS ?= -m "not slow" tests/train tests/trust tests/models tests/lora tests/save

test-matrix: .venv-oldest/.ready .venv-newest/.ready
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest $(MATRIX_TESTS)
	HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest $(MATRIX_TESTS)

.venv-oldest/.ready .venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(call install_torch,$(@D)/bin/python)
	$(@D)/bin/python -m pip install --quiet $(if $(findstring oldest,$@),$(OLDEST),$(NEWEST)) --editable ".[dev]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist src/*.egg-info

# the stamp is written last, so an interrupted install is started again
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(call install_torch,$(BIN)/python)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
