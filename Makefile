# Each target is a thin line that a person could type. If there is no .venv, make creates it.

PYTHON ?= python3
BAZEL ?= bazel
# Debian's Bazel has no network: see .bazelrc.
BAZEL_FLAGS ?= $(if $(wildcard /usr/share/bazel/rules/java),--config=offline)
# One worker a core, because each imports TensorFlow. A worker gets neighbouring tests, because they
# share results.
PYTEST_FLAGS ?= -n auto --dist worksteal --durations=20

export TF_CPP_MIN_LOG_LEVEL ?= 2
BIN := .venv/bin
BENCH := build/bench/venv/bin/python -m continual_transformers_tf.cli bench --programs build/bench
RUN_BAZEL := bazel/offline/configure.sh && PATH="$(CURDIR)/$(BIN):$$PATH" $(BAZEL)
TENSORFLOW = $(shell $(PYTHON) -c "import runpy; print(runpy.run_path('cc/library.bzl')['TENSORFLOWS'][-1])")
FORMATTED_CC := $(wildcard cc/*/*.h cc/*/*.cc cc/*/*/*.h cc/*/*/*.cc cuda/*.cu cuda/*.cuh cuda/*.h \
  cuda/session/* \
  tests/cc/*.h tests/cc/*.cc tests/cc/*/*.h tests/cc/*/*.cc tests/gpu/*.cu tools/gpu/emulator/*.h benchmarks/cc/*.cc examples/*/*.cc \
  python/continual_transformers_tf/include/*.h python/continual_transformers_tf/include/*.hpp)

.PHONY: demo serve test test-torch test-slow test-wheels test-aarch64 test-every-case lint format bazel-build \
  bazel-cuda bazel-test sanitize guard guard-record bench bench-session bench-examples bench-serving \
  bench-cc cuda-resources gpu gpu-bundle gpu-tensorflow gpu-tensorflow-bundle docs wheel clean

demo: .venv/installed
	$(BIN)/continual-transformers demo --picture build/demo.png

# A server of the demo's model, until Ctrl-C. SERVE_FLAGS are more options of the server.
GRPC_PORT ?= 8001
HTTP_PORT ?= 8000
serve: build/watch.safetensors
	@echo "To stream real data to it, run in another terminal:"
	@echo "  $(BIN)/continual-transformers load --url 127.0.0.1:$(GRPC_PORT) --model-file $<"
	$(BIN)/continual-transformers serve watch=$< --grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT) \
	  $(SERVE_FLAGS)

build/watch.safetensors: .venv/installed
	$(BIN)/continual-transformers demo --save-model $@

# About six minutes on two cores. The first run, and one after a change in cuda/, takes a minute more: it
# builds the kernels for the emulator.
test: .venv/test-tools
	$(BIN)/python -m pytest -m "not slow and not every_case" $(PYTEST_FLAGS)

# The tests that need PyTorch and continual-inference. `make test` skips them if these are missing. The
# extra belongs to the package that is installed here, so pip builds nothing.
test-torch: .venv/test-tools
	$(BIN)/python -m pip install --quiet "continual-transformers-tf[torch]"
	$(BIN)/python -m pytest tests/test_from_torch.py tests/test_docs.py tests/test_docs_pages.py \
	  benchmarks/gpu/test_gpu_benchmark.py tests/gpu_sessions/test_session_benchmark.py $(PYTEST_FLAGS)

# The slow tests: wheels in clean environments, every instruction set of the kernels, deep stacks, and
# the cases of model grids of which `make test` runs a sample.
test-slow: .venv/test-tools
	$(BIN)/python -m pytest -m "slow and not every_wheel and not every_case and not aarch64" $(PYTEST_FLAGS)

# Every wheel with every TensorFlow that it supports, each in a clean environment.
test-wheels: .venv/test-tools
	$(BIN)/python -m pytest tests/test_packaging.py -m slow -k a_wheel

# All C++ tests and the wheels for AArch64, on a machine of another kind. It compiles everything with a
# cross compiler, and runs it under qemu.
test-aarch64: .venv/test-tools
	@which aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null && test -d /usr/src/googletest || \
	  { echo "On Debian: apt install g++-aarch64-linux-gnu libgtest-dev qemu-user"; exit 1; }
	$(BIN)/python -m pip install --quiet "continual-transformers-tf[wheel]"
	$(BIN)/python -m pytest tests/test_aarch64.py --durations=20

# The cases of grids of which `make test` and `make test-slow` run a sample.
test-every-case: .venv/test-tools
	$(BIN)/python -m pytest -m "every_case" $(PYTEST_FLAGS)

# About a minute on two idle cores, most of it clang-tidy.
lint: .venv/test-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_CC)
	$(BIN)/python tools/clang_tidy.py

format: .venv/test-tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(FORMATTED_CC)

bazel-build: .venv/test-tools
	$(RUN_BAZEL) build $(BAZEL_FLAGS) //...

# The op library with kernels for GPUs, and the library of sessions on them.
bazel-cuda: .venv/test-tools
	$(RUN_BAZEL) build $(BAZEL_FLAGS) --config=cuda //cc:op_library //cuda:session_library

bazel-test: .venv/test-tools
	$(RUN_BAZEL) test $(BAZEL_FLAGS) //...

# The C++ tests with AddressSanitizer and UBSan, and the thread tests with ThreadSanitizer.
sanitize: .venv/test-tools
	$(RUN_BAZEL) test $(BAZEL_FLAGS) --config=asan //tests:cc
	$(RUN_BAZEL) test $(BAZEL_FLAGS) --config=tsan //tests:threads

# Whether a step of fixed models costs more instructions, memory accesses or allocations than what is
# recorded in benchmarks/step_counts.json. It needs valgrind, and takes about a minute.
guard: .venv/installed
	$(BIN)/python tools/step_counts.py check

guard-record: .venv/installed
	$(BIN)/python tools/step_counts.py record

# What each GPU kernel uses: registers, spills, stack, shared memory.
cuda-resources:
	$(PYTHON) cuda/resources.py

# The race against all rivals, and what has goals on AVX2 too. It takes about 25 minutes on an idle
# machine, and writes docs/benchmarks.md and its pictures, of which headline.png is the README's.
bench: build/bench/programs
	$(BENCH) --avx2 --json build/bench.json --picture docs/benchmarks.png --headline docs/headline.png \
	  --markdown docs/benchmarks.md

# The other goals of a session: even steps, cheap streams, little memory.
bench-session: build/bench/programs
	$(BENCH) --session

# The models of examples/models against their bounds, and layers against sequence-layers in JAX: the
# tables of examples/models/README.md.
bench-examples: build/bench/programs
	build/bench/venv/bin/python benchmarks/examples/example_benchmark.py $(BENCH_FLAGS)

# Only the kernels, and a plain read of the same bytes for comparison.
bench-cc: .venv/test-tools
	$(RUN_BAZEL) run $(BAZEL_FLAGS) //benchmarks:single_output_benchmark
	$(RUN_BAZEL) run $(BAZEL_FLAGS) //benchmarks:retroactive_benchmark

# The server, against its floor, a server in Python, and a session in one process.
bench-serving: .venv/installed
	$(BIN)/python benchmarks/serving.py

# Builds, checks and times the CUDA kernels, in at most eight minutes. Results are in build/gpu or $OUT.
# It needs a GPU, nvcc and PyTorch. It does not need .venv, TensorFlow or a network. With
# build/gpu-bundle it does the same for sessions on a GPU.
gpu:
	$(PYTHON) tools/gpu/gpu_run.py

# Collects in build/gpu-bundle what `make gpu` needs for sessions and a machine with only a GPU lacks.
# Run it on a machine with .venv, and take the folder along.
gpu-bundle: .venv/test-tools
	$(BIN)/python tools/gpu/make_bundle.py

# Runs the op inside TensorFlow on the GPU of this machine: its tests, then a benchmark, in at most eight
# minutes. It needs a GPU and pytest. With the slices in build/gpu-tensorflow it needs no TensorFlow.
gpu-tensorflow:
	$(PYTHON) tools/gpu/tensorflow_run.py

# Downloads GPU TensorFlow (600 MB), removes what one kind of GPU does not need, builds the op library
# for it, and cuts all into slices in build/gpu-tensorflow. Run it on a machine with .venv, nvcc and xz.
# TENSORFLOW_BUNDLE_FLAGS="--python 3.12 --capability 90" says for which GPU machine.
gpu-tensorflow-bundle: .venv/test-tools
	$(BIN)/python tools/gpu/make_tensorflow_bundle.py $(TENSORFLOW_BUNDLE_FLAGS)

# Writes the docs site to build/docs. A broken link is an error.
docs: .venv/installed
	$(BIN)/python -m pip install --quiet "continual-transformers-tf[docs]"
	$(BIN)/mkdocs build --strict

# Writes the wheels to dist/: one for each CPython that is found, and one with GPU kernels. With a cross
# compiler for AArch64, another for each CPython. WHEEL_FLAGS="--machine x86_64" leaves these out.
wheel: .venv/installed
	$(BIN)/python -m pip install --quiet "continual-transformers-tf[wheel]"
	$(BIN)/python tools/wheels.py dist $(WHEEL_FLAGS)

clean:
	rm -rf .venv build dist

# The rivals have a separate environment, because some install other versions of packages in .venv. It
# finds the other packages in .venv.
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

# TensorFlow comes first: the op library is then built for it, and not for a TensorFlow that pip would
# fetch only for the build. With CONTINUAL_TRANSFORMERS_CUDA=1 and an nvcc, the GPU kernels are built
# too. Unchanged files are not compiled again.
.venv/installed: .venv/bin/python setup.py pyproject.toml tools/object_files.py \
  tools/server_packages.py tools/embed.py \
  $(wildcard cc/*.bzl cc/*.lds cc/*/* cc/*/*/* cuda/*.* cuda/session/*)
	@echo "Installing TensorFlow $(TENSORFLOW) in .venv ..."
	@$(BIN)/python -m pip install --quiet "tensorflow-cpu==$(TENSORFLOW).*"
	@echo "Building this package with $$($${CXX:-g++} --version | head -1) ..."
	@$(BIN)/python -m pip install --quiet --editable ".[client,cpu,demo]"
	@touch $@

# What tests, linters and Bazel need beside it.
.venv/test-tools: .venv/installed
	$(BIN)/python -m pip install --quiet "continual-transformers-tf[test]"
	touch $@
