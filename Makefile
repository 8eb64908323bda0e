# The two commands a visitor needs are `make demo` and `make test`; every target makes .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mmlora-installed

.PHONY: setup demo test test-slow test-clients check format eval models clean

setup: $(STAMP)

# pip reads constraints.txt for every package, so that a fresh clone gets what CI ran with.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmlora needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# The tests' models are tiny: torch is faster with one thread, and the cores run several test files at once.
WORKERS ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=15 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=30 -m "(slow or not slow) and not clients"

# Installs the clients that people use under .cache/clients and runs each against a server; KIND leaves some out.
KIND ?= clients
test-clients: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=15 -m "$(KIND)" tests/clients

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p mmlora

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

eval: $(STAMP)
	$(BIN)/python -m mmlora.assets.training.evaluate

# Compares every family with transformers and PEFT, and writes mmlora/models/parity.json and docs/models.md.
models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.models.parity tests/models/test_families.py tests/models/test_equality.py tests/models/test_longrope.py
	$(BIN)/python -m tests.models.models_page

clean:
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
