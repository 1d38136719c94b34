# vab. `make help` lists the targets. CONFIG=recipe.yaml and ARGS="--flag value ..." go to the command that runs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?=
ARGS ?=
comma := ,
# Extras to install beside the development tools, such as EXTRAS=,all
EXTRAS ?=
WORLD ?= $(or $(VAB_DATA),data)/demo
RUN ?= demo_pretrain
BENCH ?= generate
# A demo run is there once it has ended: one that was stopped is done again by what builds on it.
BEGUN = @rm -f runs/$(1)/.ended
ENDED = @test ! -d runs/$(1) || touch runs/$(1)/.ended
# Tests in two processes: most wait for others that they started. SPREAD= for one, as a debugger needs.
SPREAD ?= --numprocesses 2 --dist worksteal

.PHONY: help setup pretrain align classify demo demo-data two-stage test test-slow lint format bench gpu-check weights tensorboard clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

# Made once; again when the dependencies or EXTRAS change.
READY := $(VENV)/.ready$(subst $(comma),-,$(EXTRAS))
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "error: Python 3.11 to 3.14 is needed, got $$($(PYTHON) -V 2>&1): make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev$(EXTRAS)]"
	@touch $@

setup: $(READY)  ## the virtual environment with everything that the other targets need

pretrain: setup  ## pretrain: the demo world, or CONFIG=configs/pretrain.yaml ARGS="--trainer.devices 8"
ifeq ($(CONFIG),)
	@$(MAKE) --no-print-directory demo-data
	$(call BEGUN,$(RUN))
	$(BIN)/vab fit --config configs/demo/pretrain.yaml --data.train $(WORLD)/shards/train --data.val $(WORLD)/shards/val \
	  --trainer.logger.init_args.name $(RUN) $(ARGS)
	$(call ENDED,$(RUN))
	$(BIN)/vab demo score --checkpoint runs/$(RUN) --data $(WORLD)/shards/val
else
	$(BIN)/vab fit --config $(CONFIG) $(ARGS)
endif

align: setup  ## align sound and video: the demo world, after make pretrain, or CONFIG=configs/align.yaml
ifeq ($(CONFIG),)
	@test -e runs/$(RUN)/.ended || $(MAKE) --no-print-directory pretrain ARGS=
	$(call BEGUN,demo_align)
	$(BIN)/vab fit --config configs/demo/align.yaml --data.train $(WORLD)/shards/train --data.val $(WORLD)/shards/val \
	  --model.init_from runs/$(RUN) $(ARGS)
	$(call ENDED,demo_align)
	$(BIN)/vab retrieve --checkpoint runs/demo_align --data $(WORLD)/shards/val
else
	$(BIN)/vab fit --config $(CONFIG) $(ARGS)
endif

classify: setup  ## classify: the demo world, after make align, or CONFIG=configs/classify/vggsound.yaml
ifeq ($(CONFIG),)
	@test -e runs/demo_align/.ended || $(MAKE) --no-print-directory align ARGS=
	$(call BEGUN,demo_classify)
	$(BIN)/vab fit --config configs/demo/classify.yaml --data.train $(WORLD)/shards/train --data.val $(WORLD)/shards/val \
	  $(ARGS)
	$(call ENDED,demo_classify)
	$(BIN)/vab validate --config configs/demo/classify.yaml --data.train $(WORLD)/shards/train \
	  --data.val $(WORLD)/shards/val --ckpt_path runs/demo_classify
else
	$(BIN)/vab fit --config $(CONFIG) $(ARGS)
endif

demo: setup  ## the whole chain on the demo world, and a report with players: runs/demo_report.html
	@test -e runs/demo_classify/.ended || $(MAKE) --no-print-directory classify ARGS=
	for inputs in audio video; do test -e runs/demo_classify_$$inputs/.ended || { $(BIN)/vab fit \
	  --config configs/demo/classify.yaml --data.train $(WORLD)/shards/train --data.val $(WORLD)/shards/val \
	  --model.inputs $$inputs --trainer.logger.init_args.name demo_classify_$$inputs $(ARGS) && \
	  touch runs/demo_classify_$$inputs/.ended; } || exit; done
	$(BIN)/vab demo world --seed 1 --out $(WORLD)/unseen --num_train 1 --num_val 500
	$(BIN)/vab extract --config configs/extract/demo.yaml --media $(WORLD)/unseen/val.csv --out $(WORLD)/shards/unseen
	$(BIN)/vab demo report --data $(WORLD)/shards/unseen --videos $(WORLD)/unseen --out runs/demo_report.html \
	  --pretrain runs/$(RUN) --classify runs/demo_classify runs/demo_classify_audio runs/demo_classify_video \
	  --overwrite true

demo-data: setup  ## the synthetic world: videos, then shards
	$(BIN)/vab demo world --out $(WORLD)/videos --num_train 1500 --num_val 200
	$(BIN)/vab extract --config configs/extract/demo.yaml --media $(WORLD)/videos/train.csv --out $(WORLD)/shards/train
	$(BIN)/vab extract --config configs/extract/demo.yaml --media $(WORLD)/videos/val.csv --out $(WORLD)/shards/val

two-stage: setup  ## a coarse and a fine model of the synthetic world, and what the second adds
	$(BIN)/vab demo world --out $(WORLD)/videos --num_train 1500 --num_val 200
	for part in train val; do $(BIN)/vab extract --config configs/extract/demo8.yaml --media $(WORLD)/videos/$$part.csv \
	  --out $(WORLD)8/shards/$$part || exit; done
	for stage in coarse fine; do $(BIN)/vab fit --config configs/demo/$$stage.yaml --data.train $(WORLD)8/shards/train \
	  --data.val $(WORLD)8/shards/val $(ARGS) || exit; done
	$(BIN)/python -m bench.two_stage --coarse runs/demo_coarse --fine runs/demo_fine --data $(WORLD)8/shards/val

test: setup  ## the tests: minutes, no network
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-slow: setup  ## the slow tests too
	$(BIN)/python -m pytest $(SPREAD) -m "slow and not needs_cuda" $(ARGS)

lint: setup  ## ruff, mypy, the layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench:  ## how fast sound is made; BENCH=train, engines, loader, soak, evaluate, extract: the rest; ARGS="--help" lists what can be set
	@$(MAKE) --no-print-directory setup EXTRAS=$(EXTRAS),bench
	$(BIN)/python -m bench.$(BENCH) $(ARGS)

gpu-check: setup  ## what to run first on a machine with a GPU: tests, speed, memory, waits in one table
	@$(BIN)/python -m bench.gpu_check $(ARGS)

weights: setup  ## train the tiny frozen networks again (about an hour on two cores)
	$(BIN)/python -m tools.tiny_networks --part all --out src/vab/frozen/weights $(ARGS)

tensorboard: setup  ## look at the runs
	$(BIN)/tensorboard --logdir runs $(ARGS)

clean:  ## remove what tests and tools leave; runs/ and data/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
