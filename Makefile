# Each target makes the environment it needs, .venv-<Python version>, on first use and after a
# change of pyproject.toml. Two Pythons live side by side: make test PYTHON=python3.13

PYTHON ?= python3
# Passed on to the script or to pytest: make pytest ARGS="-k topk"
ARGS ?=
# cuda or tpu: installs JAX for it before `make pretrain` or `make finetune`.
ACCELERATOR ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
# $(call installed,tests) is the stamp that says: the extra `tests` is in the environment.
installed = $(patsubst %,$(VENV)/.installed-%,$(1))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help gpu-report pretrain finetune test test-targets pytest-targets lint format types pytest slow matrix scale peers run-peers docs docs-serve clean
.PRECIOUS: $(VENV)/.installed-%

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

pretrain: $(call installed,examples $(ACCELERATOR)) ## Pre-train a small Llama (flags: ARGS="--help")
	@$(BIN)/python examples/pretrain_llama.py $(ARGS)

finetune: $(call installed,finetune $(ACCELERATOR)) ## Fine-tune pretrained weights (85 MB to download; flags: ARGS="--help")
	@$(BIN)/python examples/finetune.py $(ARGS)

test: lint types docs pytest ## All checks: lint, types, docs, then the tests

lint: $(call installed,lint) ## Style and formatting
	@echo "Style (ruff) ..."
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(call installed,lint) ## Repair what lint finds, where that can be automatic
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# The layers are subclasses of Flax's modules, which have to be there to be checked.
types: $(call installed,lint examples) ## Types
	@echo "Types (pyrefly) ..."
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

pytest: $(call installed,tests) ## Tests, and the examples in docstrings and pages (ARGS="-k name")
	@echo "Tests (pytest, Python $(VERSION)) ..."
	@$(BIN)/python -m pytest -n 2 $(ARGS)

slow: $(call installed,tests) ## The tests that are too many or too long for `make test`
	@echo "Slow tests (pytest, Python $(VERSION)) ..."
	@$(BIN)/python -m pytest -n 2 -m slow $(or $(ARGS),tests)

matrix: $(call installed,tests) ## Every method in every trainer and on every mesh (minutes)
	@$(BIN)/python -m pytest -n 2 -m matrix $(ARGS)

scale: $(call installed,tests) ## Every optimizer on the trees of real models (hours; ARGS="--help")
	@$(BIN)/python -m benchmarks.scale $(ARGS)

# Without a GPU, which only says so or rehearses, CUDA need not be downloaded.
gpu-report: $(call installed,examples $(if $(wildcard /dev/nvidiactl),cuda)) ## Measure on this machine's GPU, and write tables and plots (ARGS="--rehearse" on a CPU)
	@$(BIN)/python -m benchmarks.gpu_report $(if $(findstring --rehearse,$(ARGS)),,--write) $(ARGS)

# An environment of its own: torch is large, and nothing else needs it.
peers: ## Run the released PyTorch optimizers beside ours (minutes; ARGS="--only galore")
	@$(MAKE) --no-print-directory run-peers VENV=$(VENV)-peers

run-peers: $(call installed,peers)
	@JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.peers $(ARGS)

# An environment of its own: with these plugins, JAX would look for their devices in every test.
test-targets: ## Compile the kernels for TPUs and a GPU, neither of which need be there
	@$(MAKE) --no-print-directory pytest-targets VENV=$(VENV)-targets

pytest-targets: $(call installed,targets)
	@echo "Compiling for TPUs and GPUs (pytest, Python $(VERSION)) ..."
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 tests/targets $(ARGS)

docs: $(call installed,docs) ## Build the pages into site/; a broken link is an error
	@echo "Pages (mkdocs) ..."
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(call installed,docs) ## Show the pages on a local port and follow edits
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

clean: ## Remove environments, built pages and caches (keeps runs/)
	rm -rf .venv-* site dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing microadam-jax[$*] into $(VENV) (minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "microadam_jax needs Python 3.11 or newer, but '$(PYTHON)' is $(or $(VERSION),not there); name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make environments; on Debian and Ubuntu: apt install python$(VERSION)-venv" >&2; exit 1; }
	@echo "Making the environment $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
