# make run [PROFILE=scenes] [SET="select.clip.min=0.2 ..."]   the whole pipeline, set-up included
# make test                                                   every test, set-up included
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= scenes
SET ?=

# What phones home or asks for a newer self is off for everything that make starts.
export DVC_NO_ANALYTICS = 1
export GX_ANALYTICS_ENABLED = false
export RAY_USAGE_STATS_ENABLED = 0
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export DO_NOT_TRACK = 1
export NO_ALBUMENTATIONS_UPDATE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help setup run test check bench bench-bias bench-curation bench-download bench-evaluation bench-gate bench-no-network bench-parity bench-planted bench-sabotage bench-selection bench-scoring bench-train bench-train-gpu bench-data-juicer zoo ui serve report lock clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

setup: $(BIN)/.installed  ## virtual environment with the locked packages

$(BIN)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"found Python {sys.version.split()[0]}; expected 3.11 or newer; set PYTHON=/path/to/python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked packages into $(VENV) (2-6 minutes, 2.6 GB; once)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

run: setup       ## the whole pipeline on PROFILE (scenes by default): download to promoted model
	$(BIN)/python -m vlmpipe run --profile $(PROFILE) $(foreach s,$(SET),--set '$(s)')

test: setup      ## every test
	$(BIN)/python -m pytest

check: setup     ## lint and the fast tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not slow"

bench-curation: setup  ## the same training on the curated and on the raw pool, at equal steps
	$(BIN)/python benchmarks/curation.py

bench-planted: setup  ## what was planted in 20,000 pairs against what the selection caught; swapped captions ranked
	$(BIN)/python benchmarks/planted.py

bench-parity: setup  ## a random model of every Hugging Face family, here and in transformers: docs/parity.md
	$(BIN)/python benchmarks/parity.py --out docs/parity.md

zoo: setup       ## every small preset trained, tested beside its blind twin and gated: docs/zoo.md [MODELS="clip vilt"] [JOBS=2]
	$(BIN)/python benchmarks/zoo.py $(MODELS) $(if $(JOBS),--jobs $(JOBS)) $(if $(SET),--set $(foreach s,$(SET),'$(s)'))

bench-bias: setup  ## a skew planted by a filter is caught by the gate, pools without one pass
	$(BIN)/python benchmarks/bias.py

bench-gate: setup  ## 1,000 comparisons of a model with itself, and true drops: alarms of the gate's statistics
	$(BIN)/python benchmarks/gate_calibration.py

bench-sabotage: setup  ## ten sabotaged models, each stopped by the rule that should, and ten honest reruns that pass
	$(BIN)/python benchmarks/sabotage.py

bench-selection: setup  ## select 1 and 10 million rows of simulated metadata: time, memory, growth
	$(BIN)/python benchmarks/selection.py

bench-scoring: setup  ## annotate's scoring against the bare model
	$(BIN)/python benchmarks/scoring.py

bench-data-juicer: setup  ## annotate and select against Data-Juicer, in an environment of its own
	$(BIN)/python benchmarks/data_juicer.py

bench-download: setup  ## images per second of our download, of img2dataset and of the cores themselves
	$(BIN)/python benchmarks/download.py

bench-no-network: setup  ## 10,000 real addresses with no network: time and outcomes
	$(BIN)/python benchmarks/no_network.py

bench-evaluation: setup  ## VQA evaluation beside transformers' generate, same weights and answers: answers a second
	$(BIN)/python benchmarks/evaluation.py

bench-train: setup  ## training beside open_clip and transformers on CPU: samples a second
	$(BIN)/python benchmarks/train.py

bench-train-gpu: setup  ## the same on a GPU, with MFU; without one the smallest shapes only show that it runs
	$(BIN)/python benchmarks/train_gpu.py

bench: bench-download bench-no-network bench-planted bench-bias bench-gate bench-sabotage bench-curation bench-selection bench-scoring bench-data-juicer bench-parity bench-evaluation bench-train  ## every benchmark that needs no GPU

ui: setup        ## Prefect server and UI on loopback
	$(BIN)/python -m vlmpipe ui

serve: setup     ## register the scheduled deployments and wait for them
	$(BIN)/python -m vlmpipe serve

lock: setup      ## resolve requirements.in anew
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install -q -r requirements.in
	( grep '^#' requirements.lock; .venv-lock/bin/python -m pip freeze | sed 's/+cpu$$//' | \
	  grep -v -i -E '^(dataclasses|nvidia-.*|triton|setuptools|pip)==' ) > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock

clean:           ## forget this workspace's data (the DVC cache and the remote stay)
	rm -rf data
