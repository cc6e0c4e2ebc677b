# Two commands on a fresh machine: `make demo` and `make test`. Each does all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One process for each core, each with one thread: the models of the tests are small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
# A second environment, with the oldest release of every dependency; pip takes a wheel rather than build one.
FLOOR := .venv-floor
FLOOR_TESTS := $(addprefix tests/,test_floors.py methods/test_contract.py backbones/test_vit.py backbones/test_eva.py core/test_macs.py core/test_operator_counter.py runners/test_compile.py runners/test_export.py)

.PHONY: demo test test-all test-floor test-notebooks docs dist lint format clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m saccade demo

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m ""

$(FLOOR)/.ready: pyproject.toml floors.txt
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary --constraint floors.txt \
		--editable '.[tasks]' pytest pytest-xdist hypothesis
	touch $@

test-floor: $(FLOOR)/.ready
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest --numprocesses auto --dist worksteal $(FLOOR_TESTS)

test-notebooks: $(READY)
	$(PYTEST) -m "" tests/test_examples.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

# A wheel and a source archive, in dist/, that hold what they must and nothing else.
dist: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist build/lib
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/check_dist.py dist/*

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOOR) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
