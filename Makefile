# `make demo` and `make test` need nothing but Python 3.10+ with venv, and a package index.
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test bench speed plain-install docs format clean

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

# The README's speed table: the reference model beside a random 98M one, in one interleaved run.
speed: $(VENV)/.installed-demo
	rm -rf runs/speed && mkdir -p runs/speed
	$(VENV)/bin/python -m edge_slm_converters.synthetic runs/speed/random-98m --like models/reference
	$(VENV)/bin/edge-slm convert models/reference runs/speed/reference-11m --accept
	$(VENV)/bin/edge-slm convert runs/speed/random-98m runs/speed/random-98m-bundle --accept
	$(VENV)/bin/python -m edge_slm_bench.speed runs/speed/reference-11m runs/speed/random-98m-bundle

plain-install:
	$(PYTHON) bench/plain_install.py

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
