# make demo   see it work: the same clip with three caches, side by side
# make test   every promise, checked
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint golden train-digits bench-digits

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
	$(BIN)/pyright

golden: setup
	$(BIN)/python -m packcache.testing.golden tests/golden

test: lint golden
	$(BIN)/python -m pytest -n 2

train-digits: setup
	$(BIN)/python recipes/digits/train_codec.py $(CODEC_ARGS)
	$(BIN)/python recipes/digits/train.py $(ARGS)

bench-digits: setup
	$(BIN)/python benchmarks/long_clip.py $(ARGS)
