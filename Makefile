# Every target sets up what it needs: the pinned environment of requirements.txt, in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: bench test check format test-gpu clean

bench: $(READY)  ## train one network with SGD, SAM and ESAM; print and keep what each costs and buys
	$(BIN)/python -m benchmarks.train

test: $(READY)  ## the whole test suite; needs no GPU
	$(BIN)/python -m pytest -q

check: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(READY): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
