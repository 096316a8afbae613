"""Build the C++ programs that measure sessions, against the installed package's library.

    python tools/build_benchmarks.py build/bench

Bazel builds the same programs, for example as //benchmarks:model_benchmark.
`make bench` uses this script, because it needs nothing that pip's build does not need.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from object_files import compile_object, side_by_side  # noqa: E402

CC = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
PROGRAMS = ("layer_benchmark", "model_benchmark", "session_benchmark")
SHARED = ("bound", "fma_loop", "raw_model")


def include_folders() -> list[Path]:
    """Return the folders of Google Highway's and nlohmann-json's headers, in wheels from PyPI."""
    return [folder_of("tensorflow") / CC["HIGHWAY_INCLUDE"], folder_of("nlohmann_json") / "include"]


def folder_of(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: `make` installs it in .venv")
    return Path(next(iter(spec.submodule_search_locations)))


def build(folder: Path, programs: Sequence[str] = PROGRAMS) -> dict[str, Path]:
    """Build programs into a folder.

    Returns:
        Their paths, by name.
    """
    package = folder_of("continual_transformers_tf")
    library = package / CC["CORE_LIBRARY"]
    if not library.exists():
        raise SystemExit(f"found no {library}: run `pip install .` in this checkout to build it")
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *CC["COMPILER_OPTIONS"], f"-I{ROOT}"]
    command += [f"-isystem{path}" for path in include_folders()]

    def compile_source(name: str) -> str:
        target = folder / "objects" / f"{name}.o"
        compile_object([*command, "-c", str(ROOT / "benchmarks" / "cc" / f"{name}.cc")], target)
        return str(target)

    objects = side_by_side(compile_source, [*SHARED, *programs])
    shared, own = objects[: len(SHARED)], objects[len(SHARED) :]
    link = [str(library), f"-Wl,-rpath,{package}", "-pthread"]
    for name, made in zip(programs, own, strict=True):
        path = folder / name
        subprocess.run([compiler, made, *shared, *link, "-o", str(path)], check=True)
    return {name: folder / name for name in programs}


if __name__ == "__main__":
    for path in build(Path(sys.argv[1]).resolve()).values():
        print(path)
