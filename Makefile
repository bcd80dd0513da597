# make demo     distil a small student on handwritten digits (a minute or two on two CPU cores)
# make test     lint, types, every test
# make unit     the quick tests only
# make install  .venv with everything that the other targets need; they run it first
# make test EXTRAS=test,ffcv,dali   with FFCV and NVIDIA DALI, too (`fastofa doctor` says what FFCV needs)

PYTHON ?= python3
EXTRAS ?= test
BIN := .venv/bin
# One worker more than cores, since tests with several processes wait a third of the time.
PYTEST := $(BIN)/pytest -n $(shell expr $$(nproc) + 1) --dist worksteal

.PHONY: help install demo test unit lint format clean

help:
	@sed -n 's/^# make/make/p' Makefile

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastofa needs Python >= 3.10 with venv (Debian: apt-get install python3-venv), or: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: install
	$(BIN)/fastofa demo

test: lint
	$(PYTEST)

unit: install
	$(PYTEST) -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist *.egg-info
