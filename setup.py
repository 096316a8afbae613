"""The build by pip: the metadata that depends on TensorFlow, and the libraries.

The system's compiler builds the core library, the op library for the TensorFlow that is installed
in the target environment, and the Python extension. `cc/library.bzl` lists the sources of each.
Objects stay in `build/objects`: a source that has not changed is not compiled again.
"""

import importlib
import importlib.util
import os
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VERSION = "0.1.0"
# The exact versions that the race and the tests of ct.from_torch compare with.
TORCH = ["continual-inference==1.2.4", "torch==2.13.0"]
CC = runpy.run_path("cc/library.bzl")
sys.path[:0] = ["cuda", "tools"]
nvcc = importlib.import_module("nvcc")
object_files = importlib.import_module("object_files")
server_packages = importlib.import_module("server_packages")
embed = importlib.import_module("embed")
BUILD = Path("build")
# Bazel's build of the wheel sets it: a folder with the built libraries, which are only packed here.
PREBUILT = os.environ.get("CONTINUAL_TRANSFORMERS_PREBUILT")
CXX = shlex.split(os.environ.get("CXX", "g++"))


def find_tensorflow():
    """Return (folder, version) of the installed TensorFlow, or None.

    pip builds in an isolated environment, whose Python cannot import what is installed in the
    target environment. But both have the same interpreter, so its folders can be searched.
    """
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], site.getusersitepackages()]
    # sys.path: pip puts the packages there that it fetched only for the build.
    for folder in dict.fromkeys([*folders, *filter(os.path.isdir, sys.path)]):
        for distribution in metadata.distributions(path=[folder]):
            if distribution.name in ("tensorflow", "tensorflow-cpu", "tensorflow_cpu"):
                headers = Path(folder, "tensorflow", "include", "tensorflow")
                if headers.is_dir():
                    return Path(folder, "tensorflow"), distribution.version
    return None


TENSORFLOW = find_tensorflow()
MINOR = ".".join(TENSORFLOW[1].split(".")[:2]) if TENSORFLOW else CC["TENSORFLOW_DEFAULT"]
# Files that are not Python extensions, although setuptools builds them as such.
FILES = {
    "core_library": CC["CORE_LIBRARY"],
    "op_library": CC["OP_LIBRARY"].format(MINOR=MINOR),
    "server": CC["SERVER_PROGRAM"],
}


def sources(*parts):
    """Return the sources of these parts of `cc/library.bzl`."""
    return [f"cc/{name}" for part in parts for name in CC[f"{part}_SOURCES"]]


def system_includes(*folders):
    """Return the compiler options that include folders of other projects' headers."""
    # -isystem: no warnings from these headers.
    return [word for folder in folders for word in ("-isystem", str(folder))]


def headers_of(distribution):
    """Copy the headers of a Python package that the build needs, and return the copy's folder.

    pip's environment for the build has a new path each time. The copy keeps its path, so objects
    are not compiled again.
    """
    if distribution == "numpy":
        folder = importlib.import_module("numpy").get_include()
    else:
        (package,) = importlib.util.find_spec(
            distribution.replace("-", "_")
        ).submodule_search_locations
        folder = Path(package, "include")
    copy = BUILD / "include" / f"{distribution}-{metadata.version(distribution)}"
    if not copy.exists():
        made = copy.with_suffix(f".{os.getpid()}")
        shutil.copytree(folder, made)
        made.rename(copy)
    return copy


def link_to_tensorflow():
    """Return a link to TensorFlow's folder. It keeps its path, as the copies of `headers_of` do."""
    folder, version = TENSORFLOW
    link = BUILD / "include" / f"tensorflow-{version}"
    if not link.exists() or not link.samefile(folder):
        link.parent.mkdir(parents=True, exist_ok=True)
        made = link.with_suffix(f".{os.getpid()}")
        made.symlink_to(folder)
        made.replace(link)
    return link


class build_libraries(build_ext):
    """The build of the libraries and the server, in the order in which they link each other."""

    def get_ext_filename(self, fullname):
        """Return the file name of a library. Only the Python extension has setuptools' suffix."""
        *package, name = fullname.split(".")
        return str(Path(*package, FILES.get(name) or super().get_ext_filename(name)))

    def run(self):
        """Look for CUDA and for the server's packages, then build everything."""
        # First, because looking takes a moment, and compiling takes minutes.
        self.cuda = None if PREBUILT else nvcc.chosen()
        self.server = None if PREBUILT else server_packages.chosen()
        if not (self.server or (PREBUILT and Path(PREBUILT, CC["SERVER_PROGRAM"]).exists())):
            self.extensions = [ext for ext in self.extensions if not ext.name.endswith(".server")]
        super().run()

    def copy_extensions_to_source(self):
        """For an editable installation, copy what was built beside the package's modules."""
        super().copy_extensions_to_source()
        if self.server:
            package = self.get_finalized_command("build_py").get_package_dir(
                "continual_transformers_tf"
            )
            server_packages.copy_beside(self.server, Path(package))

    def build_extension(self, ext):
        """Compile the sources that have changed, and link the library."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        name = ext.name.split(".")[-1]
        if PREBUILT:
            file = CC["EXTENSION"] + ".so" if name == CC["EXTENSION"] else target.name
            # With its mode: the server is a program.
            shutil.copy(Path(PREBUILT, file), target)
            for beside in Path(PREBUILT).glob("*.so.*") if name == "server" else ():
                shutil.copy(beside, target.parent)
            return
        if TENSORFLOW is None:
            raise SystemExit(
                "continual-transformers-tf: no TensorFlow to build for. Install one first, "
                f"`pip install 'tensorflow-cpu=={MINOR}.*'`, or leave pip's build isolation on."
            )
        print(f"building {target.name}")
        options_of = getattr(self, f"options_of_{name}")
        options, objects, links = options_of(link_to_tensorflow(), TENSORFLOW[1])
        compiler = subprocess.run([*CXX, "--version"], check=True, capture_output=True, text=True)
        heading = f"{compiler.stdout.splitlines()[0]}, TensorFlow {TENSORFLOW[1]}\n"
        cuda_sources = sources("BUILD_INFO", "TENSORFLOW_GPU") if self.cuda else []

        def compile_one(source):
            # Builds with and without CUDA share objects. Alternating between them is fast.
            with_cuda = source in cuda_sources
            folder = BUILD / "objects" / (f"{name}_cuda" if with_cuda else name)
            made = (folder / source).with_suffix(".o")
            command = [*CXX, *CC["COMPILER_OPTIONS"], "-DNDEBUG", "-fPIC", "-I.", *options]
            if with_cuda:
                command += [f'-DCONTINUAL_TRANSFORMERS_CUDA_BUILD="{self.cuda}"']
                command += system_includes(*self.cuda.include)
            command += shlex.split(os.environ.get("CXXFLAGS", ""))
            said = object_files.compile_object([*command, "-c", source], made, heading)
            print(said, end="", file=sys.stderr)
            return str(made)

        objects = [*object_files.side_by_side(compile_one, ext.sources), *objects]
        links = [*links, *shlex.split(os.environ.get("LDFLAGS", ""))]
        made = target.with_suffix(".made")
        shared = [] if name == "server" else ["-shared"]
        subprocess.run([*CXX, *shared, *objects, *links, "-o", str(made)], check=True)
        made.replace(target)

    def options_of_core_library(self, tensorflow, version):
        """Return (compiler options, further objects, linker options)."""
        highway = tensorflow / CC["HIGHWAY_INCLUDE"]
        system = system_includes(highway, headers_of("nlohmann-json"))
        options = [*CC["CORE_OPTIONS"], "-Iinclude", *system]
        exports = f"-Wl,--version-script,cc/{CC['EXPORTS_FILE']}"
        return options, [], [exports, *CC["CORE_LINK_OPTIONS"]]

    def options_of_op_library(self, tensorflow, version):
        """Return the same as `options_of_core_library`."""
        self.remove_libraries_for_others()
        options = [
            *CC["HIDDEN_OPTIONS"],
            *CC["TENSORFLOW_OPTIONS"],
            f'-DCONTINUAL_TRANSFORMERS_TENSORFLOW="{version}"',
            *system_includes(tensorflow / "include"),
        ]
        objects = []
        links = [f"-L{tensorflow}", "-l:libtensorflow_framework.so.2", *self.core_link_options()]
        cuda = self.cuda
        if cuda:
            print(f"with CUDA {cuda}")
            self.ext_map["op_library"].sources += sources("TENSORFLOW_GPU")
            objects = list(map(str, cuda.compile_all(CC["CUDA_SOURCES"], nvcc.OBJECTS)))
            # First, because TensorFlow's library may define functions with the same names.
            links[:0] = [f"-L{folder}" for folder in cuda.lib] + CC["CUDA_LINK_OPTIONS"]
        return options, objects, links

    def options_of__session(self, tensorflow, version):
        """Return the same as `options_of_core_library`."""
        includes = [headers_of(name) for name in ("nlohmann-json", "numpy", "pybind11")]
        python = sysconfig.get_paths()["include"]
        options = [*CC["HIDDEN_OPTIONS"], *system_includes(python, *includes)]
        return options, [], self.core_link_options()

    def options_of_server(self, tensorflow, version):
        """Return the same as `options_of_core_library`."""
        print(f"with {self.server.version}")
        messages = server_packages.messages(BUILD / "server")
        page = BUILD / "server" / "page.cc"
        object_files.write_if_changed(
            page, embed.source([Path("cc", f) for f in CC["SERVER_PAGE"]])
        )
        self.ext_map["server"].sources += map(str, [*messages, page])
        folder = Path(self.get_ext_fullpath("continual_transformers_tf.server")).parent
        server_packages.copy_beside(self.server, folder)
        includes = system_includes(BUILD / "server", headers_of("nlohmann-json"))
        # -s: with symbols the program is three times as large.
        links = [*self.core_link_options(), *self.server.link, "-s"]
        return ["-Iinclude", *includes, *self.server.compile], [], links

    def remove_libraries_for_others(self):
        """Remove op libraries that an earlier build in this folder made for other TensorFlows."""
        target = Path(self.get_ext_fullpath("continual_transformers_tf.op_library"))
        for path in target.parent.glob(CC["OP_LIBRARY"].format(MINOR="*")):
            if path != target:
                path.unlink()

    def core_link_options(self):
        """Return the linker options of a library that links the core library."""
        core = Path(self.get_ext_fullpath("continual_transformers_tf.core_library"))
        return [f"-L{core.parent}", f"-l:{core.name}", *CC["BESIDE_CORE_LINK_OPTIONS"]]


setup(
    # The local part, which pip shows, is the TensorFlow that the op library was built for.
    version=f"{VERSION}+tf{MINOR}",
    ext_modules=[
        Extension("continual_transformers_tf.core_library", sources("ATTENTION", "SESSION")),
        Extension("continual_transformers_tf.op_library", sources("TENSORFLOW", "BUILD_INFO")),
        *(
            [Extension(f"continual_transformers_tf.{CC['EXTENSION']}", sources("PYTHON"))]
            if CC["PYTHON_SOURCES"]
            else []
        ),
        Extension(
            "continual_transformers_tf.server", sources("SERVER_MODEL", "SERVER", "SERVER_MAIN")
        ),
    ],
    cmdclass={"build_ext": build_libraries},
    setup_requires=[] if TENSORFLOW or PREBUILT else [f"tensorflow-cpu=={MINOR}.*"],
    extras_require={
        "cpu": [f"tensorflow-cpu=={MINOR}.*", "keras>=3.15,<4"],
        "gpu": [f"tensorflow[and-cuda]=={MINOR}.*", "keras>=3.15,<4"],
        # The rivals of the races, and a header library that their C++ programs need.
        "bench": [
            *TORCH,
            *("jax", "matplotlib", "nlohmann-json", "onnx", "onnxruntime", "rich"),
            "sequence-layers==0.2.*",
        ],
        # For ct.serving.Client.
        "client": ["grpcio>=1.51", "protobuf>=5"],
        "demo": ["matplotlib", "rich", "seglearn"],
        # For `make docs`. Exact versions, because a warning of a newer one would fail the build.
        "docs": [
            *("mkdocs==1.6.1", "mkdocs-jupyter==0.26.3", "mkdocs-material==9.8.2"),
            *("mkdocstrings==1.0.8", "mkdocstrings-python==2.0.11"),
        ],
        # For examples/real_data.
        "examples": ["aeon", "matplotlib", "rich", "seglearn"],
        # For `continual-transformers serve --ray`. Each node needs it, and the package.
        "ray": ["grpcio>=1.51", "protobuf>=5", "ray>=2.9"],
        # The sources of weights for ct.from_torch.
        "torch": [*TORCH, "safetensors"],
        "test": [
            *("clang-format==23.1.5", "clang-tidy==23.1.4", "mypy==2.4.1", "ruff==0.17.6"),
            *("hypothesis", "pytest", "pytest-xdist", "ray", "tritonclient[grpc,http]"),
            # Headers for Bazel's build. For pip's build they are in pyproject.toml.
            *("nlohmann-json", "pybind11"),
        ],
    },
)
