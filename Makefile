# Starts from Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
# Two hosts of tests at a time; each takes up to 3 GB.
TEST_WORKERS ?= 2
COMPILED := sglang torch transformers diffusers cache_dit accelerate fastapi pydantic openai scipy numpy sympy

.PHONY: setup demo test test-unit test-host test-soak lint browser mutations requirements clean

setup: $(VENV)/.ready

# uv comes from the ordinary registry into a folder of its own, then installs the pinned, hashed stack.
# Bytecode is compiled once: without it every start of the host spends half its time compiling. Left out is what is
# written for one version of Python alone.
$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv; }
	test -x $(BIN)/python || .uv/bin/uv venv --quiet --python $(PYTHON) $(VENV)
	.uv/bin/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	.uv/bin/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	cd $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path(\"purelib\"))") && \
	  env -u PYTHONDONTWRITEBYTECODE $(abspath $(BIN))/python -W ignore -m compileall -q -j 2 -x 'py3[0-9]+_' $(COMPILED)
	touch $@

demo: setup
	$(BIN)/python -m sglang_cachedit_plugin.demo.show

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

# Pages are tested in a real Chromium, and without one those tests are skipped. This installs it, as root on Debian.
browser:
	command -v chromium >/dev/null || test -n "$$CHROMIUM" || \
	  { test $$(id -u) = 0 && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	  { echo "Chromium could not be installed here: install it, or name it in CHROMIUM" >&2; exit 1; }

# What each level costs stands in CONTRIBUTING.md. Tests that share a server or a fixture go to one worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder --max-worker-restart=0

test: lint
	$(PYTEST)

test-unit: setup
	$(PYTEST) tests/unit tests/contract tests/dist --ignore tests/dist/test_recipes.py

test-host: setup
	$(PYTEST) tests/models tests/e2e tests/dist/test_recipes.py -m "not soak"

test-soak: setup
	$(PYTEST) tests/e2e -m soak

# Twenty defects, each of which must be caught.
mutations: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutations

# The pins, without registry addresses.
requirements:
	test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet uv; }
	.uv/bin/uv pip compile --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --no-header --quiet requirements/dev.in -o requirements/dev.txt

clean:
	rm -rf $(VENV) .uv outputs
