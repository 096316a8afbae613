"""The C++ tests as programs for AArch64, built without Bazel."""

import re
import subprocess
from pathlib import Path

import filelock

import aarch64
from build_benchmarks import include_folders
from object_files import compile_object, side_by_side
from tensorflow_headers import LISTS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / aarch64.MACHINE / "cc_tests"
# Debian's libgtest-dev has the sources too.
GOOGLETEST = Path("/usr/src/googletest/googletest")


def missing():
    """Return a sentence about what is not installed, or None."""
    try:
        aarch64.compiler()
        aarch64.qemu()
    except aarch64.Missing as why:
        return str(why)
    if not GOOGLETEST.is_dir():
        return f"there is no {GOOGLETEST}. On Debian: apt install libgtest-dev"
    return None


def build(test):
    """Build a C++ test, such as "dense_test". Return the program's path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    # One of xdist's workers at a time: each uses all processors, and they share objects.
    with filelock.FileLock(FOLDER / "lock"):
        return compile_and_link(test)


def compile_and_link(test):
    """Compile what has changed, and link. Return the program's path."""
    source = ROOT / "tests" / "cc" / f"{test}.cc"
    # The tests of kernels do without the sources of sessions.
    parts = ["ATTENTION"]
    if re.search('#include "cc/session/', source.read_text()):
        parts.append("SESSION")
    linked = [ROOT / "cc" / name for part in parts for name in LISTS[f"{part}_SOURCES"]]
    googletest = [GOOGLETEST / "src" / name for name in ("gtest-all.cc", "gtest_main.cc")]
    objects = side_by_side(compile_source, [source, *linked, *googletest])
    program = FOLDER / test
    # Static, so that qemu needs no folder with AArch64's libraries.
    command = [aarch64.compiler(), "-static", *objects, "-pthread", "-o", program]
    subprocess.run(command, check=True)
    return program


def compile_source(source):
    """Compile a source, if it has changed. Return the object's path."""
    system = [*include_folders(), GOOGLETEST / "include", GOOGLETEST]
    command = [aarch64.compiler(), *LISTS["COMPILER_OPTIONS"], f"-I{ROOT}", f"-I{ROOT / 'include'}"]
    command += [word for folder in system for word in ("-isystem", str(folder))]
    target = FOLDER / "objects" / source.parent.name / f"{source.stem}.o"
    compile_object([*command, "-c", str(source)], target)
    return target
