"""The loader: which kernels it finds, and what it says where it finds none."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tensorflow as tf
from click.testing import CliRunner

import continual_transformers_tf as ct
from continual_transformers_tf import cli
from continual_transformers_tf.ops import library

PACKAGE = Path(ct.__file__).parent

# A stream in whatever kernels there are: prints their devices, the reason, and an answer.
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
    """A copy of the package, to break."""
    return Path(
        shutil.copytree(
            PACKAGE,
            tmp_path / PACKAGE.name,
            ignore=shutil.ignore_patterns("__pycache__", "demo"),
        )
    )


INFO = "from continual_transformers_tf import cli; cli.main(['info'])"


def run(package, program=PROGRAM, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(package.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
        | environment,
        capture_output=True,
        text=True,
    )


def answer(output):
    return re.search("answer: (.*)", output).group(1)


def test_copied_package_is_fused(copied_package):
    result = run(copied_package)
    assert result.returncode == 0, result.stderr
    assert f"kernels: {sorted(ct.ops.kernels())}\nerror: None" in result.stdout
    assert "warning" not in result.stdout
    asked_for = run(copied_package, CONTINUAL_TRANSFORMERS_BACKEND="tensorflow").stdout
    assert "kernels: []" in asked_for
    assert "warning" not in asked_for
    assert answer(asked_for) == answer(result.stdout)


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


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "does not exist"),
        ("foreign", "is not an op library of continual-transformers-tf"),
        (
            "other version",
            rf"built for TensorFlow 9\S*, but this is TensorFlow {tf.__version__}",
        ),
        ("broken", "could not be loaded"),
        ("a folder", "could not be read"),
    ],
)
def test_without_its_library_everything_runs_and_one_warning_says_why(copied_package, how, reason):
    with contextlib.redirect_stdout(io.StringIO()) as fused:
        exec(PROGRAM, {})
    break_library(copied_package, how)
    result = run(copied_package)
    assert result.returncode == 0, result.stderr
    assert "kernels: []" in result.stdout
    assert re.search(f"error: .*{reason}", result.stdout)
    warnings = re.findall("warning: (.*)", result.stdout)
    assert len(warnings) == 1
    assert re.search(reason, warnings[0])
    assert "pip install" in warnings[0]
    assert answer(result.stdout) == answer(fused.getvalue())

    refused = run(copied_package, CONTINUAL_TRANSFORMERS_BACKEND="fused")
    assert refused.returncode != 0
    assert re.search(f"ImportError: .*{reason}", refused.stderr)


def test_info_fails_where_fused_kernels_are_asked_for_and_there_are_none(copied_package):
    break_library(copied_package, "missing")
    result = run(copied_package, INFO, CONTINUAL_TRANSFORMERS_BACKEND="fused")
    assert result.returncode == 1
    assert "fused kernels: none" in result.stdout


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
