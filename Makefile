# make            lists the targets, what each takes, and what that means
# make train      sets up .venv from the lock file, then trains on the embedded corpus
# make train CORPUS=ptb PRESET=small SEED=1 ARGS='-p steps 500'     with variables; one that a target cannot use is an error

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

#: CORPUS       text: grammar (which is here), ptb, dailydialog, movie-reviews, or a file, one sentence a line
#: DATASET      pictures: shapes (which need no data), cifar10, celeba, lsun_church, or a folder or zip
#: PRESET       quick, small or paper; toy2d: small or quick
#: OBJECTIVE    consistent or published; digits, images: robust as well
#: SYSTEM       the system, such as vae; digits, images, table: several, such as "ldebm ddpm"
#: SEED         the seed, 0
#: SEEDS        several of them: "0 1 2", which table takes by itself
#: SETTINGS     any other settings, such as "d=32 w_kl=.5"
#: NAME         name of the folder under runs/
#: RUN          the folder itself: of the run; of table and tune, of all their runs
#: ARGS         further parameters of the notebook, such as "-p steps 500"
#: BUDGET       time to work on what is pending: 90s, 25m or 2h; without it pending lists
#: TABLE_ARGS   further options of python -m ldebm.table, such as "--workers 2 --retry"
#: PENDING_ARGS further options of python -m ldebm.pending, such as "--workers 2 --retry"
#: BENCH_ARGS   options of bench/bench.py, such as "--only chain step"
#: NBDEV_ARGS   options of nbdev_test, such as "--path nbs/00_core.ipynb"
#: PYTEST_ARGS  options of pytest, such as "tests/test_data.py" (test, test-slow)
#: PORT         port of the site, 8000
#: AXE          axe.min.js, of the wheel axe-playwright-python (look)
#: LOOK_ARGS    options of tests/look_at_site.py, such as "--shots folder index results"
#: LAB_ARGS     options of JupyterLab, such as "--no-browser --port 8889"
#: VENV         folder of the environment, .venv
#: NO_VENV      1: the environment that is active instead
#: PYTHON       the Python that makes the environment
#: PIP_ARGS     options of pip
CORPUS    ?= grammar
DATASET   ?= shapes
PRESET    ?= quick
OBJECTIVE ?= consistent
SYSTEM    ?= ldebm
SEED      ?= 0
PORT      ?= 8000
VENV      ?= .venv
# Not from the environment, where WSL keeps the name of the machine
NAME       =

TAKES.train      := CORPUS PRESET OBJECTIVE SYSTEM SEED SETTINGS NAME RUN ARGS
TAKES.toy2d      := PRESET SEED NAME RUN ARGS
TAKES.digits     := PRESET OBJECTIVE SYSTEM SEED SETTINGS NAME RUN ARGS
TAKES.images     := DATASET $(TAKES.digits)
TAKES.table      := CORPUS PRESET OBJECTIVE SYSTEM SEED SEEDS SETTINGS NAME RUN TABLE_ARGS
TAKES.tune       := CORPUS PRESET SEED SEEDS SETTINGS NAME RUN TABLE_ARGS
TAKES.pending    := BUDGET PENDING_ARGS
TAKES.bench      := BENCH_ARGS
TAKES.test       := NBDEV_ARGS PYTEST_ARGS
TAKES.test-slow  := PYTEST_ARGS
TAKES.docs-serve := PORT
TAKES.look       := AXE LOOK_ARGS
TAKES.lab        := LAB_ARGS
ALL_TAKE := VENV NO_VENV PYTHON PIP_ARGS
# Not listed: what else may stand behind `make`; LDEBM_* reaches the package through the environment
UNLISTED := LDEBM THREADS WORKERS OMP_NUM_THREADS SHELL MAKE% LDEBM_%

TARGETS := help venv train toy2d digits images test test-slow table tune pending bench docs docs-serve look lab lint prepare clean distclean
.PHONY: $(TARGETS) .environment
# A target that there is not
.DEFAULT:
	@$(or $(PYTHON),python3) -c 'import sys, difflib; o = difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1); \
	  print("there is no target " + sys.argv[1] + (": did you mean " + o[0] + "?" if o else ";"), "`make` lists all")' $(call q,$@) $(TARGETS) >&2; exit 2

# The first Python of a supported version that really runs (a version manager's stub may not) and can make environments
CHECK := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
  if $$p -c '$(CHECK)' >/dev/null 2>&1; then echo $$p; break; fi; done)
endif

# -- What was given, and whether it is of use
RUNS   := train toy2d digits images table tune pending bench
TAKERS := $(RUNS) test test-slow docs-serve look lab
JOB    := $(sort $(foreach t,$(RUNS),$(TAKES.$(t))))
LISTED := $(sort $(foreach t,$(TAKERS),$(TAKES.$(t)))) $(ALL_TAKE)
from    = $(filter $(1),$(firstword $(origin $(2))))
TYPED  := $(foreach v,$(.VARIABLES),$(if $(call from,command,$(v)),$(v)))
GIVEN  := $(foreach v,$(JOB) VENV,$(if $(call from,command environment,$(v)),$(if $(value $(v)),$(v))))
GOALS  := $(or $(MAKECMDGOALS),help)
LOST   := $(filter-out $(ALL_TAKE) $(foreach g,$(GOALS),$(TAKES.$(g))),$(filter $(LISTED),$(TYPED)) $(if $(filter $(RUNS),$(GOALS)),$(GIVEN)))
# Old names of variables, and those given
RENAMED.ROW := SYSTEM
OLD    := $(foreach v,ROW,$(if $(or $(call from,command,$(v)),$(and $(filter $(RUNS),$(GOALS)),$(call from,environment,$(v)))),$(v)))
NEAR   := import sys, difflib; o = difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0.65); \
  print("did you mean " + o[0] + "?" if o else "settings are given as SETTINGS=\"" + sys.argv[1].lower() + "=...\", and what is meant for the environment stands before `make`")
q       = '$(subst ','\'',$(1))'
ifeq ($(MAKELEVEL),0)
$(foreach v,$(OLD),$(error there is no variable $(v): $(v) is now $(RENAMED.$(v))))
$(foreach v,$(filter-out $(LISTED) $(UNLISTED),$(TYPED)),$(error there is no variable $(v): $(shell $(or $(PYTHON),python3) -c '$(NEAR)' $(call q,$(v)) $(LISTED))))
endif
USERS   = $(strip $(foreach t,$(TAKERS),$(if $(filter $(1),$(TAKES.$(t))),$(t))))
$(if $(LOST),$(error `make $(GOALS)` cannot use$(foreach v,$(sort $(LOST)), $(v) (which is for $(call USERS,$(v))))$(if $(TAKES.$(firstword $(GOALS))),; it takes $(TAKES.$(firstword $(GOALS))))))
$(foreach p,NAME-RUN SEED-SEEDS,$(if $(filter 2,$(words $(filter $(subst -, ,$(p)),$(GIVEN)))),$(error give one of $(subst -, and ,$(p)), not both)))

# What is given is taken as it stands: a dollar is a dollar (on the command line two are one, as make has it)
plain   = $(if $(call from,command,$(1)),$(subst $$$$,$$,$(value $(1))),$(value $(1)))
$(foreach v,$(GIVEN) $(filter LDEBM_%,$(TYPED)),$(eval override $(v) := $$(call plain,$(v))))
$(foreach v,$(filter LDEBM_%,$(TYPED)),$(eval export $(v)))
# A path as a shell would take it, and never an option
path    = $(subst <path>,,$(subst <path>-,./-,$(subst <path>~/,$(value HOME)/,<path>$(1))))

# -- Environment
# A script by its file: the first line of one holds no path with a space and a dollar
TOOL = python "$$(command -v $(1) || echo $(1))"
ifeq ($(NO_VENV),)
ENV := $(call path,$(VENV))
BIN := $(if $(filter /%,$(firstword $(ENV))),,$(CURDIR)/)$(ENV)/bin
TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
LOCK := requirements/lock-$(TAG).txt
HASH := $(shell cat $(LOCK) settings.ini setup.py 2>/dev/null | cksum | cut -d' ' -f1)
STAMP := $(ENV)/.installed-$(HASH)
READY := $(shell [ -f $(call q,$(STAMP)) ] || echo .environment)
export PATH := $(BIN):$(value PATH)
export PYTHONNOUSERSITE := 1
export JUPYTER_PREFER_ENV_PATH := 1
endif

THREADS := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
export OMP_NUM_THREADS ?= $(THREADS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
LDEBM = python -m ldebm.command


help: ## Show this list
	@takes() { $(foreach t,$(TAKERS),[ $$1 != $(t) ] || echo "$(TAKES.$(t))";) }; \
	grep -hE '^[a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /|/' | while IFS='|' read -r t d; do \
	  printf '  make %-11s %s\n' "$$t" "$$d"; [ -z "$$(takes $$t)" ] || printf '       %-11s   %s\n' '' "$$(takes $$t)"; done
	@echo; sed -n 's/^#:/ /p' $(firstword $(MAKEFILE_LIST))

venv: $(READY) ## Make .venv from the lock file of this Python

# pip compiles one file after another, tests as well; some packages hold files that no Python compiles
COMPILE := python -m compileall -q -j 0 -x '/tests?/'
# `pip install -e .` writes into the checkout, and takes a dollar in its path for a variable: a .pth file, the metadata and a script do the same
POINT := import os, sysconfig, subprocess, sys; lib = sysconfig.get_path("purelib"); open(lib + "/ldebm.pth", "w").write(os.getcwd()); \
  sys.exit(subprocess.call([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", lib]))
# What pip does goes into the log; a terminal is told how far it is
TELL := n=0; while IFS= read -r line; do printf '%s\n' "$$line"; case "$$line" in \
  Collecting*|Processing*) n=$$((n + 1)); said="$$n of $$all packages";; Installing*) said="unpacking them: the longest part";; *) continue;; esac; \
  if [ -t 3 ]; then printf '\r\033[2K  %s' "$$said" >&3; fi; done
.environment:
	@env=$(call q,$(ENV)); log="$$env/install.log"; \
	if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(CHECK)' 2>/dev/null; then \
	  echo "No usable Python $(PYTHON): ldebm needs Python 3.10, 3.11, 3.12 or 3.13 with venv. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	if [ ! -f $(LOCK) ]; then echo "$(LOCK) is missing: this checkout has no lock file for that Python" >&2; exit 1; fi; \
	if [ -f "$$env/pyvenv.cfg" ] && ! "$$env/bin/python" -c "import sys; sys.exit('py%d%d' % sys.version_info[:2] != '$(TAG)')" 2>/dev/null; then \
	  echo "$$env is of another Python version: making it anew"; rm -rf -- "$$env"; fi; \
	all=$$(grep -c == $(LOCK) || true); exec 3>&2; \
	echo "Installing $$all packages of $(LOCK) into $$env with $$($(PYTHON) --version): once, a few minutes"; \
	$(PYTHON) -m venv -- "$$env" || { echo "$$env cannot be made: name another folder, make VENV=/path/to/folder ..., or with NO_VENV=1 use the environment that is active" >&2; exit 1; }; \
	rm -f -- "$$env"/.installed-*; \
	if { python -m pip install --no-compile --progress-bar off $(PIP_ARGS) -r $(LOCK) | { $(TELL); } && \
	  { [ ! -t 3 ] || printf '\r\033[2K  compiling them' >&3; } && \
	  { $(COMPILE) -- "$$env/lib" || true; } && python -c '$(POINT)' && printf '%s\n' '#!/bin/sh' 'exec "$${0%/*}/python" -m ldebm.command "$$@"' > "$$env/bin/ldebm" && chmod +x "$$env/bin/ldebm" && \
	  python -m ipykernel install --sys-prefix --name python3; } > "$$log" 2>&1; \
	then touch -- $(call q,$(STAMP)); [ ! -t 3 ] || printf '\r\033[2K' >&3; echo "Ready: $$env"; \
	else echo >&2; tail -n 15 -- "$$log" >&2; echo "Installation failed; the whole log is $$log. Behind a proxy or mirror set pip's own settings, or PIP_ARGS." >&2; exit 1; fi

# -- Runs
# The last part of a path without its ending, with dashes for spaces
EMPTY :=
stem   = $(basename $(notdir $(patsubst %/,%,$(subst $(EMPTY) $(EMPTY),-,$(1)))))
each   = $(foreach w,$(1),$(call q,$(w)))
ask    = $(if $(filter $(1),$(GIVEN)),$(2))
folder = $(call path,$(or $(RUN),runs/$(or $(NAME),$(1))))
seeds  = $(or $(call ask,SEEDS,$(SEEDS)),$(call ask,SEED,$(SEED)),$(1))

# $(call execute,job,folder,parameters)
define execute
@LDEBM_MAKE=1 $(LDEBM) train $(1) --out=$(call q,$(2)) $(3) $(ARGS)
endef

TRAIN := $(call folder,$(SYSTEM)-$(call stem,$(CORPUS))-$(PRESET)-$(OBJECTIVE)-s$(SEED))
train: $(READY) ## Train on text and write a run folder
	$(call execute,ptb,$(TRAIN),-p corpus $(call q,$(call path,$(CORPUS))) -p preset $(call q,$(PRESET)) -p seed $(call q,$(SEED)) -p objective $(call q,$(OBJECTIVE)) -p system $(call q,$(SYSTEM)) -p settings $(call q,$(SETTINGS)))

TOY := $(call folder,toy2d$(call ask,PRESET,-$(PRESET))-s$(SEED))
toy2d: $(READY) ## Two-dimensional densities: the method beside its ancestors
	$(call execute,toy2d,$(TOY),-p seed $(call q,$(SEED)) $(call ask,PRESET,-p preset $(call q,$(PRESET))))

PICTURES = -p preset $(call q,$(PRESET)) -p seed $(call q,$(SEED)) -p objective $(call q,$(OBJECTIVE)) $(call ask,SYSTEM,-p systems $(call q,$(SYSTEM))) -p settings $(call q,$(SETTINGS))
pictures = $(call folder,$(1)-$(PRESET)-$(OBJECTIVE)-s$(SEED))

digits: $(READY) ## Hierarchical prior on 8x8 digits: generator, energies, samples, outliers, control
	$(call execute,digits,$(call pictures,digits),$(PICTURES))

images: $(READY) ## The same on pictures: DATASET=shapes, cifar10, celeba, lsun_church or a folder or zip
	$(call execute,images,$(call pictures,$(call stem,$(DATASET))),-p dataset $(call q,$(call path,$(DATASET))) $(PICTURES))

# Processes that share the tests, each of which takes about a gigabyte
# Most tests wait for processes of their own: twice as many at once as there are processors, at most eight
WORKERS := $(shell [ $(THREADS) -lt 4 ] && echo $$((2 * $(THREADS))) || echo 8)

PYTEST = OMP_NUM_THREADS=1 python -m pytest -q

test: $(READY) ## Run every notebook, then the tests but the slow ones
	@echo "Notebooks:"
	@OMP_NUM_THREADS=1 $(call TOOL,nbdev_test) --n_workers $(THREADS) $(if $(value LDEBM_DATA),--flags data) $(NBDEV_ARGS)
	@echo "Tests:"
	@$(PYTEST) -m "not slow" $(or $(PYTEST_ARGS),-n $(WORKERS) --dist worksteal)

test-slow: $(READY) ## Run the slow tests
	@$(PYTEST) -m slow $(or $(PYTEST_ARGS),-n $(WORKERS) --dist worksteal)

TABLE = LDEBM_MAKE=1 python -m ldebm.table --corpus=$(call q,$(call path,$(CORPUS))) --preset=$(call q,$(PRESET)) --settings=$(call q,$(SETTINGS)) $(if $(RUN)$(NAME),--out=$(call q,$(folder)))
table: $(READY) ## All sixteen systems on CORPUS, SEEDS="0 1 2", as many at once as fit, into results
	@$(TABLE) --objective=$(call q,$(OBJECTIVE)) --seeds $(call each,$(call seeds,0 1 2)) $(call ask,SYSTEM,--systems $(call each,$(SYSTEM))) $(TABLE_ARGS)

tune: $(READY) ## Every configuration of both objectives on validation sentences of CORPUS, into results/tuning
	@$(TABLE) --tune --seeds $(call each,$(call seeds,0)) $(TABLE_ARGS)

pending: $(READY) ## What the results page shows as pending; with BUDGET=25m, work on it for that long
	@LDEBM_MAKE=1 python -m ldebm.pending $(call ask,BUDGET,--budget=$(call q,$(BUDGET))) $(PENDING_ARGS)

bench: $(READY) ## Measure chains, training steps, samples and memory into results/bench (with a GPU, that as well)
	@python bench/bench.py $(BENCH_ARGS)

docs: $(READY) ## Build the documentation site into docs/_build/html
	@echo 'A minute or two, in silence where nothing is wrong ...'
	@python -c 'from ldebm.docs import build; print("Site:", build())'

docs-serve: docs ## Build the site and serve it on this machine
	@echo "http://127.0.0.1:$(PORT)  (Ctrl-C ends)"
	@python -m http.server $(PORT) --bind 127.0.0.1 --directory docs/_build/html

look: $(READY) ## Look at the built site in a headless Chromium: widths, colours, links; AXE=axe.min.js for accessibility
	@python tests/look_at_site.py $(if $(AXE),--axe $(call q,$(AXE))) $(LOOK_ARGS)

lab: $(READY) ## Open the notebooks in JupyterLab
	@$(call TOOL,jupyter) lab --notebook-dir=nbs --LabApp.default_url=/lab/tree/tour.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

# The package is written by nbdev: the notebooks are formatted
lint: $(READY) ## Check style, format and, on the pages of the method and the models, types
	@ruff check --no-cache nbs ldebm tests bench docs setup.py
	@ruff format --no-cache --check nbs tests bench docs setup.py
	@mypy --no-incremental

prepare: $(READY) ## Export the package, clean the notebooks, render the README
	@$(call TOOL,nbdev_export)
	@$(call TOOL,nbdev_clean)
	@python -c 'from ldebm.docs import write_readme; print(write_readme())'

clean: ## Remove caches and the built site (runs and .venv stay)
	@rm -rf docs/_build _proc _docs build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find ldebm tests nbs docs -name __pycache__ -type d -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	@env=$(call q,$(call path,$(VENV))); if [ -f "$$env/pyvenv.cfg" ]; then rm -rf -- "$$env"; fi
