PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu gpu test-wheel emulate docs clean

demo: $(VENV)/ready
	$(BIN)/python -m experiments demo

# The tests that most machines can run come last: their count is the last line.
test: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if [ "$$($(BIN)/python -c 'import torch; print(torch.cuda.is_available())')" = False ]; then \
		echo "No GPU that torch can use: the tests that need one are left out"; \
	else $(MAKE) test-gpu; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses auto --maxprocesses 8 --dist worksteal

# One at a time: some fill a GPU's memory.
test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu

# The first hour on a GPU: checks, tests, bench; a second `make gpu` goes on where the first ended. GPU_COST: the tool whose
# predictions stand beside the measurements.
GPU_COST ?= ../shared/tools/gpu_cost.py
gpu: $(VENV)/ready
	GPU_COST=$(GPU_COST) $(BIN)/python -m bench gpu

# The README's code with the wheel and all that it asks for, installed afresh and outside of the checkout. Needs the network.
test-wheel: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m tests.readme > dist/first_steps.py
	@set -ex; there=$$(mktemp -d); trap "rm -rf $$there" EXIT; \
	$(PYTHON) -m venv $$there; \
	$$there/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl; \
	cp dist/first_steps.py $$there; cd $$there; \
	bin/python -m pip list --disable-pip-version-check; \
	bin/python -I first_steps.py

# Where there is no GPU: the PTX of the kernels, run by the emulator in the folder PTXEMU; its cases first, then the GPU tests.
PTXEMU ?= ../shared/tools/ptxemu
CASES ?= quick
emulate: $(VENV)/ready
	@if [ ! -e $(PTXEMU)/cases.py ]; then echo "emulate: skipped, no emulator in PTXEMU=$(PTXEMU)"; else \
	$(BIN)/python $(PTXEMU)/cases.py $(CASES) && \
	PTXEMU=$(abspath $(PTXEMU)) OMP_NUM_THREADS=1 $(BIN)/python -B -m pytest -m gpu; fi

# The site, in docs/_build/html. Warnings are errors; scripts of the gallery run again only when they have changed.
docs: $(VENV)/docs-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable .[docs]
	touch $@

# Modules compile when first imported; all that nothing imports would take as long as the rest.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable .[dev]
	touch $@

# With an old build/, the next `pip install .` would also install modules that have gone since.
clean:
	rm -rf $(VENV) build dist docs/_build docs/auto_examples docs/generated docs/reference/generated docs/sg_execution_times.rst
