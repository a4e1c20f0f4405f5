# Everything runs in .venv, which each target makes if need be. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck figures tables notebook bench soak mutations wheel clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## The main experiment on the built-in data set: sweep, figures, verdict (5 minutes)
	$(BIN)/degrade sweep experiments/demo.toml --out demo-results
	$(BIN)/degrade plot demo-results
	$(BIN)/degrade verdict demo-results

test: $(READY)  ## The tests (set DEGRADE_DATA to include those on genuine CIFAR-10)
	$(BIN)/python -m pytest

lint: $(READY)  ## Style, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

typecheck: $(READY)  ## Types
	$(BIN)/mypy

figures: $(READY)  ## Redraw the figures of the reference results, and their report
	$(BIN)/degrade plot results
	$(BIN)/degrade report results

tables: $(READY)  ## Write the numbers of README.md and docs/ anew, from results/
	$(BIN)/python docs/tables.py

notebook: $(READY)  ## Execute the notebook in examples/ anew (a minute or two)
	$(BIN)/python examples/execute.py

bench: $(READY)  ## The engine beside the public loop on this machine (needs DEGRADE_DATA)
	$(BIN)/python benchmarks/compare.py

soak: $(READY)  ## The tests of the promises, four times as often as in make test (tests/SOAK.md)
	DEGRADE_SOAK=1 $(BIN)/python -m pytest -m promise -o faulthandler_timeout=0

mutations: $(READY)  ## Break each promise in a copy of the code, and see its test fail
	$(BIN)/python tests/mutations.py

wheel: $(READY)  ## Build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## Remove what was made, but not results
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
