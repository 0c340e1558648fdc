# Every target sets up what it needs; a second call does not install again.
PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python
STAMP := .venv/.installed
USABLE := import sys, pip; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup mnist federation test lint bench learning

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Options: PYTHON=python3.12 picks the interpreter, ARGS='rounds=3' goes to the run or to pytest."

setup: $(STAMP) ## create .venv and install FedIPFS with its tested dependencies
	@echo "Ready: .venv/bin/fedipfs"

mnist: $(STAMP) ## train MNIST over ten clients
	@$(PY) -m fedipfs.server +experiment=mnist $(ARGS)

federation: $(STAMP) ## three organizations with everything of their own, on this machine
	@$(PY) tests/support/federation.py $(ARGS)

test: $(STAMP) ## run the whole test suite
	@$(PY) -m pytest $(ARGS)

lint: $(STAMP) ## ruff (rules and format), then mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

LEARNING := $(patsubst %,benchmarks/%.py,compression mcmahan niid robust)
run_all = failed=; for file in $(1); do \
	  echo "== $$file"; $(PY) $$file $(ARGS) || failed="$$failed $$file"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

bench: $(STAMP) ## run every benchmark of speed and size in turn
	@$(call run_all,$(filter-out $(LEARNING),$(wildcard benchmarks/[a-z]*.py)))

learning: $(STAMP) ## run what takes an hour: accuracy of strategies, codecs, robust rules
	@$(call run_all,$(LEARNING))

# The stamp is removed first and written last, so an install that broke off is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "FedIPFS needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make PYTHON=python3.11 ..." >&2; \
	  exit 1; }
	@rm -f $@
	@echo "Installing into .venv (a few minutes the first time) ..."
	@$(PY) -c '$(USABLE)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
