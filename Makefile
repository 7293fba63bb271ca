# All but the -gpu targets run in the pinned environment of requirements.txt, which they set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: bench results results-digits results-images test test-newest attack docs wheel wheel-test check format
.PHONY: sanitize test-gpu gpu sanitize-gpu clean

bench: $(READY)  # what SGD, SAM and ESAM cost and buy here, in short, with a page in build/bench; 6 minutes on 2 cores
	$(BIN)/python -m benchmarks bench

results: $(READY)  # what steps cost in full, into benchmarks/results and the README; half an hour on 2 quiet cores
	$(BIN)/python -m benchmarks train --restart
	$(BIN)/python -m benchmarks step_cost --time-budget 900 --restart
	$(BIN)/python -m benchmarks memory --restart
	$(BIN)/python -m benchmarks host_time --restart
	$(BIN)/python -m benchmarks rounding --restart
	$(BIN)/python -m benchmarks operators --models ResNet-18 ViT-B/16 --repeats 5 --restart
	$(BIN)/python -m benchmarks report

# Accuracy against cost. Every finished run is kept: given again, the command goes on.
results-digits: export OMP_NUM_THREADS := 1
results-digits: $(READY)  # with a fifth of the labels wrong; an hour on one core
	$(BIN)/python -m benchmarks frontier --train-samples 800 --validation-samples 200 \
		--choose 0.5 1 2 4 --choose-seeds 3 --seeds 5 --rounds 8 --configurations sgd sam esam esam-random \
		esam-loss sgd-short momentum previous share-quarter share-half sam-tail0.2 sam-tail0.5 sam-interval2 \
		sam-interval5 momentum-then-sam momentum-random nesterov momentum-plus random-direction esam-bf16 esam-gamma1
	$(BIN)/python -m benchmarks report

results-images: export OMP_NUM_THREADS := 1
results-images: images := --data cifar10 --data-file $(DATA) --train-samples 10000 --validation-samples 2000 \
	--image-size 16 --sharpness-samples 0 --rounds 4
results-images: $(READY)  # on a fifth of CIFAR-10, at DATA; seven hours on one core
	$(BIN)/python -m benchmarks frontier $(images) --width 8 --channels-last --epochs 30 --seeds 5 --lr 0.2 \
		--choose 0.5 1 2 --configurations sgd nesterov sam esam momentum previous share-quarter sam-tail0.2 sam-tail0.5
	$(BIN)/python -m benchmarks frontier $(images) --rounds 10 --width 8 --channels-last --no-augment --epochs 15 --seeds 5 \
		--lr 0.4 --choose 0.5 1 2 --configurations sgd nesterov sam esam esam-random momentum momentum-plus \
		random-direction previous share-quarter share-half sam-tail0.2 sam-tail0.5 esam-tail0.2 esam-tail0.5 \
		sam-interval2 sam-interval5 momentum-then-sam sgd-short
	$(BIN)/python -m benchmarks frontier $(images) --rounds 10 --model vit_s --width 32 --epochs 15 --seeds 5 --base adamw \
		--lr 3e-3 --weight-decay 0.05 --choose 0.1 0.5 1 2 --configurations sgd sam momentum previous sam-tail0.2 \
		sam-tail0.5 momentum-then-sam
	$(BIN)/python -m benchmarks report

test: $(READY)  # the whole test suite; needs no GPU
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-newest:  # the whole test suite under the newest torch, of requirements-newest.txt; from the index that is gigabytes
	$(PYTHON) -m venv build/newest
	grep -vE '^(torch|triton)==' requirements.txt > build/newest/others.txt
	build/newest/bin/python -m pip install --quiet -r requirements-newest.txt -r build/newest/others.txt
	build/newest/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	build/newest/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# The sdist and the wheel in dist/, built in isolation; on Linux tagged for as old a system as its symbols allow, of which
# libtorch_cpu.so is none: torch brings it.
wheel: $(READY)
	rm -rf build/dist dist
	ESAM_KERNELS_NATIVE=require $(BIN)/python -m build --outdir build/dist
	mkdir -p dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	for file in build/dist/*.tar.gz; do tar -tzf "$$file"; done
	for file in dist/*.whl; do $(PYTHON) -m zipfile --list "$$file"; done
	ls -l dist

# The wheel in fresh environments: WHEEL_TEST="--python 3.12 3.13 --torch 2.15.0"; all that docs/install.md names if empty.
wheel-test:
	$(PYTHON) scripts/wheel_test.py dist/*.whl $(WHEEL_TEST)

attack: $(READY)  # exceptions at any instant of a step, for 10 minutes: nothing may be lost; counts in build/attack.json
	PYTHONPATH=. $(BIN)/python tests/attack.py --minutes 10 --output build/attack.json

docs: $(READY)  # the site in build/site; needs no network, and fails on a dead link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Written to build/site: open index.html, or run '$(BIN)/mkdocs serve' to see what you write"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The native operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer: the CPU's, and CUDA's in the emulator.
sanitize: export CXXFLAGS := -g -O1 -fno-omit-frame-pointer $(SANITIZERS)
sanitize: export LDFLAGS := $(SANITIZERS)
sanitize: $(READY)
	ESAM_KERNELS_NATIVE=require \
	$(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONSAFEPATH=1 PYTHONPATH=build/sanitize/lib \
	$(BIN)/python -m pytest -q --capture=sys tests/operators/test_operators.py tests/operators/test_native.py tests/operators/test_cuda_kernels_emulated.py \
		-k "native-cpu or threads or version or differ or larger or refuse or emulated"

# Tests on a GPU, in under 7 minutes, with the Python that is there: they need no network and no environment. Triton's
# operators and the reference are tested even where the native ones cannot be built.
test-gpu: export PYTHONPATH := .
test-gpu:
	timeout 120 $(PYTHON) setup.py --quiet build_ext --inplace || echo 'The native operators were not built: going on without.' >&2
	status=0; \
	timeout 90 $(PYTHON) -m pytest -q -p no:cacheprovider -m gpu $(shell grep -rl --include=test_*.py mark.gpu tests) || status=$$?; \
	timeout 150 $(PYTHON) -m pytest -q -p no:cacheprovider tests/operators/test_operators.py || status=$$?; \
	exit $$status

# All that a GPU is needed for, in the order of its worth, within MINUTES; given again, it goes on with what is left.
# CIFAR10: cifar-10-python.tar.gz, its folder, or an .npz; without it, accuracy is left out. Results are in build/gpu.
MINUTES ?= 9.5
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks gpu --minutes $(MINUTES) $(if $(CIFAR10),--data-file "$(CIFAR10)")

# The native CUDA operators' tests under compute-sanitizer.
sanitize-gpu: export PYTHONPATH := .
sanitize-gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PYTHON) -m pytest -q -p no:cacheprovider tests/operators/test_operators.py -k native-cuda || exit 1; \
	done

clean:
	rm -f esam_kernels/ops/libesam_kernels.so esam_kernels/ops/native_build.json
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
