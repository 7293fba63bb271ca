# All but the -gpu targets run in the pinned environment of requirements.txt, which they set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: bench test check format sanitize test-gpu sanitize-gpu clean

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

# The native CPU operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(READY)
	ESAM_KERNELS_NATIVE=require CXXFLAGS="-g -O1 -fno-omit-frame-pointer $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
	$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONSAFEPATH=1 PYTHONPATH=build/sanitize/lib \
	$(BIN)/python -m pytest -q --capture=sys tests/test_operators.py tests/test_native.py \
		-k "native-cpu or threads or version or differ or larger or refuse"

# Everything that needs a GPU, in under 9 minutes, with the Python that is there: it needs no network and no environment.
test-gpu: export PYTHONPATH := .
test-gpu:
	timeout 120 $(PYTHON) setup.py --quiet build_ext --inplace
	status=0; \
	timeout 150 $(PYTHON) -m pytest -q -p no:cacheprovider tests/test_operators.py || status=$$?; \
	timeout 90 $(PYTHON) -m pytest -q -p no:cacheprovider -m gpu tests || status=$$?; \
	timeout 180 $(PYTHON) -m benchmarks.kernels --out benchmarks/results/kernels_cuda.json || status=$$?; \
	exit $$status

# The native CUDA operators' tests under compute-sanitizer.
sanitize-gpu: export PYTHONPATH := .
sanitize-gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PYTHON) -m pytest -q -p no:cacheprovider tests/test_operators.py -k native-cuda || exit 1; \
	done

clean:
	rm -f esam_kernels/ops/libesam_kernels.so esam_kernels/ops/native_build.json
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
