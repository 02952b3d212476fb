# One command each. Every target makes .venv first where it is missing or older than what it is made from.
.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,faiss,eval
comma := ,
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Every test takes one thread, so two processes share the files among them; WORKERS=0 is one process.
WORKERS ?= 2
SHARED := --numprocesses $(WORKERS) --dist loadfile
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))

# Threads that wait sleep instead of spinning: on cores that are shared with other work spinning is many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-all lint format bench docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY) ## make .venv and install the pinned versions; needs Python 3.11 or newer, no compiler

# A name on PATH need not run (pyenv's shims), so every candidate is asked. PYTHON=/path/to/python chooses another.
$(READY): pyproject.toml constraints.txt
	@python=''; \
	for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
		if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			python=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'redi needs Python 3.11 or newer with its venv module; none was found on PATH.' >&2; \
		echo 'Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make setup PYTHON=/path/to/python3' >&2; \
		exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); \
	fi
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(READY) ## build, serve and compare on the bundled model; leaves demo/comparison.png and demo/report.json
	$(BIN)/redi demo

test: lint ## the checks before every commit; the last line is pytest's
	$(BIN)/pytest $(SHARED) -m 'not slow'

test-all: lint ## make test and the slow tests
	$(BIN)/pytest $(SHARED)

lint: $(READY) ## ruff, import-linter and pyright
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

format: $(READY) ## ruff's formatter and its safe fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY) ## model calls against quality on the bundled model, an hour or two; leaves bench/quality
	$(BIN)/python -m benchmarks.quality --json bench/quality/quality.json

$(VENV)/.ready-docs: $(READY)
	$(INSTALL) --editable '.[docs]'
	@touch $@

docs: $(VENV)/.ready-docs ## the documentation, into site/
	$(BIN)/mkdocs build --strict

clean: ## remove everything that is made but .venv
	rm -rf build dist site demo bench .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
