"""Which modules are imported when, and what the package does without TensorFlow and Keras."""

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

import continual_transformers_tf as ct
from plan_files import attention_plan

ROOT = Path(__file__).parent.parent

# A prefix for programs: it makes TensorFlow and Keras look as if they were not installed.
WITHOUT_TENSORFLOW = """
import sys
sys.modules.update(dict.fromkeys(("tensorflow", "keras"), None))
"""

# A program that streams a model file, and prints which modules were imported.
STREAM = """
import sys
import numpy as np
import continual_transformers_tf as ct
session = ct.Session.load(sys.argv[1])
x = np.load(sys.argv[2])
y = np.stack([session.step(x[:, t]) for t in range(x.shape[1])], axis=1)
np.save(sys.argv[3], y)
print(*(name for name, module in sys.modules.items() if module is not None))
"""


def run(program, *arguments, python=sys.executable, status=0):
    result = subprocess.run(
        [python, "-c", program, *map(str, arguments)], capture_output=True, text=True, cwd="/"
    )
    assert result.returncode == status, result.stderr
    return result.stdout


@pytest.fixture
def streamed(random, tmp_path):
    """Return the arguments of STREAM, and what it must write."""
    plan = attention_plan(random)
    x = random.standard_normal((2, 9, 6)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    arguments = plan.write(tmp_path), tmp_path / "x.npy", tmp_path / "y.npy"
    return arguments, plan.session().steps(x)


def check_streamed(streamed, said):
    (*_, path), expected = streamed
    # Single steps and one call of many round differently: their products have more rows.
    np.testing.assert_allclose(np.load(path), expected, rtol=1e-5, atol=1e-6)
    loaded = {name.split(".")[0] for name in said.split()}
    assert "numpy" in loaded
    assert not loaded & {"tensorflow", "keras", "click", "h5py", "absl"}


def test_a_session_imports_neither_tensorflow_nor_keras(streamed):
    check_streamed(streamed, run(STREAM, *streamed[0]))


def test_a_session_where_tensorflow_is_not_installed(streamed):
    check_streamed(streamed, run(WITHOUT_TENSORFLOW + STREAM, *streamed[0]))


def test_the_package_alone_imports_next_to_nothing():
    program = "import sys; import continual_transformers_tf; print(*sys.modules)"
    loaded = set(run(program).split())
    assert not loaded & {"tensorflow", "keras", "numpy", "click", "ctypes", "importlib.metadata"}


def test_every_name_is_there_and_the_same_each_time():
    assert set(ct.__all__) <= set(dir(ct))
    for name in ct.__all__:
        assert getattr(ct, name) is getattr(ct, name)
    with pytest.raises(AttributeError, match="'continual_transformers_tf' has no attribute 'Nil'"):
        ct.Nil  # noqa: B018


@pytest.mark.parametrize(
    "asked",
    [
        "ct.CoSiMultiHeadAttention",
        "ct.convert",
        "ct.ops",
        "from continual_transformers_tf import CoDelay",
        "from continual_transformers_tf.layers import CoDelay",
        "import continual_transformers_tf.models.convert",
    ],
)
def test_what_needs_tensorflow_says_what_to_install(asked):
    program = f"""
import continual_transformers_tf as ct
try:
    {asked}
except ImportError as error:
    print(error)
"""
    said = run(WITHOUT_TENSORFLOW + program)
    assert "needs tensorflow, which is not installed" in said
    assert "pip install 'continual-transformers-tf[cpu]'" in said


def test_a_session_without_the_library_says_why_and_what_to_do():
    program = """
import sys
sys.modules["continual_transformers_tf._session"] = None
import continual_transformers_tf as ct
try:
    ct.Session
except ImportError as error:
    print(error)
"""
    said = run(program)
    assert "Session needs the package's native libraries, which could not be loaded: " in said
    assert "pip install" in said


# Importing Keras takes seconds.
@pytest.mark.slow
@pytest.mark.parametrize("imports", ["ct keras", "keras ct", "ops keras"])
def test_keras_loads_models_with_our_layers_whoever_is_imported_first(tmp_path, imports):
    import keras

    inputs = keras.Input((4, 6))
    outputs = ct.CoDelay(2)(ct.CoSiMultiHeadAttention(4, 2, 3)(inputs, inputs))
    keras.Model(inputs, outputs).save(tmp_path / "model.keras")
    ct_name = "continual_transformers_tf"
    names = {"ct": ct_name, "keras": "keras", "ops": f"{ct_name}.ops"}
    program = "\n".join(f"import {names[name]}" for name in imports.split())
    program += "\nimport sys\nprint(keras.models.load_model(sys.argv[1]).layers[-1].delay)"
    assert run(program, tmp_path / "model.keras").splitlines()[-1] == "2"


@pytest.mark.slow
def test_a_server_s_installation_has_no_tensorflow(streamed, tmp_path, monkeypatch):
    """The wheel is installed with its dependencies, without an extra, in a new environment."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_CUDA", "0")
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", wheels, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = wheels.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    check_streamed(streamed, run(STREAM, *streamed[0], python=python))
    installed = run("import importlib.metadata as m; print(*(d.name for d in m.distributions()))")
    assert "tensorflow" in installed
    installed = run(
        "import importlib.metadata as m; print(*(d.name for d in m.distributions()))", python=python
    )
    assert "numpy" in installed
    assert "tensorflow" not in installed
    assert "keras" not in installed
    said = subprocess.run(
        [environment / "bin" / "continual-transformers", "info"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "TensorFlow and Keras are not installed" in said
