# make            lists the targets
# make train      sets up .venv from the lock file, then trains on the embedded corpus
# Everything below can be overridden: make train CORPUS=ptb PRESET=small SEED=1 ARGS='-p steps 500'

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

CORPUS    ?= grammar
PRESET    ?= quick
SEED      ?= 0
OBJECTIVE ?= consistent
ROW       ?= ldebm
ARGS      ?=
PORT      ?= 8000
VENV      ?= .venv
# NO_VENV=1 uses the environment that is active instead of making one
NO_VENV   ?=
# Extra arguments for pip, nbdev_test and pytest
PIP_ARGS    ?=
NBDEV_ARGS  ?=
PYTEST_ARGS ?=
# Settings of train, table and tune, seeds of table (the others take SEED), and options of `python -m ldebm.table`, such as '--rows vae dgm-vae --workers 2 --retry'
SEEDS      ?= 0 1 2
SETTINGS   ?=
TABLE_ARGS ?=
# Options of bench, such as '--only chain step' or '--threads 1'
BENCH_ARGS  ?=

# The first Python of a supported version that really runs (a version manager's stub may not) and can make environments
CHECK := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.11 python3.10; do \
  if $$p -c '$(CHECK)' >/dev/null 2>&1; then echo $$p; break; fi; done)
endif

ifeq ($(NO_VENV),)
BIN := $(abspath $(VENV))/bin/
TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
LOCK := requirements/lock-$(TAG).txt
HASH := $(shell cat $(LOCK) settings.ini setup.py 2>/dev/null | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(HASH)
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PYTHONNOUSERSITE := 1
export JUPYTER_PREFER_ENV_PATH := 1
else
STAMP :=
endif

THREADS := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
export OMP_NUM_THREADS ?= $(THREADS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

DATASET   ?= shapes
# The last part of a path without its ending, with dashes for spaces
EMPTY :=
stem = $(basename $(notdir $(subst $(EMPTY) $(EMPTY),-,$(1))))
IMAGE_RUN ?= runs/$(call stem,$(DATASET))-$(PRESET)-s$(SEED)
NAME ?= $(ROW)-$(call stem,$(CORPUS))-$(PRESET)-$(OBJECTIVE)-s$(SEED)
RUN  ?= runs/$(NAME)
PAPERMILL = papermill --cwd . --kernel python3 --log-output --no-progress-bar

.PHONY: help venv train toy2d digits images test table tune bench docs docs-serve lab lint prepare clean distclean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | while IFS='|' read -r t d; do printf '  make %-11s %s\n' "$$t" "$$d"; done
	@echo "  CORPUS=$(CORPUS) PRESET=$(PRESET) SEED=$(SEED) OBJECTIVE=$(OBJECTIVE) ROW=$(ROW) SETTINGS='d=32 w_kl=.5' ARGS='-p name value': settings of train (SEED, ARGS also of toy2d, digits, images)"

venv: $(STAMP) ## Make .venv from the lock file of this Python

ifeq ($(NO_VENV),)
$(STAMP):
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(CHECK)' 2>/dev/null; then \
	  echo "No usable Python $(PYTHON): ldebm needs Python 3.10, 3.11 or 3.12 with venv. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if [ ! -f $(LOCK) ]; then echo "$(LOCK) is missing: this checkout has no lock file for that Python" >&2; exit 1; fi
	@if [ -f $(VENV)/pyvenv.cfg ] && ! $(VENV)/bin/python -c "import sys; sys.exit('py%d%d' % sys.version_info[:2] != '$(TAG)')" 2>/dev/null; then \
	  echo "$(VENV) is of another Python version: making it anew"; rm -rf $(VENV); fi
	@echo "Installing $$(grep -c == $(LOCK)) packages of $(LOCK) into $(VENV) with $$($(PYTHON) --version): once, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@log=$(VENV)/install.log; : > $$log; \
	if { $(BIN)python -m pip install -q $(PIP_ARGS) -r $(LOCK) && $(BIN)python -m pip install -q --no-deps --no-build-isolation -e . \
	  && $(BIN)python -m ipykernel install --sys-prefix --name python3; } >> $$log 2>&1; \
	then touch $@; echo "Ready: $(VENV)"; \
	else tail -n 15 $$log >&2; echo "Installation failed; the whole log is $$log. Behind a proxy or mirror set pip's own settings, or PIP_ARGS." >&2; exit 1; fi
endif

# $(call execute,notebook,folder,parameters): the executed notebook appears once it is whole, so that a call that is refused leaves a finished one alone
define execute
@mkdir -p "$(2)"; now="$(2)/$(1).running.ipynb"; \
if $(PAPERMILL) nbs/$(1).ipynb "$$now" $(3); then mv "$$now" "$(2)/$(1).ipynb"; rm -f "$(2)/$(1).stopped.ipynb"; \
else [ ! -f "$$now" ] || mv "$$now" "$(2)/$(1).stopped.ipynb"; \
  echo "The run stopped; $(2)/$(1).stopped.ipynb shows where." >&2; \
  [ -z "$$(find "$(2)" -name checkpoint.safetensors -print -quit)" ] || echo "What had been trained there is kept: the command that trained it goes on from its checkpoint." >&2; exit 1; fi
endef

train: $(STAMP) ## Train on text and write a run folder
	$(call execute,train_ptb,$(RUN),-r corpus "$(CORPUS)" -r preset $(PRESET) -p seed $(SEED) -r objective $(OBJECTIVE) -r row $(ROW) -r out "$(RUN)" $(if $(SETTINGS),-r settings "$(SETTINGS)") $(ARGS))
	@echo; RUN="$(RUN)" python -c 'import os; from ldebm.text_job import scores; print(scores(os.environ["RUN"]))'
	@echo; echo "Done. Everything is in $(RUN):"; ls "$(RUN)"

toy2d: $(STAMP) ## Two-dimensional densities: the method beside its ancestors
	$(call execute,train_toy2d,runs/toy2d-s$(SEED),-p seed $(SEED) -r out runs/toy2d-s$(SEED) $(ARGS))
	@echo; echo "Done. Everything is in runs/toy2d-s$(SEED):"; ls runs/toy2d-s$(SEED)

digits: $(STAMP) ## Hierarchical prior on 8x8 digits: generator, energies, samples, outliers, control
	$(call execute,train_digits,runs/digits-s$(SEED),-p seed $(SEED) -r out runs/digits-s$(SEED) $(ARGS))
	@echo; echo "Done. Everything is in runs/digits-s$(SEED):"; ls runs/digits-s$(SEED)

# DATASET=shapes needs no data; cifar10, celeba, lsun_church or a path need theirs, and PRESET=small or paper
images: $(STAMP) ## The same on pictures: DATASET=shapes, cifar10, celeba, lsun_church or a folder or zip
	$(call execute,train_images,$(IMAGE_RUN),-r dataset "$(DATASET)" -r preset $(PRESET) -p seed $(SEED) -r out "$(IMAGE_RUN)" $(ARGS))
	@echo; echo "Done. Everything is in $(IMAGE_RUN):"; ls "$(IMAGE_RUN)"

# Processes that share the tests, each of which takes about a gigabyte
WORKERS := $(shell [ $(THREADS) -lt 8 ] && echo $(THREADS) || echo 8)

test: $(STAMP) ## Run every notebook, then the tests
	@echo "Notebooks:"
	@OMP_NUM_THREADS=1 nbdev_test --n_workers $(THREADS) $(if $(LDEBM_DATA),--flags data) $(NBDEV_ARGS)
	@echo "Tests:"
	@OMP_NUM_THREADS=1 python -m pytest -q $(or $(PYTEST_ARGS),-n $(WORKERS) --dist worksteal)

table: $(STAMP) ## All sixteen systems on CORPUS, SEEDS="0 1 2", as many at once as fit, into results
	@python -m ldebm.table --corpus "$(CORPUS)" --preset $(PRESET) --objective $(OBJECTIVE) --seeds $(SEEDS) --settings "$(SETTINGS)" $(TABLE_ARGS)

tune: $(STAMP) ## Every configuration of both objectives on validation sentences of CORPUS, into results/tuning
	@python -m ldebm.table --tune --corpus "$(CORPUS)" --preset $(PRESET) --seeds $(SEED) --settings "$(SETTINGS)" $(TABLE_ARGS)

bench: $(STAMP) ## Measure chains, training steps, samples and memory into results/bench-*.json (with a GPU, that as well)
	@python bench/bench.py $(BENCH_ARGS)

docs: $(STAMP) ## Build the documentation site into docs/_build/html
	@python -c 'from ldebm.docs import build; print("Site:", build())'

docs-serve: docs ## Build the site and serve it on this machine
	@echo "http://127.0.0.1:$(PORT)  (Ctrl-C ends)"
	@python -m http.server $(PORT) --bind 127.0.0.1 --directory docs/_build/html

lab: $(STAMP) ## Open the notebooks in JupyterLab
	@jupyter lab --notebook-dir=nbs

lint: $(STAMP) ## Undefined names and unused imports in the package
	@ruff check --select F821,F401 ldebm

prepare: $(STAMP) ## Export the package, clean the notebooks, render the README
	@nbdev_export
	@nbdev_clean
	@python -c 'from ldebm.docs import write_readme; print(write_readme())'

clean: ## Remove caches and the built site (runs and .venv stay)
	@rm -rf docs/_build _proc _docs build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find ldebm tests nbs docs -name __pycache__ -type d -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
