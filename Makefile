# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv and install what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One heavy test at a time on each of two cores, one torch thread each.
WORKERS ?= 2
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint typecheck integration claims claims-sample bench docs clean

$(VENV)/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) -e '.[dev,integration]'
	touch $@

$(VENV)/peers: $(VENV)/dev
	$(PIP) -e '.[peers]'
	touch $@

demo: $(VENV)/base
	$(BIN)/torchgraft fit digits-vit --budget latency=0.5x --time 3m --out runs/demo
	$(BIN)/torchgraft measure digits-vit --against runs/demo/recipe.yaml

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	$(SINGLE) $(BIN)/pytest -n $(WORKERS) --dist worksteal

integration: $(VENV)/dev
	tests/integration/install
	$(SINGLE) $(BIN)/pytest -m integration tests/integration

claims: $(VENV)/dev
	$(SINGLE) $(BIN)/python -m torchgraft.claims

claims-sample: $(VENV)/dev
	$(SINGLE) $(BIN)/python -m torchgraft.claims --fastest 2 --dry

bench: $(VENV)/peers
	$(BIN)/python benchmarks/baselines.py
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/passes.py
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/against_torch_pruning.py

docs: $(VENV)/dev
	$(BIN)/python -m torchgraft.report.readme
	$(BIN)/python -m torchgraft.report.site

clean:
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
