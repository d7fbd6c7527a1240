# `make demo` and `make test` set everything up when it is not; `make help` lists the targets.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DALI_STAMP := $(VENV)/.dali-stamp
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
DALI := $(shell sed -n '/^nvidia-dali-/p' constraints.txt)
PYTHON ?= $(shell for python in python3.11 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --no-compile -c constraints.txt

.PHONY: help setup demo test lint format bench clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(STAMP) ## Create .venv, install the dependencies, build the extension

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or name it with make PYTHON=..." >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "No C++ compiler found: install one (Debian: apt install g++)" >&2; exit 1; }
	@echo "Creating $(VENV), installing $(TORCH) and the other dependencies, building the extension ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(TORCH) setuptools wheel ninja
	@$(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

# As the extra ``dali``, without building the extension again; where there is no GPU only the tests need it.
$(DALI_STAMP): $(STAMP)
	@echo "Installing $(DALI) (700 MB) ..."
	@$(INSTALL) $(DALI)
	@touch $@

demo: $(STAMP) ## Train, evaluate and report on generated clips (SEED=..., OUTPUT=DIR)
	$(BIN)/omnigrpo demo $(if $(SEED),--seed $(SEED)) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(ROLLOUT),--rollout $(ROLLOUT))

test: $(DALI_STAMP) ## Run the tests, those of DALI's operators for the CPU included
	OMNIGRPO_REQUIRE_DALI=1 $(BIN)/python -m pytest -q

lint: $(DALI_STAMP) ## Check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Run every benchmark of benchmarks/
	@shopt -s nullglob; scripts=(benchmarks/bench_*.py); \
	test $${#scripts[@]} -gt 0 || { echo "benchmarks/ holds no bench_*.py yet" >&2; exit 1; }; \
	set -e; for script in "$${scripts[@]}"; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## Remove what is built or generated, .venv and runs/ excepted
	rm -rf build dist .pytest_cache .ruff_cache engine/*.egg-info kernels/*.egg-info *.egg-info
	rm -f kernels/omnigrpo_kernels/_C*.so $(STAMP) $(DALI_STAMP)
	find engine kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
