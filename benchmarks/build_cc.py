"""Builds the C++ programs that measure sessions, with the system's compiler.

    python benchmarks/build_cc.py build/bench

Bazel builds the same, as //benchmarks:model_benchmark and //benchmarks:session_benchmark; this is
for `make bench`, which needs no more than pip does.
"""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from object_files import compile_object, side_by_side  # noqa: E402

CC = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
PROGRAMS = ("model_benchmark", "session_benchmark")
SHARED = ("fma_loop", "raw_model")


def include_folders():
    """Where the headers of Google Highway and nlohmann-json are: in wheels from PyPI."""
    tensorflow = Path(importlib.util.find_spec("tensorflow").origin).parent
    json = Path(next(iter(importlib.util.find_spec("nlohmann_json").submodule_search_locations)))
    return [tensorflow / CC["HIGHWAY_INCLUDE"], json / "include"]


def build(folder, programs=PROGRAMS):
    """Build programs into a folder.

    Returns:
        Their paths, by name.
    """
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *CC["COMPILER_OPTIONS"], f"-I{ROOT}"]
    command += [f"-isystem{path}" for path in include_folders()]

    def compile_source(source):
        target = folder / "objects" / (re.sub(r"\W", "_", source) + ".o")
        compile_object([*command, "-c", str(ROOT / source)], target)
        return target

    library = [f"cc/{name}" for name in CC["ATTENTION_SOURCES"] + CC["SESSION_SOURCES"]]
    library += [f"benchmarks/cc/{name}.cc" for name in SHARED]
    own = [f"benchmarks/cc/{name}.cc" for name in programs]
    objects = side_by_side(compile_source, library + own)
    for name, made in zip(programs, objects[len(library) :], strict=True):
        parts = [str(path) for path in (made, *objects[: len(library)])]
        subprocess.run([compiler, *parts, "-pthread", "-o", str(folder / name)], check=True)
    return {name: folder / name for name in programs}


if __name__ == "__main__":
    for path in build(Path(sys.argv[1]).resolve()).values():
        print(path)
