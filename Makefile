# What each target does can be read off its lines and typed by hand; everything is installed into .venv.

VENV := .venv
# Succeeds under a Python that the packages run on.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first such Python on this machine that can make an environment.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip; $(FITS)' 2>/dev/null && echo $$p && break; done)
RUN := $(VENV)/bin/python
# uv reads no settings of pip: the package index that pip was told to use is passed on.
UV = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(RUN) -m pip config get global.index-url 2>/dev/null)}}"; \
	if [ -n "$$UV_DEFAULT_INDEX" ]; then export UV_DEFAULT_INDEX; else unset UV_DEFAULT_INDEX; fi; $(VENV)/bin/uv
# All that a lock file has, and nothing else: --no-deps. Compiled here, because where Python may not write bytecode
# (PYTHONDONTWRITEBYTECODE) every start would compile torch anew, which doubles its ten seconds.
INSTALL = $(UV) pip install --python $(RUN) --no-deps --require-hashes --compile-bytecode -r
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url pyproject.toml
# The workers share the cores out; one that has nothing left to do takes tests of another.
TESTS = $(RUN) -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal
# More arguments for the command: make train ARGS="trainer.max_epochs=1 seed=7"
ARGS ?=
# Where the full MNIST is or goes, for demo, results, bench, fidelity and recipes; by default where conf/ says, data/.
DATA ?=
DATA_DIR = $(if $(DATA),data.dir=$(DATA))

.PHONY: help base setup train demo test test-all check docs results peers bench fidelity recipes soak soak-server fuzz sanitize lock
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

base:  ## make .venv with the package and what training needs, as requirements.lock has it; compile the C
	@$(RUN) -c '' 2>/dev/null || $(PYTHON) -c 'import ensurepip; $(FITS)' 2>/dev/null || { \
		echo "Python 3.11, 3.12 or 3.13 with its venv module is needed, and this is none: '$(PYTHON)'. Install one"; \
		echo "(on Debian: apt install python3 python3-venv) or name it: make base PYTHON=/path/to/python3"; exit 1; }
	@$(RUN) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -c '$(FITS)' || \
		{ echo "$(VENV) was made with a Python that the packages do not run on: delete it and try again"; exit 1; }
	@$(RUN) -c 'import pip' 2>/dev/null || $(RUN) -m ensurepip
	@test -x $(VENV)/bin/uv || { sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt && \
		$(RUN) -m pip install --quiet --require-hashes -r $(VENV)/uv.txt; }
	@$(INSTALL) requirements.lock
	@$(RUN) -P -c 'import importlib.metadata as m; m.version("mnist_lit")' 2>/dev/null || \
		$(UV) pip install --quiet --python $(RUN) --no-deps --no-build-isolation -e .
	@$(RUN) -m mnist_lit.kernels.library || \
		$(RUN) -W ignore -c 'import setuptools; setuptools.setup()' --quiet build_ext --inplace

setup: base  ## add everything else: the other verbs, launchers, tests (requirements-dev.lock)
	@$(INSTALL) requirements-dev.lock

train: base  ## run the tutorial to its end (DATA=FOLDER: where MNIST is, or goes)
	$(RUN) -m mnist_lit.train $(DATA_DIR) $(ARGS)

demo: setup  ## draw a digit: serve the newest trained model, or train one for 1,000 steps first
	@$(RUN) -c "from mnist_lit.cli.latest import resolve; resolve('latest')" 2>/dev/null || \
		$(RUN) -m mnist_lit.train optimizer=adam trainer.max_steps=1000 trainer.max_epochs=-1 $(DATA_DIR)
	$(RUN) -m mnist_lit.serve open_browser=true $(ARGS)

test: setup  ## run the tests that need no more than the package; MNIST_LIT_DATA=FOLDER lets them use the full MNIST
	$(TESTS) -m "not slow and not alone and not browser and not services" $(ARGS)

test-all: setup  ## run all tests, with Chromium, PostgreSQL and Ray where they are
	$(TESTS) -m "not alone" $(ARGS)
	$(RUN) -m pytest -m alone

check: setup  ## lint, formatting, types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

docs: setup  ## build the documentation site from docs/, docstrings and conf/: build/docs/index.html
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs

results: FOLDER := outputs/results_$(shell date +%Y-%m-%d_%H-%M-%S)
results: setup  ## train five seeds on the full MNIST (DATA=FOLDER) and write docs/results.md
	$(RUN) -m mnist_lit.train -m 'seed=range(5)' data.source=mnist $(DATA_DIR) hydra.sweep.dir=$(FOLDER) $(ARGS)
	$(RUN) benchmarks/seeds.py $(FOLDER)

# In an environment of its own, because the peers are many and large, and not locked.
peers: setup
	@test -x $(VENV)-bench/bin/python || $(RUN) -m venv --without-pip $(VENV)-bench
	@$(UV) pip install --quiet --compile-bytecode --python $(VENV)-bench/bin/python -r pyproject.toml --group bench

bench: peers  ## time this project against its peers (DATA=FOLDER) and write docs/speed.md
	$(VENV)-bench/bin/python benchmarks/bench.py $(or $(DATA),data) $(ARGS)

fidelity: peers  ## train with many seeds, here and with Keras (DATA=FOLDER; hours), and write docs/fidelity.md
	$(RUN) benchmarks/fidelity.py $(or $(DATA),data) $(ARGS)

recipes: peers  ## train the recipes of conf/experiment/ (DATA=FOLDER; hours), and write docs/recipes.md
	$(RUN) benchmarks/recipes.py $(or $(DATA),data) $(ARGS)

soak: setup  ## kill runs and a sweep at random moments and go on with them: the same results every time?
	$(RUN) -W ignore tests/soak.py $(ARGS)
	$(RUN) tests/soak_sweep.py

soak-server: setup  ## attack the server with 10,000 requests of many kinds: are good ones always answered? (minutes)
	$(RUN) -W ignore tests/soak_server.py $(ARGS)

fuzz: setup  ## damage 2,000 files of each kind that a stranger may send: is each refused, or read right? (an hour)
	for kind in checkpoint keras keras_h5 idx picture; do echo $$kind; $(RUN) tests/fuzz.py $$kind 2000 $(ARGS) || exit 1; done

sanitize: base  ## run the C under the address, undefined-behaviour and thread sanitizers (gcc or clang; two minutes)
	$(RUN) tests/sanitize.py $(ARGS)

lock: setup  ## renew both lock files from pyproject.toml
	$(COMPILE) --upgrade --all-extras --group dev -o requirements-dev.lock
	$(COMPILE) --extra sample --group build -c requirements-dev.lock -o requirements.lock
