"""Run the tests of the GPU's ops without a GPU.

The kernels are emulated. Their TensorFlow side is the real one, registered for the CPU in place of
the CPU's own kernels.

    python tests/gpu/emulated_ops.py [what pytest takes]

builds this op library in a copy of the package, in build/emulated_ops. Then it runs the tests in
`tests/` that are not only about the CPU; without arguments, only those of the ops. It does not find
errors that the emulator cannot find, or errors that come from a GPU's separate memory.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import tensorflow as tf

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from object_files import compile_object, side_by_side  # noqa: E402  In tools/.

BUILD = ROOT / "build" / "emulated_ops"
PACKAGE = "continual_transformers_tf"

# The CPU's own kernels of the same ops; and op_stream.cc, because the CPU has no CUDA streams.
LEFT_OUT = {
    "tensorflow/single_output_kernel.cc",
    "tensorflow/co_si_encoder_step_kernel.cc",
    "tensorflow/co_si_mha_step_kernel.cc",
    "tensorflow/retroactive_kernel.cc",
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
    "test_single_output_gradient.py", "test_single_output_device.py", "test_co_si_mha_step.py",
    "test_co_si_mha_streams.py", "test_co_si_mha_query_index.py", "test_co_si_mha_device.py",
    "test_co_si_transformer_encoder.py",
    "test_retroactive.py", "test_retroactive_stability.py", "test_co_re_mha.py",
    "test_known_positions.py",
)  # fmt: skip


def compile_one(source):
    """Compile a source file if it or a header has changed, and return the object."""
    made = BUILD / "objects" / f"{source.relative_to(source.anchor)}.o"
    lists = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
    command = [
        os.environ.get("CXX", "g++"), *lists["COMPILER_OPTIONS"], *lists["HIDDEN_OPTIONS"], "-fPIC",
        f"-I{ROOT}", *tf.sysconfig.get_compile_flags()[1:],
        *("-isystem", tf.sysconfig.get_include()),
        f'-DCONTINUAL_TRANSFORMERS_TENSORFLOW="{tf.__version__}"',
    ]  # fmt: skip
    if "gpu" in source.parts or source.suffix == ".cu":
        # _FORTIFY_SOURCE reports the emulator's jumps out of fibers as errors.
        command += [f"-I{ROOT}/tools/gpu/emulator", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
        command += ['-DCONTINUAL_TRANSFORMERS_CUDA_BUILD="emulated"', "-DDEVICE_GPU=DEVICE_CPU"]
        command += ["-O1"]
    compile_object([*command, "-x", "c++", "-c", str(source)], made)
    return made


def build():
    """Build the library in a copy of the package; return the folder to import it from."""
    lists = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
    parts = ("TENSORFLOW", "BUILD_INFO", "TENSORFLOW_GPU")
    names = [name for part in parts for name in lists[f"{part}_SOURCES"]]
    sources = [ROOT / "cc" / name for name in names if name not in LEFT_OUT]
    sources += sorted(path for path in (ROOT / "cuda").glob("*.cu") if path.name != "c_api.cu")
    no_stream = BUILD / "gpu" / "no_stream.cc"
    no_stream.parent.mkdir(parents=True, exist_ok=True)
    if not no_stream.exists() or no_stream.read_text() != NO_STREAM:
        no_stream.write_text(NO_STREAM)
    objects = side_by_side(compile_one, [*sources, no_stream])
    package = BUILD / "python" / PACKAGE
    shutil.copytree(
        ROOT / "python" / PACKAGE, package, dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("libcontinual_transformers_tf*.so", "__pycache__"),
    )  # fmt: skip
    minor = ".".join(tf.__version__.split(".")[:2])
    library = package / lists["OP_LIBRARY"].format(MINOR=minor)
    made = library.with_suffix(".new")
    links = [*tf.sysconfig.get_link_flags(), *lists["BESIDE_CORE_LINK_OPTIONS"]]
    links += [f"-L{package}", f"-l:{lists['CORE_LIBRARY']}"]
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
