# `make demo` and `make test` are all a newcomer needs: each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test lint types unit interpreter bench format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/grass finetune

test: lint types unit interpreter

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The plain pass: CPU tensors take torch's own kernels; Triton kernels are compiled ahead of time.
unit: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

# The same kernels, tables and launchers that a GPU runs, in Triton's interpreter.
interpreter: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels \
		tests/optim/test_torch_contract.py tests/optim/test_method_on_kernels.py

bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
