"""The build by pip: the libraries, the Python extension and the server.

The system's compiler builds the core library, the Python extension, the server, and an op library
for each wanted TensorFlow (`tools/tensorflow_headers.py`). `cc/library.bzl` lists the sources of
each. Objects stay in `build/objects`: a source that has not changed is not compiled again. A build
for another machine (`tools/aarch64.py`) keeps its objects in `build/aarch64/objects`.
"""

import functools
import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path[:0] = ["cuda", "tools"]
nvcc = importlib.import_module("nvcc")
object_files = importlib.import_module("object_files")
server_packages = importlib.import_module("server_packages")
tensorflow_headers = importlib.import_module("tensorflow_headers")
embed = importlib.import_module("embed")
compiler_errors = importlib.import_module("compiler_errors")
build_progress = importlib.import_module("build_progress")

CC = tensorflow_headers.LISTS
PACKAGE = "continual_transformers_tf"
BUILD = Path("build", *([tensorflow_headers.MACHINE] if tensorflow_headers.IS_CROSS_BUILD else []))
CXX = shlex.split(os.environ.get("CXX", "g++"))

# The TensorFlows to build op libraries for, by the name of the extension that setuptools builds.
TENSORFLOWS = {
    f"op_library_{tensorflow.minor.replace('.', '_')}": tensorflow
    for tensorflow in tensorflow_headers.wanted()
}

# Files that are not Python extensions, although setuptools builds them as such.
FILES = {
    "core_library": CC["CORE_LIBRARY"],
    "cuda_library": CC["CUDA_LIBRARY"],
    "server": CC["SERVER_PROGRAM"],
    **{
        name: CC["OP_LIBRARY"].format(MINOR=tensorflow.minor)
        for name, tensorflow in TENSORFLOWS.items()
    },
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
    (package,) = importlib.util.find_spec(distribution.replace("-", "_")).submodule_search_locations
    # As numpy.get_include(), but NumPy may be another machine's: then it cannot be imported.
    folder = Path(package, "_core" if distribution == "numpy" else "", "include")
    copy = BUILD / "include" / f"{distribution}-{metadata.version(distribution)}"
    if not copy.exists():
        made = copy.with_suffix(f".{os.getpid()}")
        shutil.copytree(folder, made)
        made.rename(copy)
    return copy


def link_to(tensorflow):
    """Return a link to a TensorFlow's folder, which keeps its path as the copies above do."""
    link = BUILD / "include" / f"tensorflow-{tensorflow.version}"
    if not link.exists() or not link.samefile(tensorflow.folder):
        link.parent.mkdir(parents=True, exist_ok=True)
        made = link.with_suffix(f".{os.getpid()}")
        made.symlink_to(tensorflow.folder)
        made.replace(link)
    return link


class build_libraries(build_ext):
    """The build of the libraries and the server, in the order in which they link each other."""

    def get_ext_filename(self, fullname):
        """Return the file name of a library. Only the Python extension has setuptools' suffix."""
        *package, name = fullname.split(".")
        return str(Path(*package, FILES.get(name) or super().get_ext_filename(name)))

    def run(self):
        """Check the compiler, look for CUDA and the server's packages, then build everything."""
        # First, because looking takes a moment, and compiling takes minutes.
        self.compiler_version = compiler_errors.check_compiler(CXX)
        self.cuda = nvcc.chosen() if self.wants_cuda() else None
        self.server = server_packages.chosen()
        if not self.server:
            self.extensions = [ext for ext in self.extensions if not ext.name.endswith(".server")]
        if not self.cuda:
            self.extensions = [
                ext for ext in self.extensions if not ext.name.endswith(".cuda_library")
            ]
        self.remove_libraries_for_others()
        files = sum(len(ext.sources) for ext in self.extensions)
        if self.cuda:
            files += len({*CC["CUDA_SESSION_KERNEL_SOURCES"], *CC["CUDA_SESSION_SOURCES"]})
            files += len(CC["CUDA_SOURCES"]) if TENSORFLOWS else 0
        with build_progress.Progress(self.what_is_built(), files) as self.progress:
            super().run()

    def wants_cuda(self):
        """Return whether GPU kernels are asked for, or a TensorFlow here can use them."""
        if os.environ.get(nvcc.CUDA):
            return True
        return any(tensorflow.has_cuda for tensorflow in TENSORFLOWS.values())

    @functools.cached_property
    def cuda_objects(self):
        """The objects of the GPU kernels, which all op libraries share."""
        objects = self.cuda.compile_all(CC["CUDA_SOURCES"], nvcc.OBJECTS, self.progress.step)
        return list(map(str, objects))

    def what_is_built(self):
        """Return a sentence: what the compiler is busy with, and what is left out and why."""
        parts = ["sessions"]
        parts += [f"TensorFlow {tensorflow.minor}'s ops" for tensorflow in TENSORFLOWS.values()]
        parts += [f"GPU kernels and sessions (CUDA {self.cuda})"] if self.cuda else []
        parts += ["the server"] if self.server else []
        built = (
            f"Compiling {', '.join(parts)}. The first time this takes some minutes, because vector "
            "code is compiled once per instruction set."
        )
        if not any(tensorflow.has_highway for tensorflow in TENSORFLOWS.values()):
            newest = CC["TENSORFLOWS"][-1]
            built += f" Google Highway's headers come from TensorFlow {newest}'s wheel (250 MB)."
        if TENSORFLOWS:
            return built
        return (
            f"{built} Keras layers will run in plain TensorFlow, because no TensorFlow is "
            f"installed here to compile ops for: install it first, or list versions in "
            f"{tensorflow_headers.VARIABLE}."
        )

    def copy_extensions_to_source(self):
        """For an editable installation, copy what was built beside the package's modules."""
        super().copy_extensions_to_source()
        if self.server:
            package = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
            server_packages.copy_beside(self.server, Path(package))

    def build_extension(self, ext):
        """Compile the sources that have changed, and link the library."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        name = ext.name.split(".")[-1]
        print(f"building {target.name}")
        if name == "cuda_library":
            self.cuda.session_library(target, self.core_library(), nvcc.OBJECTS, self.progress.step)
            return
        kind = "op_library" if name in TENSORFLOWS else name
        options, objects, links = getattr(self, f"options_of_{kind}")(ext)
        cuda_sources = sources("BUILD_INFO", "TENSORFLOW_GPU") if self.cuda else []

        def command_of(options):
            flags = shlex.split(os.environ.get("CXXFLAGS", ""))
            return [*CXX, *CC["COMPILER_OPTIONS"], "-DNDEBUG", "-fPIC", "-I.", *options, *flags]

        precompiled = []
        if kind == "op_library":
            precompiled = object_files.precompile_header(
                command_of(options),
                BUILD / "objects" / name / "precompiled.h",
                CC["TENSORFLOW_PRECOMPILED"],
            )

        def compile_one(source):
            # Builds with and without CUDA share objects. Alternating between them is fast.
            with_cuda = source in cuda_sources
            folder = BUILD / "objects" / (f"{name}_cuda" if with_cuda else name)
            made = (folder / source).with_suffix(".o")
            command = [*command_of(options), "-c", source]
            # The GPU's sources define macros that change TensorFlow's headers.
            if source not in sources("TENSORFLOW_GPU"):
                command += precompiled
            if with_cuda:
                command += [f'-DCONTINUAL_TRANSFORMERS_CUDA_BUILD="{self.cuda}"']
                command += system_includes(*self.cuda.include)
            said = object_files.compile_object(command, made, f"{self.compiler_version}\n")
            print(said, end="", file=sys.stderr)
            self.progress.step(source)
            return str(made)

        objects = [*object_files.side_by_side(compile_one, ext.sources), *objects]
        links = [*links, *shlex.split(os.environ.get("LDFLAGS", ""))]
        made = target.with_suffix(".made")
        shared = [] if name == "server" else ["-shared"]
        subprocess.run([*CXX, *shared, *objects, *links, "-o", str(made)], check=True)
        made.replace(target)

    def options_of_core_library(self, ext):
        """Return (compiler options, further objects, linker options)."""
        tensorflow = link_to(tensorflow_headers.with_highway([*TENSORFLOWS.values()]))
        system = system_includes(tensorflow / CC["HIGHWAY_INCLUDE"], headers_of("nlohmann-json"))
        options = [*CC["CORE_OPTIONS"], "-Iinclude", *system]
        exports = f"-Wl,--version-script,cc/{CC['EXPORTS_FILE']}"
        return options, [], [exports, *CC["CORE_LINK_OPTIONS"]]

    def options_of_op_library(self, ext):
        """Return the same as `options_of_core_library`."""
        tensorflow = TENSORFLOWS[ext.name.split(".")[-1]]
        folder = link_to(tensorflow)
        options = [
            *CC["HIDDEN_OPTIONS"],
            *CC["TENSORFLOW_OPTIONS"],
            f'-DCONTINUAL_TRANSFORMERS_TENSORFLOW="{tensorflow.version}"',
            *system_includes(folder / "include"),
        ]
        links = [
            f"-L{folder}",
            f"-l:{tensorflow_headers.FRAMEWORK}",
            *self.core_link_options(),
        ]
        if self.cuda is None:
            return options, [], links
        ext.sources += sources("TENSORFLOW_GPU")
        # First, because TensorFlow's library may define functions with the same names.
        links[:0] = [f"-L{folder}" for folder in self.cuda.lib] + CC["CUDA_LINK_OPTIONS"]
        return options, self.cuda_objects, links

    def options_of__session(self, ext):
        """Return the same as `options_of_core_library`."""
        includes = [headers_of(name) for name in ("nlohmann-json", "numpy", "pybind11")]
        python = sysconfig.get_paths()["include"]
        options = [*CC["HIDDEN_OPTIONS"], *system_includes(python, *includes)]
        return options, [], self.core_link_options()

    def options_of_server(self, ext):
        """Return the same as `options_of_core_library`."""
        print(f"with {self.server.version}")
        messages = server_packages.messages(BUILD / "server")
        page = BUILD / "server" / "page.cc"
        object_files.write_if_changed(
            page, embed.source([Path("cc", f) for f in CC["SERVER_PAGE"]])
        )
        ext.sources += map(str, [*messages, page])
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        server_packages.copy_beside(self.server, folder)
        includes = system_includes(BUILD / "server", headers_of("nlohmann-json"))
        # -s: with symbols the program is three times as large.
        links = [*self.core_link_options(), *self.server.link, "-s"]
        return ["-Iinclude", *includes, *self.server.compile], [], links

    def remove_libraries_for_others(self):
        """Remove what an earlier build in this folder made for other TensorFlows, or with CUDA."""
        folder = self.core_library().parent
        if not self.cuda:
            (folder / CC["CUDA_LIBRARY"]).unlink(missing_ok=True)
        for path in folder.glob(CC["OP_LIBRARY"].format(MINOR="*")):
            if path.name not in FILES.values():
                path.unlink()

    def core_library(self):
        """Return the path that the core library is built at."""
        return Path(self.get_ext_fullpath(f"{PACKAGE}.core_library"))

    def core_link_options(self):
        """Return the linker options of a library that links the core library."""
        core = self.core_library()
        return [f"-L{core.parent}", f"-l:{core.name}", *CC["BESIDE_CORE_LINK_OPTIONS"]]


PARTS = {
    "core_library": ("ATTENTION", "SESSION"),
    "cuda_library": (),  # nvcc compiles its sources
    **dict.fromkeys(TENSORFLOWS, ("TENSORFLOW", "BUILD_INFO")),
    CC["EXTENSION"]: ("PYTHON",),
    "server": ("SERVER_MODEL", "SERVER", "SERVER_MAIN"),
}

setup(
    ext_modules=[Extension(f"{PACKAGE}.{name}", sources(*parts)) for name, parts in PARTS.items()],
    cmdclass={"build_ext": build_libraries},
)
