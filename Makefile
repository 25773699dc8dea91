# Everything runs in an environment of its own, one for each Python: .venv-3.11 beside .venv-3.12.
# PYTHON chooses the interpreter, VENV the place. PARITY= leaves out the comparison with torch.

PYTHON  ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV    ?= .venv-$(VERSION)
PARITY  ?= ,parity
SLOW    ?= inf
JOBS    ?= 2
SUITE   ?= quick
AOT     ?= $(shell grep -rl --include='*.py' 'mark\.aot' tests)
BIN     := $(VENV)/bin
PYTEST  := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
# Modules are compiled as they are imported: all of torch's at once take longer than to unpack them.
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

# Quick tests spend more time in LLVM than in what it makes; slow ones run what users run. The second
# flag, a quarter of that time, is one of jax 0.10, with which Python 3.11 ends.
HASTY   := $(XLA_FLAGS) --xla_backend_optimization_level=0 \
	$(if $(filter 3.11,$(VERSION)),--xla_cpu_use_fusion_emitters=false)

export JAX_PLATFORMS ?= cpu
unexport PYTHONDONTWRITEBYTECODE  # each of a hundred processes would compile the modules again

.PHONY: demo setup test slow test-all sanitize aot lint format format-check types imports bench eval
.PHONY: clean
.DEFAULT_GOAL := test

demo: $(VENV)/.demo  ## Serves a model of ours, and solves a problem through an OpenAI client
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev  ## All but slow tests, JOBS files at a time
	XLA_FLAGS="$(HASTY)" $(PYTEST) -m "not slow and not gpu and not tpu and not aot" $(ARGS)

slow: $(VENV)/.dev  ## The slow ones; SLOW=600 starts none after ten minutes
	$(PYTEST) -m "slow and not gpu and not tpu and not aot" --slow $(SLOW) $(ARGS)

test-all: test slow

# Who leaves an array is ended at once: -s, for its last words would be lost with pytest's capture.
SANITIZED := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1
PRELOADED  = $(foreach library,libasan.so libstdc++.so,$(shell g++ -print-file-name=$(library)))

sanitize: $(VENV)/.dev  ## The C++ kernels, caught where they leave an array; CXXFLAGS=-march=haswell
	LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 CXX=g++ \
	  JAXSERVE_CXXFLAGS="$(SANITIZED) $(CXXFLAGS)" XLA_FLAGS="$(HASTY)" $(BIN)/python -m pytest -q -s \
	  tests/kernels_pallas/test_cpu*.py tests/kernels_pallas/test_codec.py -k "cpu or native" $(ARGS)

aot: $(VENV)/.aot  ## Compiles for TPUs and for Hopper, none of which need be there
	$(PYTEST) --dist load -m aot $(AOT) $(ARGS)

setup: $(VENV)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.core  ## SUITE=quick; `make bench SUITE=help` fails, and names the others
	$(BIN)/python -m benchmarks.run $(SUITE)

clean:  ## Environments of other Pythons stay
	rm -rf $(VENV) .jaxserve-cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# An environment is made once, and filled again only when pyproject.toml changes.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxserve needs Python 3.11 or newer, and $(PYTHON) is $(VERSION): make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	$(BIN)/python -m kernels_pallas.cpu
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev,train$(PARITY)]'
	$(BIN)/python -m kernels_pallas.cpu
	@touch $@ $(VENV)/.core $(VENV)/.demo

$(VENV)/.aot: pyproject.toml | $(VENV)/.dev
	$(PIP) --editable '.[aot]'
	@touch $@

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[demo]'
	$(BIN)/python -m kernels_pallas.cpu
	@touch $@ $(VENV)/.core

eval: $(VENV)/.dev  ## lm-eval against a live server
	$(PIP) --editable '.[dev,train$(PARITY),eval]'
	$(BIN)/python -m pytest -q tests/evaluation $(ARGS)
