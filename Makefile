# make setup · demo · test · lint · gpu · interop. Each does its own set-up; nothing else is needed first.
#
#   PYTHON=python3.12   the interpreter that .venv is made from (3.11 or newer)
#   NO_VENV=1           use PYTHON as it is, with its own packages, and install nothing
#                       (GPT2_SYSTEM_PYTHON=1 is the same, for an environment variable)
#   ARGS="-k loader"    added to the command of test, gpu, interop and demo
#   OUT=DIR             where gpu puts its JSON
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint gpu interop
SHELL := bash

PYTHON ?= python3
ARGS ?=
OUT ?= benchmarks/results
WORKERS ?= 2

ifneq ($(filter 1,$(NO_VENV) $(GPT2_SYSTEM_PYTHON)),)
BIN :=
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
BIN := .venv/bin/
PY := .venv/bin/python
READY := .venv/.installed
endif

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv and install everything into it, in the versions tested together

# The stamp comes last, so a set-up that was cut short starts again and a finished one costs nothing.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, PyTorch included: this takes minutes, once."
	.venv/bin/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY) ## text to a trained, sampled GPT-2: about 3 minutes of training on the embedded corpus
	$(PY) -m gpt2 demo $(ARGS)

# One thread to a worker: more threads than cores make small tensors slower, not faster.
test: $(READY) ## every test but the interop ones; those marked gpu are skipped where there is none
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) -m "not interop" $(ARGS)

lint: $(READY) ## ruff, mypy and the import rows
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)lint-imports --no-logo

# A machine with a GPU often brings its own torch and no network: where .venv cannot be made, PYTHON is used as it is.
gpu: ## what needs a CUDA GPU: its tests and measurements; JSON into OUT
	@set -eu -o pipefail; py="$(PY)"; \
	if [ -n "$(READY)" ] && ! $(MAKE) --no-print-directory setup; then \
	    echo ".venv cannot be made: going on with $(PYTHON) and its own packages"; \
	    py="$(PYTHON)"; export PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"; \
	fi; \
	mkdir -p "$(OUT)"; \
	$$py -m gpt2 doctor; \
	$$py -m gpt2 doctor --json | tail -n 1 > "$(OUT)/gpu_doctor.json"; \
	code=0; $$py -m pytest -q -rs -m gpu $(ARGS) || code=$$?; \
	if $$py -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    PY="$$py" OUT="$$(cd "$(OUT)" && pwd)" benchmarks/gpu.sh || code=$$?; \
	else echo "no CUDA GPU here: nothing is measured"; fi; \
	exit $$code

interop: $(READY) ## heavy tests against other programs
	$(PY) -m pytest -q -m interop $(ARGS)
