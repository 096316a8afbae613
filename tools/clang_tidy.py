"""clang-tidy over the C++ sources, with the checks of `.clang-tidy`: a part of `make lint`.

    python tools/clang_tidy.py [FILE ...]

Without a FILE it checks the core library and the Python extension. The op library is left out: its
files take 9 s each and more, because they include TensorFlow's headers.
"""

import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pybind11

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from build_benchmarks import include_folders  # noqa: E402
from object_files import side_by_side  # noqa: E402

CC = runpy.run_path(str(ROOT / "cc" / "library.bzl"))


def sources() -> list[str]:
    """Return the sources that include no TensorFlow, as paths from the root."""
    parts = ("ATTENTION", "SESSION", "PYTHON")
    return [f"cc/{name}" for part in parts for name in CC[f"{part}_SOURCES"]]


def options() -> list[str]:
    """Return the compiler options that the sources need."""
    folders = [
        *include_folders(),
        np.get_include(),
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    system = [f"-isystem{folder}" for folder in folders]
    # Highway takes clang-tidy for a debug build, in which the number of lanes is not a constant.
    own = ["-DNDEBUG", "-DHWY_IS_DEBUG_BUILD=0"]
    return [*CC["COMPILER_OPTIONS"], *own, f"-I{ROOT}", f"-I{ROOT / 'include'}", *system]


def main(files: list[str]) -> int:
    """Check files, one for each processor at a time. Return the exit status."""
    # The one beside this Python, as in `make lint`.
    program = shutil.which("clang-tidy", path=Path(sys.executable).parent) or "clang-tidy"
    compiler_options = options()

    def check(file: str) -> tuple[int, str]:
        done = subprocess.run(
            [program, "--quiet", file, "--", *compiler_options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    results = side_by_side(check, files or sources())
    print("".join(text for status, text in results if status), end="")
    return max(status for status, _ in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
