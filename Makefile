# Every target makes what it needs, in .venv. `make help` lists them.
#   make test PYTHON=python3.13     another interpreter (after `make clean-venv`)
#   make test CONSTRAINTS=FILE      other pins

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
CONSTRAINTS ?= constraints.txt
export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

# The first interpreter that runs and is new enough (a pyenv shim may exist without running).
CANDIDATES := $(or $(PYTHON),python3.11 python3 python3.12 python3.13)

.PHONY: help demo test slow portability diffusers-oldest diffusers-newest lint format docs build clean clean-venv

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## install what the demo needs and run it
	@$(BIN)/flowsolve demo

test: $(VENV)/.dev ## tests and doctests, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

slow: $(VENV)/.dev ## only the slow tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m slow

portability: $(VENV)/.dev ## the tests as other CPUs round: without vectors, with AVX2, and on two threads
	@for cpu in "default SSE41 1" "default SSE41 2" "avx2 AVX2 1" "avx2 AVX2 2"; do \
	  set -- $$cpu; echo "ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2, threads: $$3"; \
	  ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 FLOWSOLVE_TEST_THREADS=$$3 OMP_NUM_THREADS=$$3 \
	    $(BIN)/python -m pytest -q -n $(JOBS); \
	done

# Tests beside classes that came later, or whose options did, fail with the oldest unless they skip.
# Beside .venv, whose packages they see, but for diffusers and what it needs of its own age. Pins of .venv do not hold.
OLDEST := $(VENV)-diffusers-oldest
NEWEST := $(VENV)-diffusers-newest
AGED := 'diffusers==0.30.0' 'transformers==4.44.2' 'tokenizers<0.20' 'huggingface-hub<0.26' 'accelerate==0.33.0'
LAYER = $(BIN)/python -m venv $(1) && $(BIN)/python -c "import sysconfig, pathlib; \
	pathlib.Path('$(1)/lib', 'python' + sysconfig.get_python_version(), 'site-packages', 'below.pth').write_text( \
	sysconfig.get_path('purelib') + '\n')" && PIP_CONSTRAINT= $(1)/bin/python -m pip install -qq --no-deps $(2)
WITH = OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(1)/bin/python -m pytest -q -n $(JOBS) tests/adapters tests/cli/test_conditions.py

diffusers-oldest: $(VENV)/.dev ## the adapters' tests with the oldest diffusers that pyproject.toml allows
	@test -f $(OLDEST)/.done || { $(call LAYER,$(OLDEST),$(AGED)) && touch $(OLDEST)/.done; }
	@$(call WITH,$(OLDEST))

diffusers-newest: $(VENV)/.dev ## the adapters' tests with the newest diffusers that there is
	@test -d $(NEWEST) || { $(call LAYER,$(NEWEST),diffusers); }
	@PIP_CONSTRAINT= $(NEWEST)/bin/python -m pip install -qq --no-deps --upgrade diffusers
	@$(call WITH,$(NEWEST))

lint: $(VENV)/.dev ## style, format, types and the direction of imports
	@$(BIN)/ruff check --quiet --output-format concise
	@$(BIN)/ruff format --check --quiet || { echo "not formatted: run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log >&2; exit 1; }
	@echo "lint: style, format, types and imports are clean"

format: $(VENV)/.dev ## mend style and format
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format

docs: $(VENV)/.dev ## build the documentation into site/
	@$(BIN)/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

build: $(VENV)/.dev ## wheel into dist/
	@$(BIN)/python -m pip wheel -qq --no-deps --wheel-dir dist .

clean: ## remove what the targets wrote, but not .venv
	@rm -rf build demo dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find flowsolve tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: clean ## remove .venv too
	@rm -rf $(VENV) $(VENV)-diffusers-*

$(BIN)/python:
	@for p in $(CANDIDATES); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then found=$$p; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "flowsolve needs Python 3.11 or newer; none of these is: $(CANDIDATES). Name one: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "creating $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing what the demo needs"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[bench]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing the development tools"
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) -e '.[dev,docs]'
	@# Peers of the tests, which need none of the training tools that these packages ask for.
	@$(BIN)/python -m pip install -qq -c $(CONSTRAINTS) --no-deps k-diffusion torchcfm
	@touch $(VENV)/.demo $@
