# Two commands matter: `make demo` and `make test`. Each sets up .venv when it is missing or older than what defines it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PYTEST_ARGS ?=
DEMO_ARGS ?=

export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup demo test test-unit test-cluster test-gpu lint format bench clean

help: ## Lists the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Sets up .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP) ## Trains a small model, asks every checkpoint, chats with the result
	$(BIN)/arkor-ray demo $(DEMO_ARGS)

test: $(STAMP) ## All tests that this machine can run
	$(BIN)/python -m pytest -m "not gpu and not cluster" $(PYTEST_ARGS)

test-unit: $(STAMP) ## The fast ones
	$(BIN)/python -m pytest -q -m "not gpu and not cluster and not integration and not faults" $(PYTEST_ARGS)

test-cluster: $(STAMP) ## A cluster of several hosts whose nodes fail (root; redis-server and iproute2 besides what .ci/run installs)
	$(BIN)/python -m pytest -m cluster tests/cluster $(PYTEST_ARGS)

test-gpu: $(STAMP) ## Those that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Lets ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## The benchmarks: ratios measured side by side, tables and JSON in bench-results/
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

clean: ## Removes what the other commands made
	rm -rf $(VENV) .arkor-ray .arkor-ray-demo bench-results build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
