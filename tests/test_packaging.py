"""The wheels, each in a new environment, and the lists of sources that both builds read."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import numpy as np
import pytest

import continual_transformers_tf as ct
import wheels

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
        "cuda": ("CUDA", "CUDA_C_API", "CUDA_SESSION"),
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
    version = wheels.PROJECT["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    package = ROOT / "python" / "continual_transformers_tf"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    header = (package / "include" / "continual_transformers.h").read_text()
    assert version == ".".join(re.findall(r"#define CT_VERSION_\w+ (\d+)", header))
    assert (
        f"\nVersion: {version}\n" in (package / "pkgconfig/continual_transformers.pc").read_text()
    )


def test_the_supported_tensorflows_are_the_same_everywhere():
    minors = wheels.LISTS["TENSORFLOWS"]
    major, newest = map(int, minors[-1].split("."))
    fits = f">={minors[0]},<{major}.{newest + 1}"
    extras = wheels.PROJECT["optional-dependencies"]
    assert f"tensorflow-cpu{fits}; platform_machine != 'aarch64'" in extras["cpu"]
    assert f"tensorflow{fits}; platform_machine == 'aarch64'" in extras["cpu"]
    assert f"tensorflow[and-cuda]{fits}" in extras["gpu"]


def test_both_builds_pack_the_types():
    lists = [(ROOT / name).read_text() for name in ("pyproject.toml", "python/BUILD")]
    for text in lists:
        assert re.search(r'"([\w]+/)?py\.typed"', text)
        assert re.search(r'"([\w]+/)?\*\.pyi"', text)


class Environment:
    """A new virtual environment, outside the checkout."""

    def __init__(self, folder, python=sys.executable):
        subprocess.run([python, "-m", "venv", folder], check=True)
        self.folder = folder

    def run(self, program, *arguments, **variables):
        """Run one of its programs. Return what it prints."""
        # Not the variables of these tests, such as PYTHONPATH.
        environment = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], **variables}
        environment["TF_CPP_MIN_LOG_LEVEL"] = "2"
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *requirements):
        """Have pip install requirements."""
        self.run("python", "-m", "pip", "install", "-q", *map(str, requirements))

    def check_streams(self, kernels=("CPU",), **variables):
        """Check that the package streams here with the kernels that were installed with it."""
        facts = json.loads(self.run("python", "-c", PROGRAM, **variables).splitlines()[-1])
        assert facts["kernels"] == list(kernels)
        assert facts["error"] is None
        assert facts["answered"] == [False, False, False, True, True]
        assert facts["difference"] < 1e-5
        assert Path(facts["library"]).is_relative_to(self.folder)
        for option in ("--cmake-dir", "--pkg-config-dir"):
            folder = Path(self.run("continual-transformers", "info", option).strip())
            assert folder.is_relative_to(self.folder)
            assert list(folder.iterdir())
            assert (folder.parent / "include" / "continual_transformers.h").exists()
        said = self.run("continual-transformers", "info", **variables)
        assert f"fused kernels: {', '.join(kernels)}\n" in said
        assert ("built without CUDA" in said) == ("GPU" not in kernels)


@pytest.mark.slow
def test_the_readme_s_installation_from_a_checkout(tmp_path, monkeypatch):
    """`pip install .` builds sessions where there is no TensorFlow, and otherwise the ops too."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".venv", "build", "dist", "bazel-*", "*.so", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    # Its headers are fetched once for all tests.
    (checkout / "build").mkdir()
    fetched = ROOT / "build" / "tensorflow"
    fetched.mkdir(parents=True, exist_ok=True)
    (checkout / "build" / "tensorflow").symlink_to(fetched)
    environment = Environment(tmp_path / "environment")
    environment.install(checkout)
    said = environment.run("continual-transformers", "info")
    assert "ct.Session: steps run on the CPU" in said
    assert "op libraries for TensorFlow: none" in said
    environment.install("tensorflow-cpu==2.21.*", "keras")
    environment.run(
        *("python", "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", checkout),
        CONTINUAL_TRANSFORMERS_CUDA="0",
    )
    environment.check_streams()


@pytest.fixture(scope="session")
def built_wheels(tmp_path_factory):
    """The wheels, by the version of Python, and the one with GPU kernels under "cuda"."""
    # The first of xdist's workers builds them for all, in the folder that has the workers' own.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with filelock.FileLock(shared / "wheels.lock"):
        if not (shared / "wheels.built").exists():
            # Not those for AArch64 (test_aarch64.py).
            here = f"WHEEL_FLAGS=--machine {wheels.MACHINE}"
            subprocess.run(["make", "wheel", here], cwd=ROOT, check=True)
            (shared / "wheels.built").touch()
    paths = sorted((ROOT / "dist").glob("*.whl"))
    return {
        "cuda" if "_cuda-" in path.name else re.search(r"-cp3(\d+)-", path.name)[1]: path
        for path in paths
    }


MAIN = "continual-transformers-tf[cpu] @ "
# Each wheel, and each TensorFlow.
SAMPLE = [("3.11", "2.19"), ("3.12", "2.20"), ("3.13", "2.21")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "tensorflow"),
    [
        pytest.param(*pair, marks=[] if pair in SAMPLE else [pytest.mark.every_wheel])
        for pair in wheels.supported_pairs()
    ],
)
def test_a_wheel_with_a_tensorflow(built_wheels, tmp_path, python, tensorflow):
    path = wheels.find_python(python)
    if path is None:
        pytest.skip(f"there is no CPython {python}")
    wheel = built_wheels[python.split(".")[1]]
    assert re.search(r"-manylinux_2_35_\w+\.whl$", wheel.name)
    environment = Environment(tmp_path / "environment", path)
    environment.install(MAIN + wheel.as_uri(), f"tensorflow-cpu=={tensorflow}.*")
    environment.check_streams()
    if (python, tensorflow) != SAMPLE[0] or "cuda" not in built_wheels:
        return
    environment.install(built_wheels["cuda"])
    environment.check_streams(["CPU", "GPU"])
    # A driver that is too old.
    source = "int cuDriverGetVersion(int* version) { *version = 12040; return 0; }"
    (tmp_path / "driver.c").write_text(source)
    driver = ["gcc", "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run(driver, check=True)
    environment.check_streams(LD_LIBRARY_PATH=str(tmp_path))
    said = environment.run(
        *(
            "python",
            "-W",
            "always",
            "-c",
            "import continual_transformers_tf as ct, sys, warnings;"
            "warnings.showwarning = lambda message, *_: print(message); ct.ops.kernels()",
        ),
        LD_LIBRARY_PATH=str(tmp_path),
    )
    assert "the GPU's driver supports CUDA 12.4" in said


@pytest.mark.slow
def test_a_wheel_without_tensorflow(built_wheels, tmp_path):
    """A session from a file, the types, and the server; in 25 MB beside NumPy."""
    python, wheel = next(iter(built_wheels.items()))
    environment = Environment(tmp_path / "environment", wheels.find_python(f"3.{python}"))
    environment.install(wheel)
    with zipfile.ZipFile(wheel) as files:
        names = (
            "py.typed",
            "_session.pyi",
            "serving/inference.binpb",
            "include/continual_transformers.h",
        )
        assert {f"continual_transformers_tf/{name}" for name in names} <= {*files.namelist()}
        assert sum(entry.file_size for entry in files.infolist()) < 25e6
    model = tmp_path / "model.safetensors"
    layer = ct.CoSiMultiHeadAttention(4, 2, 3)
    layer.call_step(np.ones((1, 5), "float32"))
    ct.Session(layer).save(model)
    program = (
        "import sys, numpy as np, continual_transformers_tf as ct;"
        f"session = ct.Session.load({str(model)!r});"
        "print(session.step(np.ones((1, 5), 'float32')).shape); print('tensorflow' in sys.modules)"
    )
    assert environment.run("python", "-c", program) == "(1, 5)\nFalse\n"
    assert "--grpc-port" in environment.run("continual-transformers", "serve", "--help")
