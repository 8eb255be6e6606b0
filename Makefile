# `make help` lists the targets. The first run makes .venv and installs; later ones go straight to work.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHAPE ?= benchmarks/shapes/qwen3-0.6b

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-clients lint check gpu docs reference format clean

help: ## what there is to run
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): outrider needs Python 3.11 or 3.12;" \
		"name one as in: make demo PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV): a few minutes on the first run"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' || { rm -rf $(VENV); exit 1; }
	@touch $@

demo: $(READY) ## the bundled model edits code, drafts in colour, with and without speculation
	@$(BIN)/python examples/demo.py

test: $(READY) ## the tests to run before each change: no GPU, no long grids
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not gpu and not slow and not clients'

test-all: $(READY) ## every test that needs no GPU, long grids included
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not gpu and not clients'

test-clients: $(READY) ## frameworks against the server, in an environment of their own
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,clients]'
	$(VENV)-clients/bin/python -m pytest -m clients -v tests/test_clients.py

lint: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## all that a change must pass

gpu: export PYTHONPATH := src
gpu: ## tests and short benchmarks that need a CUDA device, with the Python that has CUDA torch (PYTHON=...)
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m outrider.cli.main bench latency $(SHAPE) --load-format dummy --device cuda \
		--draft $(SHAPE)-peagle -k 7 --verifier synthetic --synthetic-rates .75,.60,.48,.38,.30,.24,.19 --repeats 3
	$(PYTHON) -m outrider.cli.main bench kernels $(SHAPE) --device cuda --rows 8
	$(PYTHON) benchmarks/mixed_steps.py --model $(notdir $(SHAPE)) --device cuda --steps 20 --repeats 1

docs: $(READY) ## build the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

reference: $(READY) ## write the pages of docs/reference again from the code
	$(BIN)/python tools/write_reference.py

format: $(READY) ## rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
