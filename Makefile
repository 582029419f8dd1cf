# Every target sets up what it needs: python3 (3.11 or newer), make and a package index are enough.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
# The first of these that is new enough; `make PYTHON=/path/to/python` decides otherwise.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
PYTEST := $(BIN)/python -m pytest
# Twice as many as the cores of a small machine: tests mostly wait, for commits, leases and processes.
XDIST ?= -n 4 --dist=loadgroup
ARGS ?=

DEMO := $(VENV)/.demo-installed
DEV := $(VENV)/.dev-installed
# A second environment, with every dependency at the oldest version that pyproject.toml allows.
OLDEST := .venv-oldest

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## run the demo, with a PostgreSQL of its own (ARGS="..." for options, ARGS=--help lists them)
	@exec $(BIN)/pgchannels demo $(ARGS)

# What is the same on any server is not run again on the oldest one.
SAME := $(addprefix --ignore=tests/integration/test_,admin.py auth_web.py cli.py connections.py \
    consumers.py delivery.py demo.py embedded.py examples.py hostile.py metrics.py middleware.py origins.py packaging.py \
    publishes_models.py publishing_examples.py status.py web.py) \
    $(addprefix --ignore=tests/property/test_,fuzz_sockets.py overflow.py subscription.py) \
    $(addprefix --ignore=tests/faults/test_,shutdown.py slow_sockets.py)

test: $(DEV) ## the tests on PostgreSQL 18, then those that need one on PostgreSQL 16
	$(PYTEST) $(XDIST) --postgres=18 $(ARGS)
	$(PYTEST) $(XDIST) --postgres=16 tests/integration tests/migrations tests/property tests/faults $(SAME) $(ARGS)

browser-test: $(DEV) ## the tests that drive a browser (needs chromium)
	@$(PYTEST) tests/browser $(ARGS)

check: $(DEV) ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@if command -v node >/dev/null; then \
	    echo "$(BIN)/pyright"; \
	    $(BIN)/pyright --pythonpath $(BIN)/python; \
	else \
	    echo "SKIPPED: pyright (node is not on PATH)"; \
	fi

# Sockets and sessions are where the libraries below us make a difference.
check-oldest: $(OLDEST)/.installed ## the tests of sockets and of the ORM with the oldest dependencies
	$(OLDEST)/bin/python -m pytest $(XDIST) -W ignore::DeprecationWarning \
	    --ignore=tests/unit/test_public_api.py tests/unit \
	    $(addprefix tests/integration/test_,connections.py consumers.py web.py orm.py publishes.py) $(ARGS)

format: $(DEV) ## format the code, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

wheel: $(DEV) ## build the wheel and the source distribution into dist/
	$(BIN)/python -m build

clean: ## remove the virtual environment, caches and builds
	rm -rf $(VENV) $(OLDEST) dist build .coverage .coverage.* htmlcov \
	    .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO): pyproject.toml | $(BIN)/python
	@echo "Installing pgchannels and what the demo needs"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "Installing pgchannels and what tests and checks need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@touch $@

# Old versions of Starlette's test client need httpx.
$(OLDEST)/.installed: pyproject.toml .ci/floors | $(BIN)/python
	@echo "Installing the oldest versions of what pgchannels needs"
	@test -x $(OLDEST)/bin/python || $(BIN)/python -m venv $(OLDEST)
	@$(BIN)/python .ci/floors > $(OLDEST)/floors.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --constraint $(OLDEST)/floors.txt --editable '.[dev]' httpx
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON); do \
	    command -v "$$python" >/dev/null || continue; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; \
	        exit 1; \
	    fi; \
	    exec "$$python" -m venv $(VENV); \
	done; \
	echo "Python 3.11 or newer is needed (looked for: $(PYTHON))" >&2; exit 1

.PHONY: help demo test browser-test check check-oldest format bench wheel clean
