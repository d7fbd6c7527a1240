# `make demo` and `make test` set everything up when it is not; `make help` lists the targets.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DALI_STAMP := $(VENV)/.dali-stamp
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
QWEN_RANKS := $(shell sed -n '/^dashscope==/p' constraints.txt)
DALI := $(shell sed -n '/^nvidia-dali-/p' constraints.txt)
PYTHON ?= $(shell for python in python3.11 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --no-compile -c constraints.txt

# Tests that run at once, one thread each.
TEST_JOBS ?= 2

SGLANG_VENV := .venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_STAMP := $(SGLANG_VENV)/.stamp
SGLANG := $(shell sed -n '/^sglang==/p' constraints-sglang.txt)
SGLANG_PYTHON ?= python3.11
SGLANG_INSTALL := $(SGLANG_BIN)/python -m pip --disable-pip-version-check install -qq -c constraints-sglang.txt
DEMO_STAMP := $(if $(filter sglang,$(ROLLOUT)),$(SGLANG_STAMP),$(STAMP))
DEMO_BIN := $(if $(filter sglang,$(ROLLOUT)),$(SGLANG_BIN),$(BIN))

.PHONY: help setup sglang demo test lint format bench clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(STAMP) ## Create .venv, install the dependencies, build the extension

# Of dashscope the tests read one file, Qwen's vocabulary; what it would import is left out.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found: install one, or name it with make PYTHON=..." >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "No C++ compiler found: install one (Debian: apt install g++)" >&2; exit 1; }
	@echo "Creating $(VENV), installing $(TORCH) and the other dependencies, building the extension ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(TORCH) setuptools wheel ninja
	@$(INSTALL) --no-build-isolation -e ".[dev]"
	@$(INSTALL) --no-deps $(QWEN_RANKS)
	@touch $@

# As the extra ``dali``, without building the extension again; where there is no GPU only the tests need it.
$(DALI_STAMP): $(STAMP)
	@echo "Installing $(DALI) (700 MB) ..."
	@$(INSTALL) $(DALI)
	@touch $@

sglang: $(SGLANG_STAMP) ## Create .venv-sglang with SGLang and its torch (about 2 minutes, 9 GB)

# It finds the extension that the first environment built beside the sources; what omnigrpo needs beyond SGLang follows
# it here.
$(SGLANG_STAMP): $(STAMP) constraints-sglang.txt
	@$(SGLANG_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "$(SGLANG) is pinned for Python 3.11: name one with make SGLANG_PYTHON=..." >&2; exit 1; }
	@echo "Creating $(SGLANG_VENV), installing $(SGLANG) ..."
	@test -x $(SGLANG_BIN)/python || $(SGLANG_PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_INSTALL) $(SGLANG) sglang-router av matplotlib nvtx pytest setuptools tomli-w wheel
	@OMNIGRPO_WITHOUT_EXTENSION=1 $(SGLANG_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(DEMO_STAMP) ## Train, evaluate and report on generated clips (SEED=..., OUTPUT=DIR, ROLLOUT=sglang)
	$(DEMO_BIN)/omnigrpo demo $(if $(SEED),--seed $(SEED)) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(ROLLOUT),--rollout $(ROLLOUT))

test: $(DALI_STAMP) $(SGLANG_STAMP) ## Run the tests, those of DALI's operators for the CPU and of SGLang included
	OMP_NUM_THREADS=1 OMNIGRPO_REQUIRE_DALI=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile
	OMNIGRPO_REQUIRE_SGLANG=1 $(SGLANG_BIN)/python -m pytest -q tests/rollout/sglang tests/rollout/servers

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
	rm -f kernels/omnigrpo_kernels/_C*.so $(STAMP) $(DALI_STAMP) $(SGLANG_STAMP)
	find engine kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
