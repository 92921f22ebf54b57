# Everything runs in .venv, made on first use; a second run does only what has changed since.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Where torch comes from; without a GPU, TORCH_INDEX="--index-url .../whl/cpu" (see pytorch.org) is a tenth of the download.
TORCH_INDEX ?=
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

CPP_FILES := find csrc tests '(' -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' ')' -print0

.PHONY: help env build demo test test-quick test-oldest gpu gpu-dry gpu-pack check bench lint format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "ARGS=... is passed on: make test ARGS='-k cross_entropy', make demo ARGS='--text my.txt --steps 500'"

env: $(VENV)/.env ## create .venv with torch and the build dependencies
$(VENV)/.env:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=...") if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_INDEX) $(TORCH)
	$(PIP) numpy pybind11 ninja setuptools wheel
	@touch $@

build: $(VENV)/.built $(VENV)/.installed ## compile what has changed and install fastloss editable
$(VENV)/.built: $(VENV)/.env $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.built
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# The packages of one of pyproject.toml's extras; fastloss itself is installed already.
$(VENV)/.extra-%: pyproject.toml | $(VENV)/.installed
	$(PIP) "fastloss[$*]"
	@touch $@

demo: $(VENV)/.built $(VENV)/.extra-demo ## train a small language model with torch's loss and with fastloss
	$(BIN)/python benchmarks/train_lm.py $(ARGS)

# One thread for each of two workers.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.built $(VENV)/.extra-test ## run the whole test suite
	$(PYTEST) --durations=20 $(ARGS)

test-quick: $(VENV)/.built $(VENV)/.extra-test ## run one dtype and one case of every family, without sanitizers
	$(PYTEST) --quick --durations=20 $(ARGS)

# The oldest torch that pyproject.toml allows has an environment of its own. If the package index does not give it, that passes.
OLDEST := $(VENV)-oldest
OLDEST_TORCH := $(or $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml),$(error no torch in pyproject.toml))
OLDEST_PIP := $(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet
OLDEST_RUN := OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m
OLDEST_PYTEST := $(OLDEST_RUN) pytest -n 2 --dist worksteal
OLDEST_CHECKED := cross_entropy linear_cross_entropy clip_loss ctc_loss mse_loss dpo_loss_from_logits gae

$(OLDEST)/.torch-$(OLDEST_TORCH): | $(VENV)/.env
	$(BIN)/python -m venv --clear $(OLDEST)
	@echo "downloading torch $(OLDEST_TORCH)"
	@if said=$$($(OLDEST_PIP) download --dest $(OLDEST)/wheels $(TORCH_INDEX) torch==$(OLDEST_TORCH) 2>&1); then \
	  set -ex; \
	  $(OLDEST_PIP) install --no-index --find-links $(OLDEST)/wheels torch==$(OLDEST_TORCH); \
	  $(OLDEST_PIP) install numpy pytest pytest-xdist hypothesis rich matplotlib; \
	  touch $@; \
	else \
	  echo "$$said" | tail -n 5; \
	  case "$$said" in *"No space left"* | *"Permission denied"*) exit 1 ;; esac; \
	  echo "torch $(OLDEST_TORCH) could not be downloaded, so nothing was tested under it."; \
	fi
	@rm -rf $(OLDEST)/wheels

test-oldest: $(VENV)/.built $(OLDEST)/.torch-$(OLDEST_TORCH) ## run a part of the suite under the oldest supported torch
	@if test -e $(OLDEST)/.torch-$(OLDEST_TORCH); then \
	  set -ex; \
	  $(OLDEST_RUN) fastloss info; \
	  $(OLDEST_RUN) fastloss check --device cpu $(OLDEST_CHECKED:%=--loss %); \
	  $(OLDEST_PYTEST) --quick -k "not compiled_transforms" tests/contract tests/losses tests/project/test_profile.py; \
	  $(OLDEST_PYTEST) --devices cpu -k "as_one_graph or opcheck" tests/contract/test_compile.py; \
	fi

gpu: ## on a machine with a GPU: times, numerics, counters, sanitizers in nine minutes; PYTHON needs a torch with CUDA
	$(PYTHON) benchmarks/gpu.py $(ARGS)

gpu-pack: $(VENV)/.built ## pack what `make gpu` needs for a machine without compilers
	$(BIN)/python benchmarks/gpu.py --pack $(ARGS)

gpu-dry: $(VENV)/.built $(VENV)/.extra-test ## rehearse the stages of `make gpu` without a GPU
	$(BIN)/python benchmarks/gpu.py --device cpu $(ARGS)

check: $(VENV)/.built $(VENV)/.extra-cli ## compare every loss with its float64 reference on every device
	$(BIN)/python -m fastloss check $(ARGS)

bench: $(VENV)/.built $(VENV)/.extra-cli ## benchmark every loss against eager PyTorch and torch.compile
	$(BIN)/python -m fastloss bench $(or $(ARGS),--all --out bench-out)

lint: $(VENV)/.built $(VENV)/.extra-dev ## check formatting and types: ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(CPP_FILES) | xargs -0 $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.built $(VENV)/.extra-dev ## fix formatting: ruff, clang-format, the README's table of losses
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(CPP_FILES) | xargs -0 $(BIN)/clang-format -i
	$(BIN)/python -m fastloss losses --write README.md

clean: ## remove everything generated, except .venv and .venv-oldest
	rm -rf build dist demo-out bench-out gpu-out gpu-pack *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache $(VENV)/.built
	rm -f fastloss/*.so
	find fastloss tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
