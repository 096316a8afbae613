# Each target is a thin line that a person could type; .venv is made where there is none.

PYTHON ?= python3
BAZEL ?= bazel
# Debian's Bazel has no network: see .bazelrc.
BAZEL_FLAGS ?= $(if $(wildcard /usr/share/bazel/rules/java),--config=offline)
# One worker a core, because each imports TensorFlow. Each gets a run of neighbouring tests, which share
# what they have computed.
PYTEST_FLAGS ?= -n auto --dist worksteal

export TF_CPP_MIN_LOG_LEVEL ?= 2
BIN := .venv/bin
BENCH := build/bench/venv/bin/python -m continual_transformers_tf.cli bench --programs build/bench
RUN_BAZEL := bazel/offline/configure.sh && PATH="$(CURDIR)/$(BIN):$$PATH" $(BAZEL)
TENSORFLOW = $(shell $(PYTHON) -c "import runpy; print(runpy.run_path('cc/library.bzl')['TENSORFLOW_DEFAULT'])")
FORMATTED_CC := $(wildcard cc/*/*.h cc/*/*.cc cc/*/*/*.h cc/*/*/*.cc cuda/*.cu cuda/*.cuh cuda/*.h \
  tests/cc/*.h tests/cc/*.cc tools/gpu/emulator/*.h benchmarks/cc/*.cc examples/*/*.cc \
  python/continual_transformers_tf/include/*.h python/continual_transformers_tf/include/*.hpp)

.PHONY: demo test test-torch test-slow lint format bazel-build bazel-cuda bazel-test sanitize bench \
  bench-session bench-cc cuda-resources gpu wheel clean

demo: .venv/installed
	$(BIN)/continual-transformers demo --picture build/demo.png

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

# The tests that need PyTorch and continual-inference. `make test` skips them if these are missing. The
# extra belongs to the package that is installed here, so pip builds nothing.
test-torch: .venv/installed
	$(BIN)/python -m pip install --quiet "continual-transformers-tf[torch]"
	$(BIN)/python -m pytest tests/test_from_torch.py tests/test_docs.py \
	  benchmarks/gpu/test_gpu_benchmark.py $(PYTEST_FLAGS)

# The tests that take long: wheels in clean environments, every target of the kernels, deep stacks.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

# About a minute on two idle cores, most of it clang-tidy.
lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_CC)
	$(BIN)/python tools/clang_tidy.py

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED_CC)

bazel-build: .venv/installed
	$(RUN_BAZEL) build $(BAZEL_FLAGS) //...

# The op library with kernels for GPUs.
bazel-cuda: .venv/installed
	$(RUN_BAZEL) build $(BAZEL_FLAGS) --config=cuda //cc:op_library

bazel-test: .venv/installed
	$(RUN_BAZEL) test $(BAZEL_FLAGS) //...

# The C++ tests with AddressSanitizer and UBSan, and those of threads with ThreadSanitizer.
sanitize: .venv/installed
	$(RUN_BAZEL) test $(BAZEL_FLAGS) --config=asan //tests:cc
	$(RUN_BAZEL) test $(BAZEL_FLAGS) --config=tsan //tests:threads

# What each kernel for GPUs takes of one: registers, spills, stack, shared memory.
cuda-resources:
	$(PYTHON) cuda/resources.py

# Against everyone else, into build/ and docs/benchmarks.md; half an hour.
bench: build/bench/programs
	$(BENCH) --json build/bench.json --picture docs/benchmarks.png --markdown docs/benchmarks.md

# What a session promises beside a fast step: even steps, cheap streams, little memory.
bench-session: build/bench/programs
	$(BENCH) --session

# The kernels alone, next to a plain read of the same bytes.
bench-cc: .venv/installed
	$(RUN_BAZEL) run $(BAZEL_FLAGS) //benchmarks:single_output_benchmark
	$(RUN_BAZEL) run $(BAZEL_FLAGS) //benchmarks:retroactive_benchmark

# On a machine with a GPU, nvcc and PyTorch: builds, checks and times the CUDA kernels, into build/gpu
# or $OUT, in at most eight minutes. Without .venv, TensorFlow or a network.
gpu:
	$(PYTHON) tools/gpu/gpu_run.py

# Into dist/.
wheel: .venv/installed
	$(RUN_BAZEL) run $(BAZEL_FLAGS) //bazel:wheel -- "$(CURDIR)/dist"

clean:
	rm -rf .venv build dist

# The rivals have an environment of their own, for some bring other versions of what is in .venv; it
# sees the rest there.
build/bench/installed: .venv/installed
	$(PYTHON) -m venv build/bench/venv
	cd build/bench/venv/lib/python*/site-packages && \
	  $(CURDIR)/$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % \
	  sysconfig.get_path('purelib'))" > venv.pth
	build/bench/venv/bin/python -m pip install --quiet "continual-transformers-tf[bench]"
	touch $@

build/bench/programs: build/bench/installed tools/build_benchmarks.py \
  $(wildcard benchmarks/cc/*)
	build/bench/venv/bin/python tools/build_benchmarks.py build/bench
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv || { echo "No virtual environment: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel

# TensorFlow first: the op library is then built for it, and not for one that pip would fetch for the
# build alone. With kernels for GPUs where there is an nvcc; CONTINUAL_TRANSFORMERS_CUDA=0 leaves them
# out. What has not changed since the last build is not compiled again.
.venv/installed: .venv/bin/python setup.py pyproject.toml tools/object_files.py \
  $(wildcard cc/*.bzl cc/*.lds cc/*/* cc/*/*/* cuda/*.*)
	$(BIN)/python -m pip install --quiet "tensorflow-cpu==$(TENSORFLOW).*"
	$(BIN)/python -m pip install --quiet --editable ".[cpu,demo,test]"
	touch $@
