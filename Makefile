# The only commands that people and CI call. Everything lands in .venv, which the first target that needs it makes.
#
#   make test PYTHON=python3.12        another interpreter for .venv
#
# A stamp is written only after its install has succeeded, so a broken download is tried again by the next call.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

MADE     := $(VENV)/.stamp-made
LIGHT    := $(VENV)/.stamp-light
FULL     := $(VENV)/.stamp-full
PACKAGE  := pyproject.toml constraints.txt scm_runtime/_version.py
EXTRAS   := cpu,export,hub,example,test,dev

DEMO     := demo/digits.png
LABELS   := 0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9
BENCHES  := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pips must not fill one .venv at a time
.PHONY: help demo test lint types bench format dist constraints clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

demo: $(LIGHT) ## draw twenty digits with the embedded model; installs no torch
	@mkdir -p $(dir $(DEMO))
	$(BIN)/scm-runtime generate digits --labels $(LABELS) --seed 1460 --columns 10 -o $(DEMO)
	@echo "The digits are in $(CURDIR)/$(DEMO)"

test: $(FULL) ## run the tests (ARGS="-k noise" to choose)
	$(BIN)/python -m pytest $(ARGS)

lint: $(FULL) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(FULL) ## mypy --strict
	$(BIN)/mypy --strict

bench: $(FULL) ## run every script in benchmarks/
	@set -e; for script in $(BENCHES); do echo "== $$script"; $(BIN)/python "$$script"; done

format: $(FULL) ## put the code into ruff's format and mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

dist: $(FULL) ## build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

# Only torch keeps its pin: a newer one is chosen by hand, there and here. A local version (+cpu) says which build was at
# hand, not which is needed.
constraints: ## resolve all extras afresh and rewrite constraints.txt
	@$(CHECK_PYTHON)
	rm -rf build/constraints
	mkdir -p build/constraints
	$(PYTHON) -m venv build/constraints/venv
	grep '^torch==' constraints.txt > build/constraints/pins.txt
	build/constraints/venv/bin/python -m pip --disable-pip-version-check --quiet install -c build/constraints/pins.txt -e '.[$(EXTRAS)]' setuptools
	build/constraints/venv/bin/python -m pip freeze --all --exclude-editable --exclude pip > build/constraints/frozen.txt
	sed '/^[^#]/,$$d' constraints.txt > build/constraints/new.txt
	sed 's/+[a-z0-9.]*$$//' build/constraints/frozen.txt >> build/constraints/new.txt
	mv build/constraints/new.txt constraints.txt
	rm -rf build/constraints

clean: ## remove what was built or drawn; .venv stays
	rm -rf build dist demo .mypy_cache .ruff_cache .pytest_cache
	find scm_runtime export tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# -- The virtual environment ------------------------------------------------------------------------------------------

CHECK_PYTHON = command -v $(PYTHON) > /dev/null \
	|| { echo "scm-runtime needs Python 3.11 or newer, and $(PYTHON) was not found. Name another: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("scm-runtime needs Python 3.11 or newer, and $(PYTHON) is %d.%d.%d. \
	Name another: make PYTHON=python3.12" % sys.version_info[:3])'

$(MADE):
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(LIGHT): $(MADE) $(PACKAGE)
	$(PIP) install -c constraints.txt -e '.[cpu]'
	@touch $@

$(FULL): $(MADE) $(PACKAGE)
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(LIGHT) $@
