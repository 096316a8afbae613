"""The bundle for machines with only a GPU: that it is complete, and that a bare Python can use it.

A bare Python is one without this package, TensorFlow, Keras and the packages in .venv.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bundle
import cuda_build
import make_bundle
import session_sizes
from continual_transformers_tf.session import Session
from model_cases import CASES
from plan_files import attention_plan

ROOT = cuda_build.ROOT
NAMES = ("demo", "co_re_gate", "tokens", "two_inputs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a bundle with a few of the tests' models."""
    folder = tmp_path_factory.mktemp("made") / "gpu-bundle"
    float64 = next(name for name, case in CASES.items() if case.dtype == "float64")
    make_bundle.make(folder, [*NAMES, float64])
    return folder


def test_what_is_in_it(made):
    assert list(bundle.sizes_by_part(made)) == ["cases", "packages", "plans", "tensorflow"]
    assert bundle.why_unusable(made) is None
    cases = bundle.read_cases(made)
    assert list(cases) == list(NAMES)  # The model in float64 has no kernels.
    for name, case in cases.items():
        session = Session.load(bundle.model_file(name, made))
        inputs = case.inputs(session.inputs, np.random.default_rng(0), (2, 3))
        assert [x.shape[2:] for x in inputs] == [spec.shape for spec in session.inputs]
        assert [x.dtype for x in inputs] == [spec.dtype for spec in session.inputs]
    assert bundle.why_unusable(made / "none").startswith("no bundle in ")
    assert bundle.read_cases(made / "none") == {}


@pytest.mark.parametrize("size", session_sizes.SIZES, ids=lambda size: size.name)
def test_plans_are_filled_with_weights(made, tmp_path, size):
    plan = bundle.plan_file(size.name, made)
    path = bundle.fill(plan, tmp_path / "model.safetensors")
    count = bundle.weights_bytes(plan.read_bytes())
    assert path.stat().st_size == plan.stat().st_size + count
    session = Session.load(path)
    (spec,) = session.inputs
    assert spec.shape == (size.inputs or size.features,)
    x = np.random.default_rng(1).standard_normal((2, *spec.shape)).astype("float32")
    for _ in range(3):
        y = session.step(x)
    assert np.isfinite(y).all()
    assert np.abs(y).max() > 1e-6
    if size.kind == "co_oad_tr":
        table = 4 * (2 * size.window - 1) * size.features + 8  # Positions, and where they begin.
        assert count == 4 * 9_468_950 + table  # The paper's parameters.
    if size.kind != "retroactive":  # Keys, values and a mask. The rival in PyTorch has as many.
        rings = size.layers * size.window * (2 * 4 * size.features + 1)
        assert session.state_bytes == pytest.approx(rings, rel=0.01)
    again = bundle.fill(plan, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_weights_that_cannot_be_random_are_refused(tmp_path):
    plan = attention_plan(np.random.default_rng(0))
    path = tmp_path / "a.plan"
    header = bundle.beginning(plan.to_bytes())
    path.write_bytes(
        header.replace(b'"dense_0/bias": {"dtype": "F32"', b'"dense_0/bias": {"dtype": "F16"')
    )
    with pytest.raises(ValueError, match="dense_0/bias has dtype F16, expected one of F32, F64, I"):
        bundle.fill(path, tmp_path / "a.safetensors")


def test_a_bundle_that_is_too_large_is_refused(made, tmp_path):
    old = tmp_path / "gpu-bundle"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(make_bundle.TooLarge, match="expected at most 1,000: leave out cases"):
        make_bundle.make(old, NAMES[:1], most_bytes=1000)
    assert [path.name for path in tmp_path.rglob("*")] == ["gpu-bundle", "kept"]
    assert make_bundle.MOST_BYTES <= 60 << 20


def test_git_ignores_it():
    asked = ["git", "check-ignore", "-q", "build/gpu-bundle"]
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    assert subprocess.run(asked, cwd=ROOT).returncode == 0


def bare_python():
    """Return a Python with NumPy and without this package, or the reason why there is none."""
    python = Path(sys.base_prefix, "bin", "python3")
    program = (
        "import importlib.util as u, numpy, pytest\n"
        "assert not any(map(u.find_spec, ('tensorflow', 'keras', 'pybind11', 'nlohmann_json')))"
    )
    done = subprocess.run([python, "-c", program], env={}, capture_output=True, text=True)
    return python if done.returncode == 0 else f"{python}: {done.stderr.strip()[-200:]}"


@pytest.mark.slow
def test_a_bare_python_builds_sessions_and_runs_their_tests(made, tmp_path):
    """As on a GPU machine, but with the emulator's kernels."""
    python = bare_python()
    if isinstance(python, str):
        pytest.skip(python)
    # The tree as it travels, with this checkout's objects: those that fit are not compiled again.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    tree = tmp_path / "tree"
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():  # Some are links to folders.
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    for part in ("core_library", "_session"):
        if (ROOT / "build/objects" / part).is_dir():
            shutil.copytree(ROOT / "build/objects" / part, tree / "build/objects" / part)
    package = tree / "build" / "package"
    bare = {"PATH": os.environ["PATH"]}

    def run(command, environment):
        done = subprocess.run(
            list(map(str, command)), cwd=tree, env={**bare, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    environment = bundle.build_environment(None, made)
    environment["PYTHONPATH"] = str(made / "packages")
    run(bundle.build_command(str(python), package), environment)
    tests = ["tests/gpu_sessions/test_bundled_models.py", "--confcutdir=tests/gpu_sessions"]
    said = run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests],
        {"PYTHONPATH": str(package), bundle.VARIABLE: str(made)},
    )
    # Each once as launches, and once in persistent kernels.
    assert f"{2 * len(bundle.read_cases(made))} passed" in said.splitlines()[-1], said


def test_the_bundles_models_on_the_emulated_library(made):
    """In a process of its own, because tests find the bundle when they are collected."""
    tests = ["tests/gpu_sessions/test_bundled_models.py", "--confcutdir=tests/gpu_sessions"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        [*command, "-k", "test_every_bundled_model"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, bundle.VARIABLE: str(made)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{len(bundle.read_cases(made))} passed" in done.stdout.splitlines()[-1], done.stdout


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "gpu-bundle"
    assert make_bundle.main(["--output", str(folder), "--cases", NAMES[0]]) == 0
    said = capsys.readouterr().out
    total = sum(bundle.sizes_by_part(folder).values())
    assert f"{total:,} bytes, 1 models for the tests" in said
    assert json.loads((folder / "cases" / "cases.json").read_text())[NAMES[0]]["bound"] > 0
