# `make demo` and `make test` are all a newcomer needs: each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
MINUTES ?= 9
# Kernels are compiled by the installed Triton and by the oldest and the newest that are supported.
TRITONS := 3.6.0 3.9.0
TRITON_DIRS := $(TRITONS:%=$(VENV)/triton-%)

.PHONY: demo test lint types unit interpreter bench gpu performance format clean

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

test: lint types unit interpreter

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The plain pass: CPU tensors take torch's own kernels; Triton kernels are compiled ahead of time.
unit: $(READY) $(TRITON_DIRS)
	GRASS_REQUIRE_TRITONS=1 $(BIN)/python -m pytest -n $(WORKERS)

# The same kernels, tables and launchers that a GPU runs, in Triton's interpreter.
interpreter: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels tests/gpu tests/offload/test_exact_weights_in_store.py \
		$(addprefix tests/optim/test_, \
		torch_contract.py method_on_kernels.py exact_weights.py outside_writes.py checks.py clipping.py plans.py plans_states.py plan_runs.py watching.py counted_states.py odd_tensors.py \
		stale_remainders.py replaced_states.py users_state.py group_settings.py step_hooks.py ownership.py amp_attribute.py)

bench: $(READY)
	$(BIN)/grass bench kernels

# On a machine with a GPU: its tests, then the benchmarks. Needs torch, triton and pytest, and installs nothing.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu_suite --minutes $(MINUTES)

# The page of measured figures, from what lies in bench/results.
performance: $(READY)
	$(BIN)/python -m bench.report

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
