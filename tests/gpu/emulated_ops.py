"""Tests the ops for GPUs where there is no GPU: the kernels emulated, and TensorFlow's side of them
as it is, but registered for the CPU in place of the CPU's own.

    python tests/gpu/emulated_ops.py [what pytest takes]

builds such an op library beside a copy of the package, in build/emulated_ops, and runs the tests in
`tests/` that are not about the CPU alone; without arguments those of the ops. What it cannot find
is what the emulator cannot, and whatever comes of a GPU's memory being another than the host's.
"""

import concurrent.futures
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import tensorflow as tf

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated_ops"
PACKAGE = "continual_transformers_tf"

# The CPU's own kernels of the same ops; and the stream of an op, of which the CPU has none.
LEFT_OUT = {
    "tensorflow/single_output_kernel.cc",
    "tensorflow/co_si_mha_step_kernel.cc",
    "tensorflow/gpu/op_stream.cc",
}
NO_STREAM = """
#include "cc/tensorflow/gpu/op_stream.h"
namespace continual_transformers {
cudaStream_t StreamOf(tensorflow::OpKernelContext*) { return nullptr; }
}
"""

TESTS = (
    "test_single_output.py", "test_single_output_state.py", "test_single_output_refuses.py",
    "test_single_output_gradient.py", "test_co_si_mha_step.py", "test_co_si_mha_streams.py",
    "test_co_si_mha_query_index.py", "test_co_si_transformer_encoder.py",
)  # fmt: skip


def compile_one(source):
    """The object of a source file, made anew where the source or a header that it includes is."""
    made = BUILD / "objects" / f"{source.relative_to(source.anchor)}.o"
    listed = made.with_suffix(".d")
    if made.exists() and listed.exists():
        files = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        paths = [ROOT / name for name in files]
        if all(path.exists() and path.stat().st_mtime < made.stat().st_mtime for path in paths):
            return made
    made.parent.mkdir(parents=True, exist_ok=True)
    lists = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
    include = tf.sysconfig.get_include()
    command = [
        os.environ.get("CXX", "g++"), *lists["COMPILER_OPTIONS"], "-fPIC", "-I.",
        *tf.sysconfig.get_compile_flags()[1:],
        *("-isystem", include, "-isystem", f"{Path(include).parent}/{lists['HIGHWAY_INCLUDE']}"),
        f'-DCONTINUAL_TRANSFORMERS_TENSORFLOW="{tf.__version__}"', "-MMD", "-MF", str(listed),
    ]  # fmt: skip
    if "gpu" in source.parts or source.suffix == ".cu":
        # To the emulator a fiber that is left by a jump is an error of _FORTIFY_SOURCE's.
        command += ["-Itests/gpu/emulator", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
        command += ['-DCONTINUAL_TRANSFORMERS_CUDA_BUILD="emulated"', "-DDEVICE_GPU=DEVICE_CPU"]
        command += ["-O1"]
    subprocess.run(
        [*command, "-x", "c++", "-c", str(source), "-o", str(made)], check=True, cwd=ROOT
    )
    return made


def build():
    """Builds the library beside a copy of the package; returns the folder to import it from."""
    lists = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
    names = [
        name
        for part in ("ATTENTION_SOURCES", "TENSORFLOW_SOURCES", "TENSORFLOW_GPU_SOURCES")
        for name in lists[part]
    ]
    sources = [ROOT / "cc" / name for name in names if name not in LEFT_OUT]
    sources += sorted(path for path in (ROOT / "cuda").glob("*.cu") if path.name != "c_api.cu")
    no_stream = BUILD / "gpu" / "no_stream.cc"
    no_stream.parent.mkdir(parents=True, exist_ok=True)
    if not no_stream.exists() or no_stream.read_text() != NO_STREAM:
        no_stream.write_text(NO_STREAM)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, no_stream]))
    package = BUILD / "python" / PACKAGE
    shutil.copytree(
        ROOT / "python" / PACKAGE, package, dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )  # fmt: skip
    library = package / "libcontinual_transformers.so"
    made = library.with_suffix(".new")
    links = tf.sysconfig.get_link_flags()
    subprocess.run(["g++", "-shared", *map(str, objects), *links, "-o", str(made)], check=True)
    made.replace(library)
    return package.parent


def main():
    folder = build()
    options = sys.argv[1:] or [f"tests/{name}" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-m", "not cpu_only and not slow", *options]
    search = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    raise SystemExit(
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": search}).returncode
    )


if __name__ == "__main__":
    main()
