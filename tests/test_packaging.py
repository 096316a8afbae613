"""The wheels, each in an environment of its own, and the lists of sources that both builds read."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tensorflow as tf

ROOT = Path(__file__).parent.parent

# Run where the package is installed and the checkout is not at hand.
PROGRAM = """
import json, sys
import numpy as np
import continual_transformers_tf as ct
layer = ct.CoSiMultiHeadAttention(4, 2, 3)
answers = [layer.call_step(np.ones((1, 5), np.float32)) for _ in range(5)]
print(json.dumps(dict(
    kernels=sorted(ct.ops.kernels()),
    error=ct.ops.load_error(),
    answered=[answer is not None for answer in answers],
    library=str(ct.ops.LIBRARY_PATH),
)))
"""


def test_the_lists_of_sources_are_complete():
    lists = runpy.run_path(ROOT / "cc" / "library.bzl")
    named = lists["ATTENTION_HEADERS"] + lists["ATTENTION_SOURCES"] + lists["TENSORFLOW_SOURCES"]
    found = [path for suffix in ("h", "cc") for path in (ROOT / "cc").glob(f"*/*.{suffix}")]
    assert sorted(named) == sorted(str(path.relative_to(ROOT / "cc")) for path in found)


def test_the_version_stands_in_one_place():
    setup = (ROOT / "setup.py").read_text()
    version = re.search(r'VERSION = "(.*)"', setup).group(1)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert "version = " not in (ROOT / "pyproject.toml").read_text().split("[tool.", 1)[0]


def check_in_clean_environment(wheel, folder):
    """Installs the wheel with its extra `cpu` into a new environment and streams there."""
    minor = ".".join(tf.__version__.split(".")[:2])
    assert f"+tf{minor}-py3-none-" in wheel.name
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            f"continual-transformers-tf[cpu] @ {wheel.as_uri()}",
        ],
        check=True,
    )
    output = subprocess.run(
        [python, "-c", PROGRAM], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    facts = json.loads(output.splitlines()[-1])
    assert facts["kernels"] == ["CPU"]
    assert facts["error"] is None
    assert facts["answered"] == [False, False, False, True, True]
    assert Path(facts["library"]).is_relative_to(folder)
    info = subprocess.run(
        [folder / "bin" / "continual-transformers", "info"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "fused kernels: CPU" in info.stdout


@pytest.mark.slow
def test_the_wheel_that_pip_builds(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    check_in_clean_environment(wheel, tmp_path / "environment")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bazel") is None, reason="there is no bazel on PATH")
def test_the_wheel_that_bazel_builds(tmp_path):
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    subprocess.run(["make", "wheel"], cwd=ROOT, check=True)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    check_in_clean_environment(wheel, tmp_path / "environment")
