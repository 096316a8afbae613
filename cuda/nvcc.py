"""Finds nvcc and has it compile the kernels: for setup.py, for Bazel, and on a bare GPU machine.

`python3 cuda/nvcc.py library OUT` makes a library of the kernels and their C interface, c_api.h. It
takes nothing but Python, nvcc and a C++ compiler.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# Not resolved: in Bazel's sandbox everything is a link that leads out of it.
ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from compiler_errors import first_error  # noqa: E402  Beside this folder.
from object_files import compile_object, side_by_side  # noqa: E402

LISTS = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
# Where objects are kept, and found by the next build.
OBJECTS = ROOT / "build" / "cuda"

CUDA = "CONTINUAL_TRANSFORMERS_CUDA"
ARCHITECTURES = "CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES"

USUAL_HOME = "/usr/local/cuda"
INSTALL = "Install CUDA's toolkit, 12.0 or newer, and put nvcc on PATH or its folder in CUDA_HOME"


class Unusable(Exception):
    """There is no nvcc that could compile anything: why, and the cure."""


def run(*command):
    """(exit status, all that it said)."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:  # Of another processor, say.
        raise Unusable(f"{command[0]} cannot be run: {error.strerror}. {INSTALL}") from error
    return done.returncode, done.stdout


class Toolkit(NamedTuple):
    """An nvcc that works, and what it is to compile for."""

    nvcc: str
    version: str  # "13.0"
    architectures: list  # ["75", ..., "90"]
    include: list  # Folders: of its headers, for the C++ compiler,
    lib: list  # and of its libraries.

    def __str__(self):
        names = ", ".join(f"sm_{name}" for name in self.architectures)
        return f"{self.version} for {names}, PTX of {self.architectures[-1]}"

    def options(self):
        for name in self.architectures:
            code = f"sm_{name},compute_{name}" if name == self.architectures[-1] else f"sm_{name}"
            yield f"-gencode=arch=compute_{name},code=[{code}]"
        yield from ("--threads=0", *LISTS["CUDA_OPTIONS"], f"-I{ROOT}")

    def compile(self, source, target):
        """Compiles a file, unless what an earlier run made of it is current."""
        # nvcc takes more from the environment.
        extra = [os.environ.get(f"NVCC_{name}_FLAGS", "") for name in ("PREPEND", "APPEND")]
        command = [self.nvcc, *self.options(), "-c", str(source)]
        compile_object(command, target, f"{self.version}: {shlex.join(extra)}\n")
        return target

    def compile_all(self, sources, folder, on_file=lambda name: None):
        """Compile files of //cuda into a folder of objects. Unchanged files are skipped.

        `on_file` is called with the name of each file when it is done.
        """

        def compile_one(name):
            made = self.compile(ROOT / "cuda" / name, Path(folder, name).with_suffix(".o"))
            on_file(name)
            return made

        return side_by_side(compile_one, sources)

    def library(self, target):
        """Links the kernels and their C interface, compiled beside the target."""
        sources = LISTS["CUDA_SOURCES"] + LISTS["CUDA_C_API_SOURCES"]
        self.link(target, self.compile_all(sources, target.parent))

    def session_library(self, target, core, folder, on_file=lambda name: None):
        """Link the library of sessions on a GPU to the core library, a path.

        Objects are kept in `folder`. `on_file` is as in `compile_all`.
        """
        sources = LISTS["CUDA_SESSION_KERNEL_SOURCES"] + LISTS["CUDA_SESSION_SOURCES"]
        objects = self.compile_all(sources, folder, on_file)
        beside = (*LISTS["BESIDE_CORE_LINK_OPTIONS"], f"-L{core.parent}", f"-l:{core.name}")
        self.link(target, objects, beside)

    def link(self, target, objects, options=()):
        status, said = run(
            *(os.environ.get("CXX", "g++"), "-shared", "-o", str(target), *map(str, objects)),
            *(f"-L{folder}" for folder in self.lib),
            *(*options, *LISTS["CUDA_LINK_OPTIONS"], "-Wl,-z,defs"),
        )
        if status:
            raise SystemExit(said)


def architectures():
    asked = os.environ.get(ARCHITECTURES, "").replace(",", ";").replace(" ", ";")
    names = [name for name in asked.split(";") if name] or LISTS["CUDA_ARCHITECTURES"]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise SystemExit(
                f"Expected {ARCHITECTURES} to be compute capabilities such as '80;90', "
                f"but got {os.environ[ARCHITECTURES]!r}"
            )
    return sorted(names, key=lambda name: int(name.rstrip("af")))


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    if home:
        path = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if path is None:
            raise Unusable(f"there is no bin/nvcc in CUDA_HOME, {home}. {INSTALL}")
        return path
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(USUAL_HOME, "bin"))
    if path is None:
        raise Unusable(f"there is no nvcc on PATH. {INSTALL}")
    return path


def find():
    """The toolkit. Raises Unusable where there is none that could compile anything."""
    wanted, nvcc = architectures(), find_nvcc()
    said = run(nvcc, "--version")[1]
    version = re.search(r"release (\d+)\.(\d+)", said)
    if not version:
        raise Unusable(f"{nvcc} --version said: {first_error(said)}. {INSTALL}")
    oldest = LISTS["CUDA_OLDEST"]
    if tuple(map(int, version.groups())) < tuple(map(int, oldest.split("."))):
        raise Unusable(f"{nvcc} is of CUDA {'.'.join(version.groups())}. {INSTALL}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "nothing.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void Nothing() {}\n")
        # Its folders, wherever the system keeps them: nvcc says what it would do, and with which.
        plan = run(nvcc, "--dryrun", "-c", str(source), "-o", str(source.with_suffix(".o")))[1]
        folders = {
            name: [
                os.path.realpath(word[2:])
                for line in re.findall(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
                for word in shlex.split(line)
                if os.path.isdir(word[2:])
            ]
            for name in ("INCLUDES", "LIBRARIES")
        }
        toolkit = Toolkit(nvcc, ".".join(version.groups()), wanted, *folders.values())
        made = source.with_suffix(".o")
        status, said = run(nvcc, *toolkit.options(), "-c", str(source), "-o", str(made))
    if "gpu architecture" in said:
        why = f"{ARCHITECTURES}: {nvcc} of CUDA {toolkit.version} says {first_error(said)}"
        # Of what nobody asked for, the CPU's kernels are not to suffer.
        raise SystemExit(why) if os.environ.get(ARCHITECTURES) else Unusable(why)
    if status:
        raise Unusable(
            f"{nvcc} could not compile an empty kernel: {first_error(said)}. It needs a C++ "
            f"compiler that CUDA {toolkit.version} knows; NVCC_PREPEND_FLAGS='-ccbin g++-12' names "
            "another one"
        )
    return toolkit


def chosen():
    """The toolkit, or None where the library is to be built without CUDA; says why."""
    choice = os.environ.get(CUDA, "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"Expected {CUDA} to be 0, 1 or unset, but got {choice!r}")
    if choice == "0":
        return None
    try:
        return find()
    except Unusable as why:
        if choice == "1":
            raise SystemExit(f"{CUDA}=1, but {why}; {CUDA}=0 builds CPU kernels alone") from why
        print(f"No CUDA kernels are built, for {why}.", file=sys.stderr)
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe", help="print the toolkit as JSON")
    command = commands.add_parser("object", help="compile a file, with such a toolkit")
    command.add_argument("toolkit", type=Path)
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command = commands.add_parser("library", help="make a library of the kernels")
    command.add_argument("target", type=Path)
    command = commands.add_parser("session-library", help="make the library of sessions on a GPU")
    command.add_argument("target", type=Path)
    command.add_argument("core", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "describe":
            found = find()
            print(json.dumps({**found._asdict(), "description": str(found)}))
        elif options.command == "object":
            facts = json.loads(options.toolkit.read_text())
            toolkit = Toolkit(**{name: facts[name] for name in Toolkit._fields})
            toolkit.compile(options.source, options.target)
        elif options.command == "session-library":
            find().session_library(options.target, options.core, options.target.parent)
        else:
            find().library(options.target)
    except Unusable as why:
        raise SystemExit(str(why)) from why


if __name__ == "__main__":
    main()
