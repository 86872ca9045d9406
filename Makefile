# Two commands matter: `make repro` re-measures every paper at the smoke profile and prints the board, `make test` runs
# the test suite. Both set up everything they need.
#
#   NERFSTUDIO=0      leave out nerfstudio and the 85 packages only it brings
#   PYTHON=python3.12 use this Python for .venv
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-peers repro test test-sanitize lab ui bench gpu-check kernels lint format lock clean

NERFSTUDIO ?= 1
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
NATIVE_SOURCES := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.in' -o -name CMakeLists.txt)
NERFSTUDIO_EXTRA := $(if $(filter 0,$(NERFSTUDIO)),,nerfstudio)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv from the lock, build the kernels, create the tracking store
	@pipelines/bootstrap.sh $(NERFSTUDIO_EXTRA) $(EXTRAS)
	@$(MAKE) --no-print-directory .venv/kernels
	@python -m pipelines.setup

setup-peers: # with the implementations that tests and benchmarks compare against
	@$(MAKE) --no-print-directory setup EXTRAS=peers

.venv/kernels: $(NATIVE_SOURCES) pyproject.toml
	@echo "resparse: building the kernels"
	@uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

kernels: ## build the kernels again
	@rm -f .venv/kernels
	@$(MAKE) --no-print-directory .venv/kernels

# -k keeps going when a paper fails; the board is then built by itself, so that the failure stands on it as a row
repro: setup ## re-measure every paper at the profile of params.yaml, print the scoreboard
	@status=0; dvc repro -k || status=$$?; \
	dvc repro -s scoreboard || status=$$?; resparse board || status=$$?; exit $$status

test: setup-peers ## run the whole test suite
	@python -m pytest

# The sanitizers' runtime must be the first library of the process, and libstdc++ there for its __cxa_throw to be found.
# Python never gives back all its memory: no leak check. --capture=sys lets the report of a dying process through.
# Left out: the Triton kernels and the references (none of our C++, slow) and the benchmarks (other people's code, memory
# as the sanitizer needs it). The second round is of the 16-lane code and the tiles, which few processors would run.
test-sanitize: setup ## run the kernels' tests under the address and undefined-behaviour sanitizers (GCC)
	@cmake -S kernels -B build/sanitize -G Ninja -DKERNELS_SANITIZE=ON \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python >/dev/null
	@cmake --build build/sanitize
	@cxx=$$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' build/sanitize/CMakeCache.txt); \
	asan=$$($$cxx -print-file-name=libasan.so); stdcxx=$$($$cxx -print-file-name=libstdc++.so); \
	[ -e "$$asan" ] || { echo "resparse: $$cxx has no libasan.so; try: make clean; CXX=g++ make $@" >&2; exit 1; }; \
	export KERNELS_NATIVE=$(CURDIR)/build/sanitize LD_PRELOAD="$$asan $$stdcxx" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	python -c "from kernels import info; k = info(); assert k['sanitized'], k; print('resparse: sanitized', k['isa'])" && \
	for isa in "" emulated_amx; do \
		KERNELS_ISA=$$isa python -m pytest -q --capture=sys tests/kernels \
			--ignore-glob='*_triton.py' --ignore-glob='*_reference*.py' --ignore=tests/kernels/test_bench.py || exit 1; \
	done

lab: setup ## open JupyterLab at the papers
	@jupyter lab papers

ui: setup ## open the MLflow dashboard
	@echo "resparse: http://127.0.0.1:5000; choose 'Model training' inside an experiment to see its runs"
	@mlflow ui --backend-store-uri "$$(python -c "from common import tracking; print(tracking.uri())")"

bench: setup-peers ## time the kernels against the peers, write results/bench.json
	@python -m kernels.bench

# runs on a bare Python with torch and triton: no .venv needed
gpu-check: ## check and time the Triton kernels on this machine's GPU, write results/gpu/<device>.json
	@$(if $(wildcard $(BIN)/python),python,python3) -m pipelines.gpu_check

lint: setup ## ruff, pyright
	@ruff check . && ruff format --check . && pyright

format: setup ## let ruff put the code in order
	@ruff check --fix . && ruff format .

lock: setup ## compile requirements.lock again (UPGRADE=--upgrade for newer versions)
	@python -m pipelines.lock $(UPGRADE)

clean: ## remove what can be made again: builds and caches, not results, not .venv
	@rm -rf build .pytest_cache .ruff_cache .hypothesis; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
