# Two commands on a fresh machine: `make demo` and `make test`. The rest are habits.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
SEED ?= 0
SCALE ?= 1

.PHONY: demo test gpu check torture cluster format clean

# The stamp is newer than pyproject.toml exactly when what it lists is installed.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## pretrain a small XCiT on the shipped images, score it, draw its attention
	$(BIN)/xdino demo --run $(DEMO) --seed $(SEED)

test: $(VENV)/.installed  ## every test, on two cores in minutes
	$(BIN)/python -m pytest -n auto --dist worksteal

gpu: $(VENV)/.installed  ## the tests that need a GPU (`make test` leaves GPUs alone)
	$(BIN)/python -m pytest -m gpu -n 4

check: $(VENV)/.installed  ## lint, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

torture: $(VENV)/.installed  ## kills, signals, full disks, damaged and mutated files: hours at SCALE=1
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture --seed $(SEED) --scale $(SCALE) $(KINDS)

cluster: $(VENV)/.installed  ## submit, time limit, preemption, requeue on a real SLURM (Debian's packages), a quarter of an hour
	$(BIN)/python -m pytest -m cluster -rs -s tests/slurm

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
