# Five commands, each of which first makes sure that .venv holds what pyproject.toml and constraints.txt say.
#
#   make serve                      the agent on http://127.0.0.1:8080, its data in .ratchet/
#   make serve ARGS="--port 9000 --data /tmp/elsewhere"
#   make test                       what continuous integration runs (ARGS go to pytest)
#   make faults                     the full counts of the faults that `make test` tries a few times (ARGS="-k kill")
#   make lint                       ruff, without changing a file (`make format` changes them)
#   make check                      lint, then test

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install serve test faults lint format check clean

PYTHON ?= python3.11
VENV   ?= .venv
ARGS   ?=
# vLLM comes in two builds of one version: with a GPU that answers, the GPU's; else the CPU's.
EXTRA  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP  := $(VENV)/.installed-$(EXTRA)
BIN    := $(VENV)/bin
LOG    := $(VENV)/install.log

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

serve: $(STAMP)
	@exec $(BIN)/python serve.py serve $(ARGS)

test: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest -m slow tests/faults $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: lint test

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "==> 1/3 $(VENV): $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> 2/3 installing pinned packages with the '$(EXTRA)' engine (2-4 minutes; log: $(LOG))"
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),test]' 2>&1 \
	    | tee $(LOG) | sed -u -n -E -e 's/^ *(Collecting|Building wheel for) ([^ ]{0,60}).*/    \1 \2/p' -e '/^ERROR/p' \
	        -e 's/^Installing collected packages.*/    Installing them all (a minute or two)/p' \
	    || { echo; tail -n 5 $(LOG); \
	         if grep -Eq '(ERROR|No matching).*torch|depends on torch==2\.13\.0\+cpu' $(LOG); then \
	             echo; echo "pip found no torch 2.13.0+cpu. Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index"; \
	             echo "(its address stands on PyTorch's \"Get Started\" page, platform CPU) and run make again."; fi; exit 1; }
	@echo "==> 3/3 removing what a text-only engine does not need"
	@test $(EXTRA) = gpu || $(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@rm -f $(VENV)/.installed-*; touch $(STAMP)
	@echo "==> ready"
