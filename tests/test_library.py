"""The loader of the library: which kernels it finds, and its messages if it finds none."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import continual_transformers_tf as ct
from continual_transformers_tf import cli, native
from continual_transformers_tf.ops import library

PACKAGE = Path(ct.__file__).parent

# A program that streams with whatever kernels it finds. It prints their devices, why others are
# missing, and an output.
PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np
    import continual_transformers_tf as ct
    layer = ct.CoSiMultiHeadAttention(3, 2, 4, kernel_initializer="ones", warm_up="partial")
    other = ct.CoSiMultiHeadAttention(3, 2, 4, kernel_initializer="ones", warm_up="partial")
    for x in (1.0, 2.0, 4.0, 8.0):
        y = layer.call_step(np.full((1, 2), x, np.float32))
        other.call_step(np.full((1, 2), x, np.float32))
print("kernels:", sorted(ct.ops.kernels()))
print("error:", ct.ops.load_error())
print("answer: %.4f" % float(y[0, 0]))
for warning in caught:
    if issubclass(warning.category, RuntimeWarning):
        print("warning:", warning.message)
"""


@pytest.fixture
def copied_package(tmp_path):
    """Return a copy of the package, to break."""
    return Path(
        shutil.copytree(
            PACKAGE,
            tmp_path / PACKAGE.name,
            ignore=shutil.ignore_patterns("__pycache__", "demo"),
        )
    )


@pytest.fixture
def reset_loader(monkeypatch):
    """Reset the loader as if it had never run: a new process would take seconds to start."""
    caches = (library._load, library._warn_once)

    def forget():
        for cache in caches:
            cache.cache_clear()

    monkeypatch.delenv("CONTINUAL_TRANSFORMERS_BACKEND", raising=False)
    forget()
    yield
    monkeypatch.undo()
    forget()


def run_here():
    """Return what the program prints in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(PROGRAM, {})
    return output.getvalue()


def run(package):
    """Return what the program prints in a new process, with that package."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(package.parent), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def answer(output):
    return re.search("answer: (.*)", output).group(1)


@pytest.mark.slow
def test_copied_package_is_fused(copied_package):
    output = run(copied_package)
    assert f"kernels: {sorted(ct.ops.kernels())}\nerror: None" in output
    assert "warning" not in output


def test_plain_tensorflow_is_asked_for(monkeypatch, reset_loader):
    kernels, fused = ct.ops.kernels(), run_here()
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    plain = run_here()
    assert f"kernels: {sorted(kernels)}\nerror: None" in fused
    assert "kernels: []" in plain
    assert "warning" not in fused + plain
    assert answer(plain) == answer(fused)


def break_library(package, how):
    library_path = package / library.LIBRARY_NAME
    content = library_path.read_bytes()
    library_path.unlink()
    if how == "foreign":
        library_path.write_bytes(b"\x7fELF not ours")
    elif how == "other version":
        version = library.built_for(PACKAGE / library.LIBRARY_NAME).encode()
        other = re.sub(rb"^\d+", lambda digits: b"9" * len(digits[0]), version)
        content = content.replace(b"TensorFlow " + version, b"TensorFlow " + other)
        library_path.write_bytes(content)
    elif how == "a folder":
        library_path.mkdir()
    elif how == "broken":
        mark = content.index(b"continual-transformers-tf built for")
        library_path.write_bytes(content[mark : mark + 100])


REASONS = {
    "missing": "does not exist",
    "foreign": "is not an op library of continual-transformers-tf",
    "other version": rf"built for TensorFlow 9\S*, but this is TensorFlow {tf.__version__}",
    "broken": "could not be loaded",
    "a folder": "could not be read",
}


def check_without_library(output, how):
    assert "kernels: []" in output
    assert re.search(f"error: .*{REASONS[how]}", output)
    warnings = re.findall("warning: (.*)", output)
    assert len(warnings) == 1
    assert re.search(REASONS[how], warnings[0])
    assert "pip install" in warnings[0]


@pytest.mark.parametrize("how", REASONS)
def test_without_its_library_everything_runs_and_one_warning_says_why(
    copied_package, monkeypatch, reset_loader, how
):
    fused = run_here()
    library._load.cache_clear()
    break_library(copied_package, how)
    monkeypatch.setattr(library, "LIBRARY_PATH", copied_package / library.LIBRARY_NAME)
    output = run_here()
    check_without_library(output, how)
    assert answer(output) == answer(fused)

    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = ct.CoSiMultiHeadAttention(3, 2, 4)
    with pytest.raises(ImportError, match=REASONS[how]):
        layer.call_step(np.zeros((1, 2), "float32"))
    result = CliRunner().invoke(cli.main, ["info"])
    assert result.exit_code == 1
    assert "fused kernels: none" in result.output


def test_a_library_for_another_tensorflow_is_named(copied_package, monkeypatch, reset_loader):
    break_library(copied_package, "missing")
    for minor in ("10.2", "9.21"):
        (copied_package / library.LIBRARY_NAME.replace(library.MINOR, minor)).touch()
    monkeypatch.setattr(library, "LIBRARY_PATH", copied_package / library.LIBRARY_NAME)
    monkeypatch.setattr(native, "PACKAGE", copied_package)
    there = r"does not exist; there are op libraries for TensorFlow 9\.21, 10\.2\. To build it"
    assert re.search(there, ct.ops.load_error())


@pytest.mark.slow
def test_the_op_library_needs_the_core_library_beside_it(copied_package):
    (copied_package / native.CORE_LIBRARY_PATH.name).unlink()
    output = run(copied_package)
    assert "kernels: []" in output
    assert re.search(f"error: .*could not be loaded: .*{native.CORE_LIBRARY_PATH.name}", output)


def shown_by(path):
    """Return the names that a library exports, with C++ names mangled."""
    command = ["nm", "--dynamic", "--defined-only", path]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in listed.splitlines()]


def needed_by(path):
    listed = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True)
    return re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout)


def test_the_core_library_links_neither_tensorflow_nor_python():
    needed = needed_by(native.CORE_LIBRARY_PATH)
    assert needed
    assert not [name for name in needed if "tensorflow" in name or "python" in name]


def test_the_core_library_shows_its_own_names_only():
    shown = shown_by(native.CORE_LIBRARY_PATH)
    assert "continual_transformers_target" in shown
    assert any(name.startswith("_ZN22continual_transformers7Session4StepE") for name in shown)
    ours = re.compile(r"(ct|continual_transformers)_|_Z(NK?|T[ISV]N)22continual_transformers")
    assert not [name for name in shown if not ours.match(name)]


def test_the_op_library_has_no_kernels_inside():
    assert native.CORE_LIBRARY_PATH.name in needed_by(library.LIBRARY_PATH)
    assert not [
        name for name in shown_by(library.LIBRARY_PATH) if "22continual_transformers" in name
    ]
    text = subprocess.run(
        ["nm", "--demangle", library.LIBRARY_PATH], check=True, capture_output=True, text=True
    ).stdout
    assert "continual_transformers::" in text
    assert not re.search("N_(AVX2|AVX3|SSE2)::", text)


@pytest.mark.slow
def test_without_its_library_in_a_process_that_never_had_it(copied_package):
    break_library(copied_package, "missing")
    output = run(copied_package)
    check_without_library(output, "missing")
    assert answer(output) == answer(run_here())


def test_a_backend_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"CONTINUAL_TRANSFORMERS_BACKEND.*'gpu'"):
        ct.ops.kernels()
    for command in ("info", "demo", "bench"):
        result = CliRunner().invoke(cli.main, [command])
        assert result.exit_code == 1
        assert re.fullmatch("Error: .*CONTINUAL_TRANSFORMERS_BACKEND.*'gpu'\n", result.output)


def test_the_version_is_that_of_the_package():
    assert ct.__version__ == metadata.version("continual-transformers-tf")
    assert ct.__version__ in CliRunner().invoke(cli.main, ["--version"]).output


def test_the_library_says_what_it_was_built_for():
    version = library.built_for(library.LIBRARY_PATH)
    assert version.split(".")[:2] == tf.__version__.split(".")[:2]
    assert library.built_for(__file__) is None
