"""The build from source: what it checks before the wait, and what it says when it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import compiler_errors
import nvcc
import tensorflow_headers
from build_progress import Progress
from compiler_errors import check_compiler, explain
from object_files import compile_object, precompile_header
from terminal import open_terminal

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("said", "line", "meaning"),
    [
        (
            "a.cc:1:10: fatal error: Python.h: No such file or directory\ncompilation terminated.",
            "a.cc:1:10: fatal error: Python.h: No such file or directory",
            "apt install python3-dev",
        ),
        ("In file\na.cc:2:1: error: 'x' was not declared\n", "'x' was not", "whole output above"),
        (
            "a.cc:1:10: fatal error: tensorflow/core/framework/op.h: No such file or directory",
            "op.h",
            "TensorFlow's headers are incomplete",
        ),
        ("g++: fatal error: Killed signal terminated program cc1plus", "Killed", "memory"),
        ("a.cc: error: No space left on device", "No space", "The disk is full"),
        ("", "the compiler said nothing", "whole output"),
    ],
)
def test_the_first_error_and_what_it_means(said, line, meaning):
    message = explain(["g++", "a.cc"], said)
    assert said in message
    failed, explanation = message.splitlines()[-2:]
    assert failed.startswith("The build failed: ")
    assert line in failed
    assert meaning in explanation


def test_a_compiler_that_is_missing_or_too_old(tmp_path, monkeypatch):
    assert check_compiler(["g++"]).startswith("g++")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler: .*nowhere cannot be run"):
        check_compiler([str(tmp_path / "nowhere")])
    monkeypatch.setattr(compiler_errors, "OLDEST_GXX", 99)
    with pytest.raises(SystemExit, match="too old: g\\+\\+ .*Version 99 or newer is needed"):
        check_compiler(["g++"])


@pytest.mark.parametrize("choice", ["2.18", "2.21,3", "newest"])
def test_a_tensorflow_that_is_not_supported(monkeypatch, choice):
    monkeypatch.setenv(tensorflow_headers.VARIABLE, choice)
    with pytest.raises(SystemExit, match=f"to list some of 2.19, 2.20, 2.21, but got '{choice}'"):
        tensorflow_headers.wanted()


def test_which_tensorflows_are_built_for(monkeypatch):
    monkeypatch.delenv(tensorflow_headers.VARIABLE, raising=False)
    (here,) = tensorflow_headers.wanted()
    assert here == tensorflow_headers.installed()
    assert (here.folder / tensorflow_headers.FRAMEWORK).exists()
    monkeypatch.setenv(tensorflow_headers.VARIABLE, "")
    assert tensorflow_headers.wanted() == []
    other = here._replace(version="2.18.1")
    monkeypatch.delenv(tensorflow_headers.VARIABLE)
    monkeypatch.setattr(tensorflow_headers, "installed", lambda: other)
    with pytest.raises(SystemExit, match="TensorFlow 2.18.1 is installed, and this package"):
        tensorflow_headers.wanted()


def test_a_precompiled_header_is_used_and_made_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("value.h").write_text("#define VALUE 1\n")
    Path("a.cc").write_text("static_assert(VALUE == 1);\n")
    command = ["g++", "-std=c++17", "-I.", "-Winvalid-pch", "-Werror"]
    header = tmp_path / "objects" / "precompiled.h"
    options = precompile_header(command, header, ["value.h"])
    compile_object([*command, *options, "-c", "a.cc"], tmp_path / "a.o")
    Path("value.h").write_text("#define VALUE 2\n")
    os.utime("value.h", (2**31, 2**31))
    options = precompile_header(command, header, ["value.h"])
    with pytest.raises(SystemExit, match="The build failed: .*static assertion failed"):
        compile_object([*command, *options, "-c", "a.cc"], tmp_path / "a.o")


def test_progress_without_a_terminal_is_one_sentence():
    program = (
        "from build_progress import Progress\n"
        "with Progress('Compiling.', 2) as progress:\n"
        "    progress.step('cc/a.cc')\n"
    )
    done = subprocess.run(
        # A session of its own has no terminal.
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        capture_output=True,
        text=True,
        start_new_session=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("Compiling.\n", "")


def test_progress_on_a_terminal():
    with open_terminal() as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr("build_progress.terminal", lambda: terminal.screen)
        with Progress("Compiling.", 2) as progress:
            progress.step("cc/a.cc")
            progress.step("cc/b.cc")
            progress.step("cc/found_later.cc")
        said = terminal.said("found_later.cc")
    assert "Compiling." in said
    assert "3/3 files" in said


@pytest.mark.parametrize(
    ("distribution", "asked", "wants"),
    [
        ("tensorflow", None, True),
        ("tensorflow-cpu", None, False),
        ("tensorflow_cpu", None, False),
        ("tensorflow_cpu", "1", True),
        (None, "1", True),  # For sessions on a GPU.
    ],
)
def test_gpu_kernels_are_for_a_tensorflow_that_can_use_them(tmp_path, distribution, asked, wants):
    """setup.py, in an environment with this TensorFlow."""
    if distribution:
        minor = tensorflow_headers.LISTS["TENSORFLOWS"][0]
        (tmp_path / "tensorflow" / "include" / "tensorflow").mkdir(parents=True)
        information = tmp_path / f"{distribution}-{minor}.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Name: {distribution}\nVersion: {minor}.0\n")
    program = (
        "import sysconfig, setuptools.dist, distutils.core\n"
        "paths = sysconfig.get_paths()\n"
        f"paths |= {{'purelib': {str(tmp_path)!r}, 'platlib': '/nowhere'}}\n"
        "sysconfig.get_paths = lambda: paths\n"
        "project = distutils.core.run_setup('setup.py', stop_after='init')\n"
        "print(project.get_command_obj('build_ext').wants_cuda())\n"
    )
    unset = {key: text for key, text in os.environ.items() if key != nvcc.CUDA}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**unset, **({nvcc.CUDA: asked} if asked else {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == f"{wants}\n"
