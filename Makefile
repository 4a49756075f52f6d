# `make` lists the targets. Everything runs on a fresh Debian with python3, gcc and make: the first target that
# needs it builds .venv from requirements.lock, and again only when the lock has changed.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.synced
ARGS ?=
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.lock deploy/setup.sh clients/python/pyproject.toml
	@PYTHON="$(PYTHON)" sh deploy/setup.sh $(VENV)
	@touch $(STAMP)

.PHONY: setup
setup: $(STAMP) ## build the environment (.venv) from requirements.lock

.PHONY: up
up: $(STAMP) ## run the whole system here until Ctrl-C (ARGS="--help" explains the options)
	@exec $(BIN)/python -m cluster up $(ARGS)

.PHONY: down
down: $(STAMP) ## stop the system that `make up` runs
	@$(BIN)/python -m cluster down $(ARGS)

.PHONY: status
status: $(STAMP) ## show nodes, actors, slots, sessions and queues
	@$(BIN)/python -m cluster status $(ARGS)

.PHONY: check
check: $(STAMP) ## linters, formatter, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.PHONY: unit
unit: $(STAMP) ## the tests that need no server (ARGS goes to pytest)
	$(BIN)/pytest tests/unit -m "not slow" $(ARGS)

.PHONY: web
web: $(STAMP) ## build the web client and what the demo page loads of it
	@sh deploy/web.sh build $(VENV)

.PHONY: test
test: $(STAMP) ## everything: check and all test suites, with a summary
	@sh deploy/test.sh $(VENV) $(ARGS)

.PHONY: bench
bench: $(STAMP) ## measure a running system (ARGS="--help" explains the options)
	@$(BIN)/python -m benchmarks $(ARGS)

.PHONY: simulate
simulate: $(STAMP) ## simulate thousands of clusters under faults, each from a seed (ARGS="--help" explains)
	@$(BIN)/python -m tests.simulation $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## attack gateway, door and frames from a seed, for a time (ARGS="--seconds 600"; --help explains)
	@$(BIN)/python -m tests.fuzz $(ARGS)

.PHONY: chaos
chaos: $(STAMP) ## break a whole system for ten minutes, judge what it promised (ARGS="--help" explains)
	@$(BIN)/python -m tests.chaos run $(ARGS)

.PHONY: lock
lock: $(STAMP) ## resolve pyproject.toml anew into requirements.lock
	PATH="$$PATH:$(VENV)/.uv/bin" uv pip compile -q --universal --generate-hashes --group dev pyproject.toml -o requirements.lock --no-header

.PHONY: clean
clean: ## remove caches and the environment; data in .carillon stays
	rm -rf clients/web/node_modules clients/web/packages/*/dist
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
