# make run      install, and answer one question about a clip
# make test     install with the developer's tools, and run the tests
# make check    ruff, format, types
# make bench    speed of answering and of training on this machine
# make stress   a server under load for two minutes, and all that can go wrong with clients
# make train-tiny  a checkpoint like the shipped one from nothing, by the stages of train/configs/release.yaml; goes on when repeated
# make clean    remove .venv and everything generated
#
# PyPI's torch for Linux brings CUDA libraries (several GB). Where they are not wanted, name an index of CPU wheels:
#     make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
# It is used for torch alone, and before the rest; the rest then finds torch installed.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)",$$/\1/p' pyproject.toml)

.PHONY: run test check bench stress train-tiny clean

run: .venv/.run-stamp
	$(BIN)/speechllm ask "Transcribe this audio" prompts/clips/transcribe-1.wav

test: .venv/.dev-stamp
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 15

check: .venv/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy speechllm train serve

bench: .venv/.bench-stamp
	$(BIN)/python -m serve.bench
	$(BIN)/python -m train.bench

stress: .venv/.dev-stamp
	$(BIN)/python tests/stress/http_load.py
	$(BIN)/python tests/stress/http_faults.py

train-tiny: .venv/.train-stamp
	$(BIN)/python -m train.release --config train/configs/release.yaml

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find speechllm train serve tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call install nothing until pyproject.toml changes.
.venv/.venv-stamp:
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url "$(TORCH_INDEX)" "$(TORCH)")
	touch $@

.venv/.run-stamp: pyproject.toml | .venv/.venv-stamp
	$(BIN)/python -m pip install -e .
	touch $@

.venv/.dev-stamp: pyproject.toml | .venv/.venv-stamp
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ .venv/.run-stamp

.venv/.bench-stamp: pyproject.toml | .venv/.venv-stamp
	$(BIN)/python -m pip install -e '.[bench]'
	touch $@ .venv/.run-stamp

.venv/.train-stamp: pyproject.toml | .venv/.venv-stamp
	$(BIN)/python -m pip install -e '.[train]'
	touch $@ .venv/.run-stamp
