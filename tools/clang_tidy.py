"""clang-tidy over the C++ sources, with the checks of `.clang-tidy`: a part of `make lint`.

    python tools/clang_tidy.py [FILE ...]

Without a FILE it checks the core library, the Python extension, and the server if its packages are
installed. The op library is left out: its files take 9 s each and more, because they include
TensorFlow's headers.
"""

import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pybind11

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import server_packages  # noqa: E402
from build_benchmarks import include_folders  # noqa: E402
from object_files import side_by_side  # noqa: E402

CC = runpy.run_path(str(ROOT / "cc" / "library.bzl"))


def sources(server: bool) -> list[str]:
    """Return the sources that include no TensorFlow, as paths from the root."""
    parts = ["ATTENTION", "SESSION", "PYTHON"] + ["SERVER_MODEL", "SERVER"] * server
    return [f"cc/{name}" for part in parts for name in CC[f"{part}_SOURCES"]]


def options(messages: Path | None) -> list[str]:
    """Return the compiler options that the sources need.

    Args:
        messages: The folder of the server's messages. None: the server is not checked.
    """
    folders = [
        *include_folders(),
        np.get_include(),
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    system = [f"-isystem{folder}" for folder in folders]
    # Highway takes clang-tidy for a debug build, in which the number of lanes is not a constant.
    own = ["-DNDEBUG", "-DHWY_IS_DEBUG_BUILD=0"]
    if messages is not None:
        system.append(f"-isystem{messages}")
        own += server_packages.find().compile
    return [*CC["COMPILER_OPTIONS"], *own, f"-I{ROOT}", f"-I{ROOT / 'include'}", *system]


def main(files: list[str]) -> int:
    """Check files, one for each processor at a time. Return the exit status."""
    # The one beside this Python, as in `make lint`.
    program = shutil.which("clang-tidy", path=Path(sys.executable).parent) or "clang-tidy"
    with tempfile.TemporaryDirectory() as folder:
        messages: Path | None = None
        try:
            server_packages.messages(Path(folder))
            messages = Path(folder)
        except server_packages.Missing as missing:
            print(f"The server is not checked. {missing}")
        return check_files(program, files or sources(messages is not None), options(messages))


def check_files(program: str, files: list[str], compiler_options: list[str]) -> int:
    """Run the program on each file. Return the exit status."""

    def check(file: str) -> tuple[int, str]:
        done = subprocess.run(
            [program, "--quiet", file, "--", *compiler_options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    results = side_by_side(check, files)
    print("".join(text for status, text in results if status), end="")
    return max(status for status, _ in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
