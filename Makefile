# `make` prints the targets. On a fresh machine any of them sets up first.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
PIP_ARGS ?=
PYTEST_ARGS ?=
# processes that share the tests; each takes up to 4 GiB
WORKERS ?= 2
LOCK := requirements/lock-cpu-py311.txt
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# The server has requirements of its own that no lock of ours could hold beside vLLM's.
LABELSTUDIO := .venv-labelstudio
LABELSTUDIO_VERSION := 1.23.2
LABELSTUDIO_STAMP := $(LABELSTUDIO)/.installed-$(LABELSTUDIO_VERSION)
# The pages of docs/ are built in an environment of their own: the toolkit needs none of it.
DOCS := .venv-docs
DOCS_LOCK := requirements/docs.txt
DOCS_STAMP := $(DOCS)/.installed
# -qq: errors only
PIP := $(PY) -m pip install -qq --disable-pip-version-check

# Nothing is fetched from a hub: a name that is not a local directory fails at once instead of waiting for a network.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo docs reference test test-slow test-labelstudio test-benchmarks fuzz lint format doctor bench bench-data bench-growth chaos soak house equality proof-reviews proof-smollm2 proof-arithmetic proof-algorithms proof-hacking proof-data proof-labels clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv from the lock (again only when the lock or pyproject.toml changed)

$(STAMP): $(LOCK) pyproject.toml
	@echo "Installing the packages of $(LOCK) into $(VENV) (minutes the first time) ..."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps $(PIP_ARGS) -r $(LOCK)
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## the main job on real movie reviews: SFT, reward model, PPO on vLLM, evaluation (up to 15 min on 2 cores)
	$(OFFLINE) $(PY) -m rlhf stage=chain experiment=reviews run.name=demo run.overwrite=true

test: $(STAMP) ## all tests but the slow ones (up to 28 min on 2 cores)
	$(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(STAMP) ## the slow tests only
	$(OFFLINE) $(PY) -m pytest -m slow $(PYTEST_ARGS)

test-labelstudio: $(STAMP) $(LABELSTUDIO_STAMP) ## a real Label Studio server on loopback: push, labels, pull (the server's packages, 1 GB, stay)
	$(OFFLINE) LABEL_STUDIO=$(abspath $(LABELSTUDIO))/bin/label-studio $(PY) -m pytest -m labelstudio tests/labels/test_labelstudio_server.py $(PYTEST_ARGS)

$(LABELSTUDIO_STAMP):
	@echo "Installing label-studio $(LABELSTUDIO_VERSION) into $(LABELSTUDIO) (minutes the first time) ..."
	@test -x $(LABELSTUDIO)/bin/python || $(PYTHON) -m venv $(LABELSTUDIO)
	@$(LABELSTUDIO)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) label-studio==$(LABELSTUDIO_VERSION)
	@touch $@

test-benchmarks: $(STAMP) ## the tests of the harnesses in benchmarks/
	$(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist loadfile tests/benchmarks $(PYTEST_ARGS)

fuzz: $(STAMP) ## slow: thousands of bad options, rows, models and damaged files; fails unless each ends in an error of ours (about 8 min)
	$(OFFLINE) $(PY) -m pytest -m slow tests/test_fuzz.py tests/test_fuzz_places.py -s $(PYTEST_ARGS)

reference: $(STAMP) ## write docs/configuration.md and conf/schema.json again, from the declarations of the options
	$(PY) -m rlhf.cli.reference

docs: $(STAMP) $(DOCS_STAMP) ## the pages of docs/ in build/docs; fails on a dead link or a command that does not parse
	$(OFFLINE) $(PY) -m pytest -q -m '' tests/test_docs.py $(PYTEST_ARGS)
	$(DOCS)/bin/python -m sphinx -b html -E -n -W --keep-going -q -d build/doctrees docs build/docs
	@echo "The pages are in build/docs/index.html"

$(DOCS_STAMP): $(DOCS_LOCK)
	@echo "Installing the packages of $(DOCS_LOCK) into $(DOCS) ..."
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(PIP_ARGS) -r $(DOCS_LOCK)
	@touch $@

lint: $(STAMP) ## ruff (rules and format) and mypy; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## let ruff fix and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

doctor: $(STAMP) ## what this machine can run, and why not the rest
	$(OFFLINE) $(PY) -m rlhf stage=doctor tracking=none

proof-reviews: $(STAMP) ## slow: the demo with three seeds; fails unless all three meet the acceptance
	$(OFFLINE) $(PY) -m benchmarks.proofs.reviews

proof-smollm2: $(STAMP) ## slow: the same chain with a pretrained 135M model, LoRA and a chat template
	$(OFFLINE) $(PY) -m benchmarks.proofs.smollm2

proof-algorithms: $(STAMP) ## slow: grpo, rloo, dapo and online_dpo on the movie reviews; fails unless each raises score and outside judges
	$(OFFLINE) $(PY) -m benchmarks.proofs.algorithms

proof-hacking: $(STAMP) ## slow: a reward is exploited, the watch stops the run and keeps the weights from before; three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.hacking

proof-arithmetic: $(STAMP) ## slow: sums from scratch by SFT and GRPO, three seeds; fails unless exact match rises by 20 points in each
	$(OFFLINE) $(PY) -m benchmarks.proofs.arithmetic

proof-data: $(STAMP) ## slow: planted defects in real pairs; recall and precision of every detector of the data report, at least 0.95 where exact
	$(OFFLINE) $(PY) -m benchmarks.proofs.data

proof-labels: $(STAMP) ## slow: pairs chosen for a simulated annotator against random ones, three seeds; fails unless 70 % of the labels do in each
	$(OFFLINE) $(PY) -m benchmarks.proofs.labels

bench: $(STAMP) ## slow: whole online steps beside TRL's GRPOTrainer, taking turns; nothing else may run (about 25 min on 2 cores)
	$(OFFLINE) $(PY) -m benchmarks.speed

bench-data: $(STAMP) ## slow: near duplicates of 100,000 texts, and a 2 GiB file streamed through two steps (about 10 min on 2 cores)
	$(OFFLINE) $(PY) -m benchmarks.data

bench-growth: $(STAMP) ## slow: how the cost of a step grows with length, group and model
	$(OFFLINE) $(PY) -m benchmarks.speed --growth

chaos: $(STAMP) ## slow: faults put into real runs (kills, signals, torn files, full disks, NaN, hangs); each has to be survived (about 20 min)
	$(OFFLINE) $(PY) -m benchmarks.chaos

soak: $(STAMP) ## slow: 200 steps of tiny models (ppo, ZeRO-2, vLLM, LoRA, sft); fails where memory grows by more than 2 % after the warm-up
	$(OFFLINE) $(PY) -m benchmarks.soak

house: $(STAMP) ## how readable and how entangled the code is, in figures
	$(PY) -m benchmarks.house

equality: $(STAMP) ## the same commands in two checkouts give the same numbers: make equality BEFORE=DIR AFTER=DIR (up to 20 min)
	$(OFFLINE) $(PY) -m benchmarks.equality --before $(BEFORE) --after $(AFTER)

clean: ## remove caches and build leftovers (runs/ and the environments stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(LABELSTUDIO) -o -path ./$(DOCS) \) -prune -o -name __pycache__ -type d -exec rm -rf {} +
