# On a fresh clone these do all they need: make install | demo | test | docs | readme | lock | clean.
# bench, run-notebooks and pipeline also need real images (eq data list says which are here).
# EQ_PYTHON=/path/to/python chooses the interpreter for .venv; otherwise the first Python >= 3.11 found below is taken.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export NO_ALBUMENTATIONS_UPDATE := 1
export PYTHONWARNINGS ?= ignore::SyntaxWarning

.PHONY: help install demo test docs bench run-notebooks pipeline execute readme lock clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

install: $(STAMP)  ## Create .venv with the exact set of requirements.lock and this checkout in it

$(STAMP): requirements.lock settings.ini setup.py tools/install.sh
	@tools/install.sh $(VENV)
	@touch $@

demo: $(STAMP)  ## Train on synthetic images, predict unseen animals, tell a treatment effect in an HTML report (8 minutes on 2 cores)
	@$(BIN)/eq demo $(ARGS)

test: $(STAMP)  ## Notebooks, export, layers, style, types, docs and tests with coverage; says where the time goes
	@$(BIN)/python tools/check.py $(ARGS)

docs: $(STAMP)  ## Render the site into _docs (Quarto where present, else nbconvert)
	@$(BIN)/python tools/build_docs.py $(ARGS)

include benchmarks/peers.mk  # the peers' own environment

bench: $(STAMP) peers  ## Every benchmark, side by side with its peers; results in benchmarks/results (hours)
	@$(BIN)/eq bench all $(ARGS)

run-notebooks: $(STAMP)  ## The five parameterised notebooks of nbs/runs with their defaults
	@for n in mitochondria glomeruli endotheliosis kidney_ct anomaly; do $(BIN)/eq run $$n $(ARGS); done

pipeline: $(STAMP)  ## The stages of the kidney CT classifier that something changed for (dvc.yaml)
	@PATH="$(CURDIR)/$(BIN):$$PATH" DVC_NO_ANALYTICS=1 dvc repro $(ARGS)

execute: $(STAMP)  ## Run all notebooks, or those whose names hold one of ARGS, and store what they show
	@$(BIN)/python tools/execute_notebooks.py $(ARGS)

readme: $(STAMP)  ## Write README.md from nbs/index.ipynb
	@$(BIN)/python tools/build_readme.py

lock: $(STAMP)  ## Resolve settings.ini again, for every extra, Python and platform, into requirements.lock
	@$(BIN)/uv pip compile --quiet --refresh-package eq --upgrade --universal --python-version 3.11 --all-extras --no-header setup.py -o requirements.lock.new
	@{ echo "# The exact set tested. Made by: make lock (uv pip compile --universal --all-extras setup.py)"; cat requirements.lock.new; } > requirements.lock
	@rm requirements.lock.new

clean:  ## Remove docs, builds and caches; environments, outputs and results stay
	@rm -rf _docs _proc build dist .coverage .coverage.* .hypothesis .pytest_cache .ruff_cache .import_linter_cache
