# Every target does its own set-up: the first one creates .venv, later ones find it there.
PYTHON ?= python3
# Where no NVIDIA driver is found, the CPU build of torch is installed: by uv, if it is there. pip takes the registry's build, which for
# Linux x86-64 may include CUDA (about 3 GB), unless TORCH_INDEX=<the CPU index from pytorch.org's install page> is given.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready

HAS_DRIVER := $(shell command -v nvidia-smi 2>/dev/null)
# Modules are compiled when they are first imported, and then once: to compile all that is installed takes a minute, and most is
# never imported. Tests start many processes, each of which would compile oribi anew.
PIP_INSTALL := -m pip install --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# $(1): the Python to install for. uv's attempt is a preference: where it cannot reach the CPU builds, pip installs the pin.
define install_torch
@set -e; \
if [ -n "$(TORCH_INDEX)" ]; then \
	echo "installing $(TORCH) from TORCH_INDEX"; \
	$(1) $(PIP_INSTALL) --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
elif [ -n "$(HAS_DRIVER)" ]; then \
	echo "installing $(TORCH): an NVIDIA driver was found"; \
	$(1) $(PIP_INSTALL) "$(TORCH)"; \
elif command -v uv >/dev/null && echo "installing $(TORCH) for the CPU with uv: no NVIDIA driver was found" \
	&& UV_HTTP_RETRIES=0 uv pip install --python $(1) --torch-backend=cpu "$(TORCH)"; then :; \
else \
	echo "installing $(TORCH): no NVIDIA driver was found. If pip now downloads CUDA (about 3 GB), stop it and call"; \
	echo "make TORCH_INDEX=<the CPU index from pytorch.org's install page>, or install uv first"; \
	$(1) $(PIP_INSTALL) "$(TORCH)"; \
fi
endef

.PHONY: demo test test-fast test-all test-gpu lint types format docs clean test-faults test-matrix soak

demo: $(READY)
	$(BIN)/oribi demo

# One process per core without threads of its own, because tiny models gain nothing from them. worksteal keeps the tests of a file
# together, so their fixtures are made once.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(READY)
	$(PYTEST) -m "not long"

test-fast: $(READY)
	$(PYTEST) -m "not slow and not long"

test-all: $(READY)
	$(PYTEST)

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
MATRIX_TESTS ?= -m "not slow and not long" tests/train tests/trust tests/models tests/lora tests/save

test-matrix: .venv-oldest/.ready .venv-newest/.ready
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest $(MATRIX_TESTS)
	HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest $(MATRIX_TESTS)

.venv-oldest/.ready .venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(call install_torch,$(@D)/bin/python)
	$(@D)/bin/python $(PIP_INSTALL) $(if $(findstring oldest,$@),$(OLDEST),$(NEWEST)) --editable ".[dev]"
	touch $@

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# what users' type checkers see of oribi
types: $(READY)
	$(BIN)/mypy

# the site, in build/docs; needs no network, and every warning is an error
docs: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist src/*.egg-info

# the stamp is written last, so an interrupted install is started again
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(call install_torch,$(BIN)/python)
	@echo "installing oribi and what its tests need"
	$(BIN)/python $(PIP_INSTALL) --editable ".[dev]"
	touch $@
