"""pip's way in: the metadata that depends on TensorFlow, and the op library.

The library is built with the system's compiler against the TensorFlow that is installed where the
package is going.
"""

import importlib
import os
import runpy
import shutil
import site
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

VERSION = "0.1.0"
# Of those that numbers are held against, in the race and in the tests of ct.from_torch.
TORCH = ["continual-inference==1.2.4", "torch==2.13.0"]
CC = runpy.run_path("cc/library.bzl")
sys.path.insert(0, "cuda")
nvcc = importlib.import_module("nvcc")
# Set by the Bazel build of the wheel: the library is there and only to be packed.
PREBUILT_LIBRARY = os.environ.get("CONTINUAL_TRANSFORMERS_PREBUILT_LIBRARY")


def find_tensorflow():
    """(folder, version) of the TensorFlow installed, or None.

    pip builds in an environment of its own, whose Python cannot import what is installed beside it;
    but the folders in which that lies are those of the same interpreter.
    """
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], site.getusersitepackages()]
    # sys.path: where pip puts what it fetched for the build alone.
    for folder in dict.fromkeys([*folders, *filter(os.path.isdir, sys.path)]):
        for distribution in metadata.distributions(path=[folder]):
            if distribution.name in ("tensorflow", "tensorflow-cpu", "tensorflow_cpu"):
                headers = Path(folder, "tensorflow", "include", "tensorflow")
                if headers.is_dir():
                    return Path(folder, "tensorflow"), distribution.version
    return None


TENSORFLOW = find_tensorflow()
MINOR = ".".join(TENSORFLOW[1].split(".")[:2]) if TENSORFLOW else CC["TENSORFLOW_DEFAULT"]


class build_op_library(build_ext):
    """Builds the op library: an extension in all but its name, which knows no version of Python."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], CC["LIBRARY_NAME"]))

    def build_extension(self, ext):
        if PREBUILT_LIBRARY:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PREBUILT_LIBRARY, target)
            return
        if TENSORFLOW is None:
            raise SystemExit(
                "continual-transformers-tf: no TensorFlow to build for. Install one first, "
                f"`pip install 'tensorflow-cpu=={MINOR}.*'`, or leave pip's build isolation on."
            )
        # setuptools would keep what an earlier build left here, whatever it was built with and for.
        self.force = True
        folder, version = TENSORFLOW
        print(f"building the op library for TensorFlow {version}, {folder}")
        ext.define_macros += [("CONTINUAL_TRANSFORMERS_TENSORFLOW", f'"{version}"')]
        # -isystem: TensorFlow's headers warn of their own deprecations.
        # -g0: Python's own flags ask for debug information, 4 MB of it.
        for include in ("include", CC["HIGHWAY_INCLUDE"]):
            ext.extra_compile_args += ["-isystem", str(folder / include)]
        ext.extra_compile_args += ["-g0"]
        ext.extra_link_args += [f"-L{folder}"]
        cuda = nvcc.chosen()
        if cuda:
            print(f"with CUDA {cuda}")
            ext.define_macros += [
                ("CONTINUAL_TRANSFORMERS_CUDA", "1"),
                ("CONTINUAL_TRANSFORMERS_CUDA_BUILD", f'"{cuda}"'),
            ]
            ext.sources += [f"cc/{name}" for name in CC["TENSORFLOW_GPU_SOURCES"]]
            for include in cuda.include:
                ext.extra_compile_args += ["-isystem", include]
            objects = cuda.compile_all(CC["CUDA_SOURCES"], nvcc.OBJECTS)
            ext.extra_objects += map(str, objects)
            # First: TensorFlow's library may have functions of the same names.
            libraries = [f"-L{lib}" for lib in cuda.lib]
            ext.extra_link_args[:0] = libraries + CC["CUDA_LINK_OPTIONS"]
        # Files side by side, which setuptools compiles one after the other.
        compile_files = self.compiler.compile

        def compile_side_by_side(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_files([source], **options), sources)
                return [name for names in made for name in names]

        self.compiler.compile = compile_side_by_side
        super().build_extension(ext)


class bdist_platform_wheel(bdist_wheel):
    """The library is tied to the platform and to TensorFlow, and to no version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    # The local part says which TensorFlow the library was built for: pip shows it.
    version=f"{VERSION}+tf{MINOR}",
    ext_modules=[
        Extension(
            "continual_transformers_tf.op_library",
            sources=[f"cc/{name}" for name in CC["ATTENTION_SOURCES"] + CC["TENSORFLOW_SOURCES"]],
            depends=["setup.py", "cc/library.bzl"]
            + [f"cc/{name}" for name in CC["ATTENTION_HEADERS"] + CC["TENSORFLOW_HEADERS"]],
            include_dirs=["."],
            extra_compile_args=CC["COMPILER_OPTIONS"] + CC["TENSORFLOW_OPTIONS"],
            extra_link_args=["-l:libtensorflow_framework.so.2"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": build_op_library, "bdist_wheel": bdist_platform_wheel},
    setup_requires=[] if TENSORFLOW or PREBUILT_LIBRARY else [f"tensorflow-cpu=={MINOR}.*"],
    extras_require={
        "cpu": [f"tensorflow-cpu=={MINOR}.*"],
        "gpu": [f"tensorflow[and-cuda]=={MINOR}.*"],
        # Who the race is against.
        "bench": [*TORCH, "matplotlib", "onnx", "onnxruntime", "rich"],
        "demo": ["matplotlib", "rich", "seglearn"],
        # Of examples/real_data.
        "examples": ["aeon", "matplotlib", "rich", "seglearn"],
        # What ct.from_torch takes weights from.
        "torch": [*TORCH, "safetensors"],
        "test": ["clang-format==23.1.5", "hypothesis", "pytest", "pytest-xdist", "ruff==0.17.6"],
    },
)
