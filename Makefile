# Every target sets up .venv by itself, on any machine with Python 3.10 or newer.
#
#   make demo     the embedded model on held-out pictures: classify, caption, ask, search
#   make test     the whole test suite             make test ARGS="tests/kernels -x" JOBS=1
#   make bench    every operator against its rivals on this machine
#   make lint     ruff and mypy
#   make clean    removes build products; `make distclean` removes .venv too
#
#   PYTHON=python3.12     the interpreter for .venv
#   JOBS=4                processes of make test; unset, as many as there are cores
#   INTERNVL_CUDA=1 or 0  insists on the CUDA kernels or leaves them out (minutes of nvcc); else
#                         they are built where there are both an NVIDIA GPU and nvcc
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint clean distclean

NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
            $$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)
export INTERNVL_CUDA ?= $(if $(wildcard /dev/nvidiactl),auto,0)

BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
JOBS ?= auto

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

# Editable, so that the sources under test are the ones in this folder; again only after a change
# to what is compiled or required.
$(READY): pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc -type f)
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.10 or newer with its venv module \
	(Debian: apt install python3-venv), or PYTHON=/path/to/one" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "== creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "== installing internvl_engine and its tools into .venv (native kernels are compiled)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

demo: $(READY)
	$(BIN)/internvl demo $(ARGS)

test: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

bench: $(READY)
	$(BIN)/internvl bench kernels $(ARGS)

# mypy does not follow the import hook of an editable install: it reads the packages from
# build/typed, where they lie as they are installed.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typed && mkdir -p build/typed/internvl_engine
	@ln -s $(addprefix $(CURDIR)/,$(wildcard internvl_engine/*) kernels benchmarks) \
	  build/typed/internvl_engine/
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info internvl_engine/_native*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(READY)

distclean: clean
	rm -rf .venv
