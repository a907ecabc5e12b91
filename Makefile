# Two commands do everything: `make serve` and `make test`. The rest is for developers.
#
# Where pip would fetch a CUDA build of torch and you want the CPU one:
#   make serve PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)
ARGS ?=

.PHONY: serve test check format bench test-load test-services web screenshots clean

serve: $(VENV)/.serve  ## start the server on the demo model; flags by ARGS="--port 8123"
	$(BIN)/pilothouse serve $(ARGS)

test: $(VENV)/.test  ## run the tests (offline, no system packages)
	$(BIN)/python -m pytest --ignore tests/services --ignore tests/browser --ignore tests/load $(ARGS)

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

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large; this happens once) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	$(PIP) --editable .[eval,test,check]
	@touch $@
