# make demo   set up and run the whole workflow on a small real model      make test   set up and run the tests
# make lint   all static checks                                            make help   every target
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || echo 2)
BIN := .venv/bin
STAMP := .venv/installed
SHELL := /bin/bash

# Jobs of one thread side by side are done sooner than one after the other with all cores; four fit into 16 GB. What is
# timed has the machine to itself.
UNTIMED := importance corpus_orders length_orders calibrate pool train adapt evaluate solve trace rouge score \
  predictor budget_eval evaluate_auto evaluate_whole solve_auto
SHARE = --resources mem_mb=16000 --set-threads $(UNTIMED:%=%=1) latency=$(CORES) breakdown=$(CORES)

.PHONY: help setup demo test lint format docs constraints clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## .venv with the pinned packages of envs/constraints.txt

$(STAMP): pyproject.toml envs/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/constraints.txt \
	  --editable '.[workflow,test,lint]' 2> .venv/install.log || \
	  { grep -v WARNING .venv/install.log | tail -n 15; \
	    echo "make: the install stopped half-way. Check network and disk, then run make again: it goes on where it stopped."; \
	    echo "make: if it keeps failing, remove .venv first (rm -rf .venv). The whole log: .venv/install.log"; exit 1; }
	@touch $@

demo: setup ## the whole workflow on SmolLM2-135M with the embedded data: tables and figures in results/demo
	@$(BIN)/snakemake --cores $(CORES) --configfile workflow/demo.yaml --rerun-incomplete --quiet rules host reason $(SHARE)
	@$(BIN)/buddy report --study demo --summary

# The first are many and small, a process per core; the others run a whole workflow each, which takes all cores.
test: setup ## all tests (those with Slurm where it is installed); PYTEST="tests/unit -k route" for some
ifdef PYTEST
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)
else
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile tests/unit tests/workflow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/end_to_end tests/slurm
endif

lint: setup ## ruff, import-linter, snakefmt, snakemake --lint, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/snakemake --lint
	$(BIN)/snakemake --lint --configfile workflow/demo.yaml

format: setup ## write the format that lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

docs: setup ## regenerate the schema and the configuration reference from the code
	$(BIN)/buddy config --schema > workflow/schemas/config.schema.json
	$(BIN)/buddy config --docs > docs/configuration.md

constraints: setup ## write envs/constraints.txt from the versions now in .venv
	{ sed -n '/^#/p' envs/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//; s/ @ .*//'; } > .venv/constraints.txt
	mv .venv/constraints.txt envs/constraints.txt

clean: ## remove the environment and what tools cache (results stay)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
