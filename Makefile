# `make run` streams text from a real model; `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run side by side, a process for each processor. Bytecode is kept, for the processes that they start.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
# pip compiles on one processor, and everything: what is not compiled here, Python compiles when it is imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile --no-warn-conflicts --disable-pip-version-check -c constraints.txt
UNUSED := /tests?/|/testing/|/transformers/models/|/(_inductor|fontTools|matplotlib|mypyc?|networkx|openai|pip|setuptools)/
COMPILE := $(BIN)/python -m compileall -qq -x '$(UNUSED)'
KERNELS := $(BIN)/python -c "from kvgen.kernels.build import library; library()"
PROMPT_FILE ?= prompts/story.txt
INPUTS ?= 10000

.PHONY: run test test-all test-gpu bench fuzz lint clean

run: $(VENV)/.run
	@$(BIN)/kvgen generate --prompt-file $(PROMPT_FILE) --seed 3 --max-tokens 120 --stats

test: $(VENV)/.dev
	$(PYTEST)

test-all: $(VENV)/.dev
	$(PYTEST) -m "slow or not slow"

test-gpu: $(VENV)/.dev
	$(PYTEST) --device cuda $(patsubst %,tests/test_%.py,gpu cache parity families recurrent delta_net hybrids latent shared_keys)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/speed.py

fuzz: $(VENV)/.fuzz
	cd fuzz && ../$(BIN)/python fuzz.py --inputs $(INPUTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kvgen needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

# While pip installs what only tests need, another processor compiles what is there already, and the kernels.
$(VENV)/.dev: $(VENV)/.run
	{ $(COMPILE) $(VENV)/lib/python*/site-packages/*/; $(KERNELS); } 2>/dev/null & \
		$(PIP) -e ".[dev]"; ended=$$?; $(COMPILE) -j 0 $(VENV)/lib; wait; exit $$ended
	@touch $@

$(VENV)/.bench: $(VENV)/.dev benchmarks/requirements.txt
	$(PIP) -r benchmarks/requirements.txt
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	@touch $@
