"""The wheels, each in a new environment, and the lists of sources that both builds read."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import tensorflow as tf

import nvcc

ROOT = Path(__file__).parent.parent

# A program that runs with the installed package, outside the checkout.
PROGRAM = """
import json, sys
import numpy as np
import continual_transformers_tf as ct
layer = ct.CoSiMultiHeadAttention(4, 2, 3)
answers = [layer.call_step(np.ones((1, 5), np.float32)) for _ in range(5)]
session = ct.Session(layer)
for _ in range(5):
    of_session = session.step(np.ones((1, 5), np.float32))
print(json.dumps(dict(
    difference=float(np.max(np.abs(of_session - answers[-1]))),
    kernels=sorted(ct.ops.kernels()),
    error=ct.ops.load_error(),
    answered=[answer is not None for answer in answers],
    library=str(ct.ops.LIBRARY_PATH),
)))
"""


def test_the_lists_of_sources_are_complete():
    lists = runpy.run_path(ROOT / "cc" / "library.bzl")
    listed = {
        "cc": (
            *("ATTENTION", "SESSION", "PYTHON", "TENSORFLOW", "BUILD_INFO", "TENSORFLOW_GPU"),
            *("SERVER", "SERVER_MODEL", "SERVER_MAIN"),
        ),
        "cuda": ("CUDA", "CUDA_C_API"),
    }
    for folder, parts in listed.items():
        kinds = [f"{part}_{kind}" for part in parts for kind in ("HEADERS", "SOURCES")]
        named = [name for kind in kinds for name in lists.get(kind, [])]
        found = [
            str(path.relative_to(ROOT / folder))
            for path in (ROOT / folder).glob("**/*")
            if path.suffix in (".h", ".cc", ".cuh", ".cu")
        ]
        assert sorted(named) == sorted(found)


def test_the_version_is_the_same_everywhere():
    setup = (ROOT / "setup.py").read_text()
    version = re.search(r'VERSION = "(.*)"', setup).group(1)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    package = ROOT / "python" / "continual_transformers_tf"
    header = (package / "include" / "continual_transformers.h").read_text()
    assert version == ".".join(re.findall(r"#define CT_VERSION_\w+ (\d+)", header))
    assert (
        f"\nVersion: {version}\n" in (package / "pkgconfig/continual_transformers.pc").read_text()
    )
    assert "version = " not in (ROOT / "pyproject.toml").read_text().split("[tool.", 1)[0]


def test_both_builds_pack_the_types():
    lists = [(ROOT / name).read_text() for name in ("pyproject.toml", "python/BUILD")]
    for text in lists:
        assert re.search(r'"([\w]+/)?py\.typed"', text)
        assert re.search(r'"([\w]+/)?\*\.pyi"', text)


def environment_with(requirement, folder):
    """Return a new environment in which pip has installed this, with its dependencies."""
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", requirement], check=True)
    return folder


def check_streams_in(environment, kernels=("CPU",)):
    """Check that the package streams there with the kernels that were installed with it."""

    def run(*command):
        return subprocess.run(
            command, cwd=environment, check=True, capture_output=True, text=True
        ).stdout

    facts = json.loads(run(environment / "bin/python", "-c", PROGRAM).splitlines()[-1])
    assert facts["kernels"] == list(kernels)
    assert facts["error"] is None
    assert facts["answered"] == [False, False, False, True, True]
    assert facts["difference"] < 1e-5
    assert Path(facts["library"]).is_relative_to(environment)
    for option in ("--cmake-dir", "--pkg-config-dir"):
        folder = Path(run(environment / "bin/continual-transformers", "info", option).strip())
        assert folder.is_relative_to(environment)
        assert list(folder.iterdir())
        assert (folder.parent / "include" / "continual_transformers.h").exists()
    said = run(environment / "bin/continual-transformers", "info")
    assert f"fused kernels: {', '.join(kernels)}\n" in said
    assert ("built without CUDA" in said) == ("GPU" not in kernels)


def check_wheel(wheel, folder, kernels=("CPU",)):
    """Check that the wheel names its TensorFlow version, and streams in a new environment."""
    minor = ".".join(tf.__version__.split(".")[:2])
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"+tf{minor}-{python}-{python}-linux" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        names = ("py.typed", "_session.pyi", "serving/inference.binpb")
        packed = {f"continual_transformers_tf/{name}" for name in names}
        assert packed <= {*files.namelist()}
    environment = environment_with(f"continual-transformers-tf[cpu] @ {wheel.as_uri()}", folder)
    check_streams_in(environment, kernels)


@pytest.mark.slow
def test_the_readme_s_installation_where_there_is_no_tensorflow_yet(tmp_path, monkeypatch):
    """`pip install '.[cpu]'`: pip fetches a TensorFlow to build for, and installs its like."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_CUDA", "0")
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".venv", "build", "dist", "bazel-*", "*.so", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    check_streams_in(environment_with(f"{checkout}[cpu]", tmp_path / "environment"))


@pytest.mark.slow
def test_the_wheel_that_pip_builds(tmp_path):
    """With an nvcc, the wheel has GPU kernels. It uses the objects that `make` compiled."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    check_wheel(wheel, tmp_path / "environment", ["CPU", "GPU"] if nvcc.chosen() else ["CPU"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bazel") is None, reason="there is no bazel on PATH")
def test_the_wheel_that_bazel_builds(tmp_path):
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    subprocess.run(["make", "wheel"], cwd=ROOT, check=True)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    check_wheel(wheel, tmp_path / "environment")
