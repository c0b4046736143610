# Every target sets up what it needs: a virtual environment in .venv with the package, editable, and its development tools.
#
#   make demo                      the embedded model through every method
#   make test PYTHON=python3.12    another interpreter for the environment (only when .venv is first made)
#   make test PYTEST_FLAGS=-x      more flags for pytest; BENCH_FLAGS likewise for the benchmarks

PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
# A process a core; threads of their own would get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8

# PyPI's torch for Linux is a CUDA build of several gigabytes. A machine without an NVIDIA GPU takes the CPU build of the same
# release instead. Where that index does not answer (a mirror, an offline wheel folder), pip's own configuration decides.
# `make CPU_INDEX= ...` skips it.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH     := $(shell sed -n 's/^torch==//p' constraints.txt)
ANSWERS   := import signal, urllib.request as r; signal.alarm(6); r.urlopen("$(CPU_INDEX)/torch/", timeout=3)

# The release of diffusers before the pinned one, in a folder whose path comes first, and the tests that touch diffusers (40 s of a core).
PREVIOUS       := 0.41.0
PREVIOUS_HOME  := $(CURDIR)/.venv/diffusers-$(PREVIOUS)
PREVIOUS_TESTS := $(addprefix tests/test_, $(addsuffix .py, architectures export loading lora plugins plugins_pipelines single_file timestep)) \
	tests/comfyui/test_names.py -k "not order_of_imports"

.PHONY: help demo test test-all test-previous lint bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

demo: $(STAMP)  ## quantize the embedded model with every method; a table, and a page with pictures
	$(BIN)/halfbyte demo

test: $(STAMP)  ## the quick tests
	$(PYTEST) $(PYTEST_FLAGS)

test-all: $(STAMP)  ## the slow tests too
	$(PYTEST) -m "slow or not slow" $(PYTEST_FLAGS)

test-previous: $(STAMP) $(PREVIOUS_HOME)  ## the tests that touch diffusers, with the release before the pinned one
	PYTHONPATH=$(PREVIOUS_HOME) $(BIN)/python -c 'import diffusers, sys; \
		sys.exit(None if diffusers.__version__ == "$(PREVIOUS)" else f"{diffusers.__version__} was imported, not $(PREVIOUS)")'
	PYTHONPATH=$(PREVIOUS_HOME) $(PYTEST) $(PREVIOUS_TESTS) $(PYTEST_FLAGS)

$(PREVIOUS_HOME): | $(STAMP)
	rm -rf $@.partial
	$(BIN)/pip install --no-deps --target $@.partial diffusers==$(PREVIOUS)
	mv $@.partial $@

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## every benchmark in bench/; BENCH_FLAGS=--smoke for a tiny run of each
	@for script in $(wildcard bench/*.py); do \
		echo "$$script $(BENCH_FLAGS)"; $(BIN)/python $$script $(BENCH_FLAGS) || exit 1; done

clean:  ## remove caches, outputs and the built engine (keeps .venv; the next target builds the engine again)
	rm -f $(STAMP)
	rm -rf build dist halfbyte-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or \
		sys.exit("halfbyte needs Python 3.10 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@if [ -n "$(CPU_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
		&& $(BIN)/python -c '$(ANSWERS)' 2>/dev/null; \
	then set -- "torch==$(TORCH)+cpu" --extra-index-url "$(CPU_INDEX)"; else set -- "torch==$(TORCH)"; fi; \
	echo "pip install $$*"; $(BIN)/pip install "$$@" -c constraints.txt
	$(BIN)/pip install -e '.[dev]' -c constraints.txt
	@touch $@
