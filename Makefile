# One command each, on a fresh machine with Python 3.11 or newer, make and a shell.
# `make PYTHON=/path/to/python3` names the interpreter; otherwise the first one that fits is taken.

VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= config/dicom-xai.yaml
CANDIDATES = $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14)

# Stamps: what is installed fits pyproject.toml and constraints.txt as they were then.
FOR_RUNNING := $(VENV)/.installed-for-running
FOR_TESTING := $(VENV)/.installed-for-testing

# They judge maps in tests, and are in no extra: what they depend on is stood in for (tests/make/standins.py).
# zennit is LGPL-3.0-or-later, grad-cam MIT; neither is needed, shipped or imported by the service.
JUDGES := zennit grad-cam

.DELETE_ON_ERROR:
.PHONY: help demo run check test lint bench models clean

help:
	@echo 'make demo    service, stand-in PACS and phantom studies; shows what came back'
	@echo 'make run     serve CONFIG=$(CONFIG)'
	@echo 'make check   prove CONFIG=$(CONFIG) without serving it'
	@echo 'make test    lint, types, layers and every test tier this machine can run;'
	@echo "             in a hurry: make test TESTS='-m \"not slow\"'"
	@echo 'make bench   latency and throughput, side by side with peers'
	@echo 'make models  train the bundled demonstration models again'
	@echo 'make clean   remove all that make made; state in var/ stays'

demo: $(FOR_RUNNING)
	$(BIN)/dicom-xai demo

run: $(FOR_RUNNING)
	$(BIN)/dicom-xai run --config $(CONFIG)

check: $(FOR_RUNNING)
	$(BIN)/dicom-xai check --config $(CONFIG)

test: lint
	$(BIN)/python -m pytest $(TESTS)

lint: $(FOR_TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(FOR_TESTING)
	$(BIN)/python -m tests.bench

models: $(FOR_TESTING)
	$(BIN)/python -m dicom_xai.demo.train

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find dicom_xai tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(FOR_RUNNING): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu]'
	@touch $@

$(FOR_TESTING): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(JUDGES)
	@touch $(FOR_RUNNING) $@

$(BIN)/python:
	@for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$candidate, $$("$$candidate" --version)"; \
	        if "$$candidate" -m venv $(VENV); then exit 0; fi; \
	        rm -rf $(VENV); \
	        echo "$$candidate cannot make a virtual environment;" \
	            'on Debian and Ubuntu: apt-get install python3-venv' >&2; \
	        exit 1; \
	    fi; \
	done; \
	echo 'no Python 3.11 or newer among: $(CANDIDATES);' \
	    'install one, or name it: make PYTHON=/path/to/python3' >&2; \
	exit 1
