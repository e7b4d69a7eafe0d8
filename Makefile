# Each target does its own set-up: the first run installs, later ones start at once.
# make quickstart | test | check | docs | parity | clean, on Python 3.11 or newer (make PYTHON=python3.13 test).

PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
# What `make test` runs: all of it, or the files named here.
TESTS ?=

# Nothing is compiled to bytecode ahead of use: that would be half of the time.
INSTALL = -m pip install -q --disable-pip-version-check --no-compile

.PHONY: quickstart test check docs parity clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.quickstart

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Always from nothing: a page that is new or gone changes the navigation of all others.
docs: $(VENV)/.installed-docs
	rm -rf site
	$(VENV)/bin/python -m sphinx -q -E -W --keep-going -c docs -d build/docs . site
	@echo "the site is site/index.html"

parity: $(PARITY_VENV)/.installed
	OMP_NUM_THREADS=1 $(PARITY_VENV)/bin/python -m pytest -n 2 --dist worksteal tests/parity

clean:
	rm -rf $(VENV) $(PARITY_VENV) site .pytest_cache .ruff_cache .hypothesis build *.egg-info

# $(call environment,folder,what pip installs): the folder and a stamp that says what is in it.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rlhf_jax needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not there'):" \
	    "name a newer one, as in: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setting up $(1): pip install -e '$(2)'"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(INSTALL) -e '$(2)'
	@touch $@
endef

$(VENV)/.installed: setup.py
	$(call environment,$(VENV),.)

$(VENV)/.installed-docs: setup.py
	$(call environment,$(VENV),.[docs])
	@touch $(VENV)/.installed

$(VENV)/.installed-test: setup.py
	$(call environment,$(VENV),.[test])
	@touch $(VENV)/.installed $(VENV)/.installed-docs

$(PARITY_VENV)/.installed: setup.py
	$(call environment,$(PARITY_VENV),.[parity])
