# All but test-gpu and test-sanitized run in the pinned environment of requirements.txt, which they set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: bench test check format test-gpu clean

bench: $(READY)  # trains one network with SGD, SAM and ESAM; prints and keeps what each costs and buys
	$(BIN)/python -m benchmarks.train

test: $(READY)  # the whole test suite; needs no GPU
	$(BIN)/python -m pytest -q

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Everything that needs a GPU, in under 9 minutes, with the Python that is there: it needs no network and no environment.
test-gpu: export PYTHONPATH := .
test-gpu:
	timeout 120 $(PYTHON) setup.py --quiet build_ext --inplace
	status=0; \
	timeout 150 $(PYTHON) -m pytest -q -p no:cacheprovider tests/test_operators.py || status=$$?; \
	timeout 90 $(PYTHON) -m pytest -q -p no:cacheprovider -m gpu tests || status=$$?; \
	timeout 180 $(PYTHON) -m benchmarks.kernels --out benchmarks/results/kernels_cuda.json || status=$$?; \
	exit $$status

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
