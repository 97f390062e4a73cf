# make demo   see it work: the same clip with three caches, side by side
# make test   every promise, checked
# make nightly   the same promises at length: 100 kills, 10,000 latent frames, a whole 3B clip on paper
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# make train-digits DEVICE=cuda COMPILE=1 CODEC_MINUTES=1.6 MINUTES=14.9 WORKERS=14   the shipped run
DEVICE ?= cpu
CODEC_MINUTES ?= 20
MINUTES ?= 240
WORKERS ?= 0
TRAINING = --resume --device $(DEVICE) --workers $(WORKERS)

.PHONY: setup demo test nightly lint golden train-digits bench performance bench-digits bench-lumos \
        reproduce rivals leaderboard

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: setup
	$(BIN)/packcache demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

golden: setup
	$(BIN)/python -m packcache.testing.golden tests/golden

test: lint golden
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

nightly: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m nightly

# the codec first, then the model that speaks its tokens; goes on where it was stopped
train-digits: setup
	$(BIN)/python recipes/digits/train_codec.py $(TRAINING) --minutes $(CODEC_MINUTES)
	$(BIN)/python recipes/digits/train.py $(TRAINING) --minutes $(MINUTES) $(if $(COMPILE),--compile)

# seconds of every policy and preset, e.g. ARGS="--model digits --frames 384"
bench: setup
	$(BIN)/packcache bench $(ARGS)

# docs/performance.md from the stored results
performance: setup
	$(BIN)/packcache bench --page docs/performance.md

bench-digits: setup
	$(BIN)/python benchmarks/long_clip.py $(ARGS)

# the largest model at full size with random weights: some 7 GB of disk and memory, minutes
bench-lumos: setup
	$(BIN)/python benchmarks/full_size.py $(ARGS)

# docs/results.md: the whole protocol and its ablations (hours, goes on where it was stopped), or
# eight prompts of them beside their own page (minutes): make reproduce QUICK=1 PROCESSES=2
RUN := $(BIN)/packcache evaluate run --workers $(or $(PROCESSES),2) $(if $(QUICK),--quick 8)
RESULTS := benchmarks/results/$(if $(QUICK),quick,evaluate)
ABLATIONS := benchmarks/results/$(if $(QUICK),quick,evaluate)_ablations
PAGE := $(if $(QUICK),$(RESULTS)/results.md,docs/results.md)
PICTURES := $(if $(QUICK),$(RESULTS),docs/images)
PARTS := replay,memory
STORED := $(wildcard $(patsubst %,benchmarks/results/bench_%.json,3b_i2v_24 3b_i2v_48 digits_384))
TIMED := $(if $(QUICK),,$(addprefix --bench ,$(STORED)))
reproduce: setup
	mkdir -p $(RESULTS) $(ABLATIONS)
	$(RUN) --out $(RESULTS)
	$(RUN) --protocol benchmarks/ablations.toml --out $(ABLATIONS) $(if $(QUICK),--parts $(PARTS))
	$(BIN)/packcache evaluate page $(PAGE) --result $(RESULTS)/evaluate.json \
		--ablations $(ABLATIONS)/evaluate.json --pictures $(PICTURES) $(TIMED)

# sinks, reach, packing and the rivals, clips made freely (exploratory, some 45 minutes on two cores)
RIVALS := benchmarks/results/rivals
rivals: setup
	mkdir -p $(RIVALS)
	$(BIN)/packcache evaluate run --workers $(or $(PROCESSES),2) \
		--protocol benchmarks/rivals.toml --out $(RIVALS)
	$(BIN)/packcache evaluate page $(RIVALS)/results.md --result $(RIVALS)/evaluate.json

# every policy on the stored traces, and those of files dropped into policies/ or a folder you name:
# ARGS="--policies-from DIR"; with such rows nothing is written but to ARGS="--out FILE"
leaderboard: setup
	$(BIN)/python benchmarks/leaderboard.py $(ARGS)
