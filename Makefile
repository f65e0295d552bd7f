# `make demo` and `make test` are all a newcomer needs: each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
MINUTES ?= 9
# The folder of a run on a GPU; without it, one of the card's name in bench/results/.
OUT ?=
# Kernels are compiled by the installed Triton and by the oldest and the newest that are supported.
TRITONS := 3.6.0 3.9.0
TRITON_DIRS := $(TRITONS:%=$(VENV)/triton-%)

# A worker that waits for compilers gives its tests to the others.
PARALLEL := -n $(WORKERS) --dist worksteal
CORE := tests/kernels tests/optim

.PHONY: demo test test-fast lint types unit interpreter registers bench gpu predictions performance format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/triton-%: | $(READY)
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$*
	mv $@.part $@

demo: $(READY)
	$(BIN)/grass finetune

# Everything: 7 to 11 minutes on two cores; kernels that were compiled ahead of time are kept for the next time.
test: lint types unit interpreter

# In under 2 minutes: what is marked slow, what stands around the core, and other Tritons are left out.
test-fast: lint types
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(CORE) tests/test_*.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow" tests/kernels \
		$(addprefix tests/optim/test_, method_on_kernels.py plans.py stale_remainders.py)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The plain pass: CPU tensors take torch's own kernels; Triton kernels are compiled ahead of time.
unit: $(READY) $(TRITON_DIRS)
	GRASS_REQUIRE_TRITONS=1 $(BIN)/python -m pytest $(PARALLEL)

# The same kernels, tables and launchers that a GPU runs, in Triton's interpreter. Every file of these folders is run
# in both passes, but for what is marked plain_only.
interpreter: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(CORE) tests/gpu tests/offload

# The table of registers, after a change of a kernel that was meant to change them.
registers: $(READY) $(TRITON_DIRS)
	$(BIN)/python -m tests.support.aot --write-registers

bench: $(READY)
	$(BIN)/python -m bench kernels

# On a machine with a GPU: its tests and the benchmarks. Needs torch, triton, transformers and pytest, and installs
# nothing. `make predictions`, anywhere and before, writes what measured peaks are compared with.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench gpu --minutes $(MINUTES) $(if $(OUT),--output $(OUT))

predictions: $(READY)
	$(BIN)/python -m bench gpu --predict

# The page of measured figures, from what lies in bench/results.
performance: $(READY)
	$(BIN)/python -m bench report

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
