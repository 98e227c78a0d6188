# `make` prints the targets. On a fresh machine any of them sets up first.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
PIP_ARGS ?=
PYTEST_ARGS ?=
# processes that share the tests; each takes up to 4 GiB
WORKERS ?= 2
# the tests of a file share its fixtures, so they stay in one process
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
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

# Nothing is fetched from a hub: a name that is no local directory fails at once, without waiting
# for a network.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo demo-tiny docs reference test test-full test-slow test-labelstudio \
    test-benchmarks fuzz lint format doctor bench bench-quick bench-gpu \
    bench-board bench-data bench-encoding bench-tuning bench-growth migration chaos soak \
    bench-gateway house equality proof-films proof-reviews proof-smollm2 proof-bfloat16 proof-arithmetic \
    proof-algorithms proof-ahead proof-hacking proof-environments proof-data proof-labels \
    proof-feedback proof-evaluation proof-search proof-pictures clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv from the lock (again only when it changed)

$(STAMP): $(LOCK) pyproject.toml
	@echo "Installing the packages of $(LOCK) into $(VENV) (minutes the first time) ..."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --no-deps $(PIP_ARGS) -r $(LOCK)
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## the main job with a chat model, up to 15 min on 2 cores
	$(OFFLINE) $(PY) -m rlhf stage=chain experiment=films run.name=demo run.overwrite=true

demo-tiny: $(STAMP) ## the main job from scratch, with PPO: 1M parameters, movie reviews
	$(OFFLINE) $(PY) -m rlhf stage=chain experiment=reviews run.name=demo-tiny run.overwrite=true

test: $(STAMP) ## what must hold at every commit
	$(OFFLINE) $(PY) -m pytest $(SHARED) $(PYTEST_ARGS)

test-full: $(STAMP) ## make test, the whole of every matrix, the harnesses
	$(OFFLINE) $(PY) -m pytest $(SHARED) -m "not slow and not labelstudio" $(PYTEST_ARGS)

test-slow: $(STAMP) ## tests of minutes each
	$(OFFLINE) $(PY) -m pytest -m slow $(PYTEST_ARGS)

test-labelstudio: $(STAMP) $(LABELSTUDIO_STAMP) ## a real Label Studio server on loopback (1 GB of packages)
	$(OFFLINE) LABEL_STUDIO=$(abspath $(LABELSTUDIO))/bin/label-studio $(PY) -m pytest \
	    -m labelstudio tests/labels/test_labelstudio_server.py $(PYTEST_ARGS)

$(LABELSTUDIO_STAMP):
	@echo "Installing label-studio $(LABELSTUDIO_VERSION) into $(LABELSTUDIO) (minutes the first time) ..."
	@test -x $(LABELSTUDIO)/bin/python || $(PYTHON) -m venv $(LABELSTUDIO)
	@$(LABELSTUDIO)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) \
	    label-studio==$(LABELSTUDIO_VERSION)
	@touch $@

test-benchmarks: $(STAMP) ## the tests of the harnesses in benchmarks/
	$(OFFLINE) $(PY) -m pytest $(SHARED) -m "benchmarks and not slow" $(PYTEST_ARGS)

fuzz: $(STAMP) ## slow: thousands of bad options, rows, models and files (8 min)
	$(OFFLINE) $(PY) -m pytest -m slow tests/test_fuzz.py tests/test_fuzz_places.py -s $(PYTEST_ARGS)

reference: $(STAMP) ## write docs/configuration.md and conf/schema.json anew
	$(PY) -m rlhf.cli.reference

docs: $(STAMP) $(DOCS_STAMP) ## the pages in build/docs; fails on dead links and bad commands
	$(OFFLINE) $(PY) -m pytest -q -m '' tests/test_docs.py $(PYTEST_ARGS)
	@rm -rf build/docs
	$(DOCS)/bin/python -m sphinx -b html -E -n -W --keep-going -q -d build/doctrees docs build/docs
	@echo "The pages are in build/docs/index.html"

$(DOCS_STAMP): $(DOCS_LOCK)
	@echo "Installing the packages of $(DOCS_LOCK) into $(DOCS) ..."
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(PIP_ARGS) -r $(DOCS_LOCK)
	@$(DOCS)/bin/python -m pip check --disable-pip-version-check
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

proof-films: $(STAMP) ## slow: a chat model's answers about films, in English; three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.films

proof-evaluation: $(STAMP) ## slow: a model before and after SFT, tasks, judges, one report
	$(OFFLINE) $(PY) -m benchmarks.proofs.evaluation

proof-reviews: $(STAMP) ## slow: the demo with three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.reviews

proof-smollm2: $(STAMP) ## slow: the chain with a pretrained 135M model and LoRA
	$(OFFLINE) $(PY) -m benchmarks.proofs.smollm2

proof-bfloat16: $(STAMP) ## slow: GRPO of a 135M model in bfloat16; wrong weights are named
	$(OFFLINE) $(PY) -m benchmarks.proofs.bfloat16 wrong
	$(OFFLINE) $(PY) -m benchmarks.proofs.bfloat16 train

proof-algorithms: $(STAMP) ## slow: grpo, rloo, dapo, online_dpo raise score and judges
	$(OFFLINE) $(PY) -m benchmarks.proofs.algorithms

proof-hacking: $(STAMP) ## slow: an exploited reward is stopped; three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.hacking

proof-arithmetic: $(STAMP) ## slow: sums from scratch by SFT and GRPO, three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.arithmetic

proof-ahead: $(STAMP) ## slow: GRPO with stage.ahead 0, 1, 2 learns alike; three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.ahead

proof-environments: $(STAMP) ## slow: a tool and a game from scratch by SFT, GRPO, PPO; three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.environments

proof-pictures: $(STAMP) ## slow: a tiny model learns to see by SFT and GRPO, three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.pictures

proof-data: $(STAMP) ## slow: planted defects, recall and precision of the report
	$(OFFLINE) $(PY) -m benchmarks.proofs.data

proof-search: $(STAMP) ## slow: TPE against random search, pruning against none, five seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.search

proof-labels: $(STAMP) ## slow: chosen pairs against random pairs, three seeds
	$(OFFLINE) $(PY) -m benchmarks.proofs.labels

proof-feedback: $(STAMP) ## slow: serve, users' feedback, DPO, gate, promote, better, rollback under load
	$(OFFLINE) $(PY) -m benchmarks.proofs.feedback

bench: $(STAMP) ## slow: online steps with and without a server, and our stages, beside TRL (idle)
	$(OFFLINE) $(PY) -m benchmarks.speed

bench-quick: $(STAMP) ## slow: the same with small models and few turns (minutes, idle)
	$(OFFLINE) $(PY) -m benchmarks.speed --quick

migration: $(STAMP) ## how many trainings of PEERS="DIRECTORY ..." migrate, compose and pass a dry run
	$(OFFLINE) $(PY) -m benchmarks.migration --dry-run $(PEERS)

bench-gpu: ## PPO and GRPO on one CUDA device (10 min): benchmarks/gpu.sh
	benchmarks/gpu.sh

bench-board: $(STAMP) ## the board's start, memory, forms and list against their aims (1 min, idle)
	$(OFFLINE) $(PY) -m benchmarks.board

bench-data: $(STAMP) ## slow: near duplicates of 100,000 texts, a 2 GiB file, data=clean (15 min)
	$(OFFLINE) $(PY) -m benchmarks.data

bench-encoding: $(STAMP) ## slow: rows to token ids beside datasets.map (10 min)
	$(OFFLINE) $(PY) -m benchmarks.encoding

bench-tuning: $(STAMP) ## slow: every way to fine-tune a 135M model, docs/tuning.md (20 min, idle)
	$(OFFLINE) $(PY) -m benchmarks.tuning

bench-growth: $(STAMP) ## slow: how the cost of a step grows with length, group and model
	$(OFFLINE) $(PY) -m benchmarks.speed --growth

bench-gateway: $(STAMP) ## what stage=gateway adds to a request, in ms (idle)
	$(OFFLINE) $(PY) -m benchmarks.gateway

chaos: $(STAMP) ## slow: faults put into real runs, each survived (40 min)
	$(OFFLINE) $(PY) -m benchmarks.chaos

soak: $(STAMP) ## slow: 200 steps of tiny models, a server too; fails where memory or files grow
	$(OFFLINE) $(PY) -m benchmarks.soak

house: $(STAMP) ## how readable and how entangled the code is, in figures
	$(PY) -m benchmarks.house

equality: $(STAMP) ## same numbers in two checkouts: BEFORE=DIR AFTER=DIR (20 min)
	$(OFFLINE) $(PY) -m benchmarks.equality --before $(BEFORE) --after $(AFTER)

clean: ## remove caches and build leftovers (runs/ and the environments stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(LABELSTUDIO) -o -path ./$(DOCS) \) -prune \
	    -o -name __pycache__ -type d -exec rm -rf {} +
