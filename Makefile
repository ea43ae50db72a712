# Every target sets up what it needs in .venv; the first command typed in a fresh clone works.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-cluster soak soak-cache check lint types clean

demo: $(VENV)/.demo
	$(BIN)/weightferry demo

# Those of tests/cluster run on a real Slurm cluster of this machine's own (slurm/testbed), which needs root on Debian;
# otherwise they are skipped, and say so.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 tests

test-cluster: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 tests/cluster

# 200 transfers with faults at random; about ten minutes.
soak: $(VENV)/.test
	WEIGHTFERRY_TEST_TRIALS=200 $(BIN)/python -m pytest -n 0 tests/multiprocess/test_transfer.py -k never_a_wrong

# Ten minutes of jobs on four nodes whose caches are too small for all that they use; some are killed.
soak-cache: $(VENV)/.test
	WEIGHTFERRY_TEST_SOAK_SECONDS=600 $(BIN)/python -m pytest -n 0 -s tests/cluster/test_soak.py

check: lint types test

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed again when what is to be installed changes.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,http,test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info
