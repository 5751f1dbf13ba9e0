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
.PHONY: help demo run check test lint bench chaos soak fuzz models lock sbom promises clean

help:
	@echo 'make demo    service, stand-in PACS and phantom studies; shows what came back'
	@echo 'make run     serve CONFIG=$(CONFIG)'
	@echo 'make check   prove CONFIG=$(CONFIG) without serving it'
	@echo 'make test    lint, types, layers and every test tier this machine can run;'
	@echo "             in a hurry: make test TESTS='-m \"not slow\"'"
	@echo 'make chaos   hundreds of rounds of kills, lies, full disks and clock jumps; ends in counts;'
	@echo "             make chaos CHAOS='--rounds 2000 --seed 7' for longer, or again"
	@echo 'make soak    half an hour of studies: memory, threads, files, latency; SOAK="--minutes 5"'
	@echo 'make fuzz    hostile input for minutes; FUZZ=500 for hours, FUZZ_SEED=n again as before'
	@echo 'make bench   latency and throughput, side by side with peers'
	@echo 'make models  train the bundled demonstration models again'
	@echo 'make sbom    the bill of materials, dicom-xai.cdx.json (CycloneDX)'
	@echo 'make lock    requirements-cpu.lock and -gpu.lock, by constraints.txt'
	@echo 'make promises  which tests prove which promise: deploy/promises.md'
	@echo 'make clean   remove all that make made; state in var/ stays'

demo: $(FOR_RUNNING)
	$(BIN)/dicom-xai demo

run: $(FOR_RUNNING)
	$(BIN)/dicom-xai run --config $(CONFIG)

check: $(FOR_RUNNING)
	$(BIN)/dicom-xai check --config $(CONFIG)

test: lint
	$(BIN)/python -m pytest $(TESTS)
	@$(BIN)/python -m tests.make.promises --missing

lint: $(FOR_TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(FOR_TESTING)
	$(BIN)/python -m tests.chaos $(CHAOS)

bench: $(FOR_TESTING)
	$(BIN)/python -m tests.bench

# So many times what `make test` tries. What fails is left, made small, in tests/fuzz/corpus.
FUZZ ?= 20
FUZZ_SEED ?= $(shell date +%s)

soak: $(FOR_TESTING)
	$(BIN)/python -m tests.chaos.soak $(SOAK)

fuzz: $(FOR_TESTING)
	FUZZ_TIMES=$(FUZZ) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz

models: $(FOR_TESTING)
	$(BIN)/python -m dicom_xai.demo.train cxr
	$(BIN)/python -m dicom_xai.demo.train ct-head
	$(BIN)/python -m dicom_xai.demo.train ct-3d

sbom: $(FOR_TESTING)
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type application \
	    --spec-version 1.6 --output-reproducible -o $(VENV)/installed.cdx.json $(BIN)/python
	$(BIN)/python -m tests.make.sbom $(VENV)/installed.cdx.json dicom-xai.cdx.json

# For every platform, from the public index; torch apart, see the head of a lock.
lock: requirements-cpu.lock requirements-gpu.lock

requirements-%.lock: pyproject.toml constraints.txt tests/make/lock.py | $(BIN)/python
	test -x $(VENV)/lock/bin/pip-compile \
	    || { $(BIN)/python -m venv $(VENV)/lock && $(VENV)/lock/bin/pip install --quiet pip-tools==7.6.2; }
	$(VENV)/lock/bin/pip-compile --quiet --generate-hashes --extra $* -c constraints.txt \
	    --extra-index-url https://download.pytorch.org/whl/cpu \
	    --unsafe-package torch --strip-extras --no-emit-index-url --no-emit-find-links --no-header \
	    --annotation-style line -o $@ pyproject.toml
	$(BIN)/python -m tests.make.lock $@ $*

promises: $(FOR_TESTING)
	$(BIN)/python -m tests.make.promises

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output dicom-xai.cdx.json
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
