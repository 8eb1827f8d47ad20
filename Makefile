# Everything happens in .venv, which these targets make themselves: python3 (3.10 to 3.13), a C++ compiler and make
# are all a machine needs. PYTHON and TORCH choose another interpreter or torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
NATIVE := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help demo test lint format unit interpreter bench results gpu-check clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	@touch $@

# Editable, so that the sources are used as they are; built again whenever something native has changed.
$(VENV)/demo.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(INSTALL) --editable ".[demo]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp ## train a digit classifier with cross entropy and with CMIM, compare, try to distil both, plot
	$(BIN)/python examples/digits.py
	$(BIN)/python examples/undistillable_digits.py

test: lint unit interpreter ## lint and every test; those that need a GPU are skipped where there is none

lint: $(VENV)/dev.stamp ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/dev.stamp ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

PARALLEL := --numprocesses=auto

# The interpreter's switch must be set before Triton is imported, so its tests are processes of their own. Few of
# its files take most of the time: the processes share them.
interpreter: $(VENV)/dev.stamp ## the Triton kernels on the CPU, through Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter $(PARALLEL) --dist=worksteal

# Whole files apiece; what measures time comes last and alone.
unit: $(VENV)/dev.stamp ## the other tests
	$(BIN)/python -m pytest -m "not interpreter and not speed" $(PARALLEL) --dist=loadfile
	$(BIN)/python -m pytest -m "not interpreter and speed"

bench: $(VENV)/dev.stamp ## time the loss against F.cross_entropy, print tables, plot
	@mkdir -p out
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=out/benchmarks.json
	$(BIN)/python benchmarks/report.py out/benchmarks.json

# One JSON for each set of instructions, by which CPUs are told apart: RESULTS=benchmarks/results/cpu_avx512.json.
RESULTS ?= benchmarks/results/cpu.json
results: $(VENV)/dev.stamp ## the whole suite, into the documents; wants an idle machine
	$(BIN)/python -m pytest benchmarks --benchmark-only --full --benchmark-json=$(RESULTS)
	$(BIN)/python benchmarks/report.py --plots docs/images --update README.md $(wildcard docs/performance.md)

# The script builds the CUDA library itself, for the one architecture that is there.
gpu-check: export CMIM_KERNELS_CUDA = 0
gpu-check: $(VENV)/dev.stamp ## tests and timings that need a CUDA device
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/gpu_check.sh

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist out *.egg-info cmim_kernels/*.so
