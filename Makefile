PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu clean

demo: $(VENV)/ready
	$(BIN)/python -m experiments demo

test: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" --numprocesses auto --maxprocesses 8 --dist worksteal
	$(MAKE) test-gpu

# One at a time: some fill a GPU's memory.
test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV)
