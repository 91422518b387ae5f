# Two commands do everything on a machine with Python 3.11 and make:
#   make generate PROMPT="a red apple"      installs what is needed, draws the picture and names it
#   make test                               installs what is needed and runs the tests (minutes, on a CPU)
# `make help` lists the rest.

PYTHON  ?= python3
VENV    ?= .venv
PROMPT  ?= a red apple
ARGS    ?=
WORKERS ?= auto

BIN     := $(VENV)/bin
# One thread per test process: the processes already fill the cores, and the tests are small.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD  := -n $(WORKERS) --maxprocesses 8 --dist loadfile
# Where single tests are long, they are dealt out one by one.
PAGES   := -n $(WORKERS) --maxprocesses 8 --dist worksteal
FAST    := not slow and not parity and not gpu and not docs
CODE    := gen_pipelines tests $(wildcard benchmarks examples) setup.py

# PROMPT goes through the environment, so that any quotes in it are harmless.
export PROMPT

.PHONY: help generate test slow parity gpu docs check fix bench clean

help:
	@echo 'make generate PROMPT="a red apple" [ARGS="--num 4 --grid"]   draw a picture with the bundled pipeline'
	@echo 'make test      the fast tests          make slow    tests that train small models or start processes'
	@echo 'make check     linters and registries  make parity  long comparisons with diffusers'
	@echo 'make fix       mend the lint           make gpu     tests that need an accelerator'
	@echo 'make bench     run the benchmarks      make docs    build the docs, run every snippet'
	@echo 'make clean     remove the environment and what was built'

# The environment holds a stamp per set of dependencies, and is brought up to date only when setup.py changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.core

$(VENV)/.docs: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	@touch $@ $(VENV)/.dev $(VENV)/.core

generate: $(VENV)/.core
	@$(BIN)/gen-pipelines generate "$$PROMPT" $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) $(SPREAD) -m '$(FAST)'

# A lane without tests is reported, not taken for a pass of something: pytest then exits with 5.
define lane
	@$(PYTEST) $(2) -m '$(1)'; code=$$?; \
	if [ $$code -eq 5 ]; then echo 'make $@: no test is marked for this lane, nothing ran'; else exit $$code; fi
endef

slow: $(VENV)/.dev
	$(call lane,slow and not gpu and not docs,$(PAGES))

parity: $(VENV)/.dev
	$(call lane,parity and not gpu and not docs,$(SPREAD))

gpu: $(VENV)/.dev
	$(call lane,gpu)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(call lane,docs,$(PAGES))

check: $(VENV)/.dev
	$(BIN)/ruff check $(CODE)
	$(PYTEST) -q tests/test_package.py

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix $(CODE)

# emoji_quality.py needs the captioned pictures: make bench DATA=folder
bench: $(VENV)/.dev
	@for file in $(filter-out benchmarks/emoji_quality.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done
	@if [ -n "$(DATA)" ]; then $(BIN)/python benchmarks/emoji_quality.py --data "$(DATA)"; fi

clean:
	rm -rf $(VENV) build dist site gen_pipelines.egg-info .pytest_cache .ruff_cache
