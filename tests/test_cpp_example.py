"""The C and C++ interface for users: the README of examples/cpp, headers, CMake, pkg-config."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import continual_transformers_tf as ct
from continual_transformers_tf import native

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "cpp"
HEADER = native.PACKAGE / "include" / "continual_transformers.h"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def environment():
    """Return an environment with this Python's `continual-transformers` first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path}


def run(command, folder, status=0):
    """Run a command (a list, or a line for bash), and return its output and errors."""
    words = command if isinstance(command, list) else ["bash", "-euo", "pipefail", "-c", command]
    result = subprocess.run(
        words, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == status, result.stdout[-3000:]
    return result.stdout


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"there is no {program}")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a copy of the example, with the model and the recording that its README makes."""
    folder = tmp_path_factory.mktemp("example") / "cpp"
    shutil.copytree(EXAMPLE, folder)
    (pack,) = blocks("python")
    run([sys.executable, "-c", pack], folder)
    return folder


BUILDS = {"cmake": 0, "pkg-config": 1}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs(name)) for name in BUILDS])
def built(request, folder):
    """Return the folder with the program, built in one of the two ways."""
    shutil.rmtree(folder / "build", ignore_errors=True)
    run(blocks("bash")[BUILDS[request.param]], folder)
    return folder


def test_streams_as_a_session_does(built):
    (stream,) = [block for block in blocks("bash") if "outputs.npy" in block]
    said = run(stream, built)
    assert "float32 (1, 8) -> float32 (1, 3); receptive field 64 steps" in said
    assert "500 steps, 63 of them before the window was full" in said
    session = ct.Session.load(built / "model.safetensors")
    stream = session.open()
    expected = [session.step(x[None], streams=[stream])[0] for x in np.load(built / "steps.npy")]
    np.testing.assert_array_equal(np.load(built / "outputs.npy"), expected)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((5, 7), "float32"), r"shape (5, 7), the model takes rows of (5, 8)"),
        (np.zeros(8, "float32"), r"shape (8,), the model takes rows of (8, 8)"),
        (np.zeros((5, 8)), "dtype '<f8', the model takes '<f4'"),
        (np.asfortranarray(np.zeros((5, 8), "float32")), "in Fortran order"),
        (None, "is not a .npy file"),
    ],
    ids=["features", "rank", "dtype", "order", "garbage"],
)
def test_says_what_is_wrong_with_a_recording(built, tmp_path, array, says):
    file = tmp_path / "steps.npy"
    if array is None:
        file.write_bytes(b"no array")
    else:
        np.save(file, array)
    assert says in run(["build/stream", "model.safetensors", str(file)], built, status=1)


def test_noise_errors_and_usage(built):
    assert "1000 steps" in run(["build/stream", "model.safetensors"], built)
    assert "nowhere" in run(["build/stream", "nowhere.safetensors"], built, status=1)
    assert "usage" in run(["build/stream"], built, status=2)


@pytest.mark.parametrize("standard", ["c99", "c17", "c++17", "c++20"])
def test_headers_compile_alone(tmp_path, standard):
    cxx = "++" in standard
    source = tmp_path / ("one.cc" if cxx else "one.c")
    name = "continual_transformers.hpp" if cxx else "continual_transformers.h"
    source.write_text(f"#include <{name}>\nct_options options = CT_OPTIONS_DEFAULT;\n")
    compiler = os.environ.get("CXX", "g++") if cxx else os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    run(
        [compiler, f"-std={standard}", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only",
         f"-I{HEADER.parent}", str(source)],
        tmp_path,
    )  # fmt: skip


def test_one_version():
    defined = re.findall(r"#define CT_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", HEADER.read_text())
    assert ".".join(defined) == VERSION
    config = (native.PACKAGE / "pkgconfig" / "continual_transformers.pc").read_text()
    assert f"\nVersion: {VERSION}\n" in config
    version = native.core_library().ct_version
    version.restype = native.ctypes.c_char_p
    assert version().decode() == VERSION


@needs("cmake")
@pytest.mark.parametrize(
    ("wanted", "found"),
    [("", True), ("0.2", True), (f"{VERSION} EXACT", True), ("0.1", False), ("1.0", False),
     ("0.0.9", False)],
)  # fmt: skip
def test_versions_that_cmake_finds(tmp_path, wanted, found):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(p NONE)\n"
        f"find_package(continual_transformers {wanted} REQUIRED)\n"
    )
    command = ["cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={native.PACKAGE}"]
    said = run(command, tmp_path, status=not found)
    assert found or VERSION in said


@needs("cmake")
def test_wherever_the_package_is(tmp_path, folder):
    """CMake and pkg-config use relative paths. The package's path may have spaces."""
    package = tmp_path / "another place" / "continual_transformers_tf"
    package.mkdir(parents=True)
    for name in ("include", "cmake", "pkgconfig"):
        shutil.copytree(native.PACKAGE / name, package / name)
    configure = ["cmake", "-S", str(folder), "-B", str(tmp_path / "build")]
    configure += [f"-Dcontinual_transformers_DIR={package / 'cmake'}"]
    said = run(configure, tmp_path, status=1)
    assert "installed without its library" in said.replace("\n", " ").replace("  ", " ")
    shutil.copy(native.CORE_LIBRARY_PATH, package)
    run(configure, tmp_path)
    run(["cmake", "--build", str(tmp_path / "build")], tmp_path)
    linked = run(["ldd", str(tmp_path / "build" / "stream")], tmp_path)
    assert str(package / native.CORE_LIBRARY_PATH.name) in linked
    assert "tensorflow" not in linked
    assert "python" not in linked
