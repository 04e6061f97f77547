# `make demo` and `make test` need nothing but Python 3.10+ with venv, and a package index.
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test bench docs format clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/edge-slm demo

test: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pytest

bench: $(VENV)/.installed-dev
	$(VENV)/bin/pytest bench/benchmarks --benchmark-columns=median,iqr,rounds

docs: $(VENV)/.installed-dev
	$(VENV)/bin/python docs/render_cli.py

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make the second call quick; a changed dependency installs again.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[convert,ctranslate2,bench]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.installed-demo
