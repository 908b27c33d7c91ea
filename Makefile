# The front door: `make demo` runs the main job, `make test` the tests; both install what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs benchmark clean help

help:
	@echo "make demo       train a small language model on a sharded context, beside an unsharded one"
	@echo "make test       run the tests"
	@echo "make lint       ruff and mypy"
	@echo "make docs       write the pages that are made from the code"
	@echo "make benchmark  time and memory on this CPU, into benchmarks/results"
	@echo "make clean      remove the virtual environment and caches"

$(INSTALLED): pyproject.toml $(wildcard plugins/*/pyproject.toml) requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/ring-attention demo

# One worker runs what needs a pool of ranks, the other one all else.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict examples/plugin_template/src examples/tracing_plugin/src

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/cpu.py --output benchmarks/results

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-report
