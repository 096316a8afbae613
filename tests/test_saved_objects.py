"""Saved models and layers in a new process: what loads by itself, and what its errors say."""

import io
import json
import pickle
import subprocess
import sys
import warnings
import zipfile

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct

N, E, H = 4, 6, 2
IMPORT = "import continual_transformers_tf"
OLD_NAME = b"continual_transformers_tf>"  # Before the name of a class, in files of 0.1.0.
LAYERS = [name for name in ct.__all__ if isinstance(getattr(ct, name), type)]
LAYERS = [name for name in LAYERS if issubclass(getattr(ct, name), keras.layers.Layer)]


def regular_model():
    inputs = keras.Input((N, E))
    x = ct.CoSiTransformerEncoder(N, E, H, 9)(ct.CircularPositionalEncoding(2 * N, E)(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with models and layers, each in every format, and a recording."""
    folder = tmp_path_factory.mktemp("files")
    model = regular_model()
    streaming = ct.StreamingModel(model, warm_up="partial")
    x = np.random.default_rng(0).standard_normal((2, N, E)).astype("float32")
    np.save(folder / "x.npy", x)
    np.save(folder / "regular.npy", model(x))
    np.save(folder / "steps.npy", streaming.call_steps(x))
    streaming.clean_state()
    model.save(folder / "model.keras")
    streaming.save(folder / "streaming.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras advises against this format.
        model.save(folder / "model.h5")
    (folder / "model.json").write_text(model.to_json())
    unbuilt = keras.saving.serialize_keras_object(ct.CoDelay(2))
    (folder / "layer.json").write_text(json.dumps(unbuilt))
    for name, saved in dict(model=model, streaming=streaming, layer=model.layers[2]).items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(saved))
    model.export(folder / "regular", verbose=False)
    ct.export(streaming, folder / "exported", streams=2)
    return folder


def run(program, folder):
    """Return what a program prints in a new process in this folder."""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


ERRORS = """
import json, pickle, sys
import keras

def read(name, mode="r"):
    with open(name, mode) as file:
        return file.read()

ways = {
    "model.keras": keras.models.load_model,
    "streaming.keras": keras.models.load_model,
    "model.h5": keras.models.load_model,
    "model.json": lambda name: keras.models.model_from_json(read(name)),
    "layer.json": lambda name: keras.layers.deserialize(json.loads(read(name))),
    "model.pkl": lambda name: pickle.loads(read(name, "rb")),
}
errors = {}
for name, load in ways.items():
    try:
        load(name)
        errors[name] = "none"
    except Exception as error:
        errors[name] = str(error)
assert not any("continual" in name for name in sys.modules)
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_keras_says_what_to_import(files):
    """Keras cannot find the classes by itself, in any format: its error has the import's words."""
    errors = json.loads(run(ERRORS, files).splitlines()[-1])
    assert len(errors) == 6
    for name, message in errors.items():
        assert IMPORT in message, (name, message)


PICKLES = """
import pickle, sys
import numpy as np

x = np.load("x.npy")
streaming = pickle.load(open("streaming.pkl", "rb"))
np.testing.assert_allclose(streaming(x), np.load("regular.npy"), rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(streaming.call_steps(x), np.load("steps.npy"), rtol=1e-5, atol=1e-5)
assert type(pickle.load(open("layer.pkl", "rb"))).__name__ == "CoSiTransformerEncoder"
assert pickle.load(open("model.pkl", "rb")).layers[1].name.startswith("circular")
"""


@pytest.mark.slow
def test_pickles_of_our_classes_import_them(files):
    """So does a pickle of a functional model, after one of ours."""
    run(PICKLES, files)


REGULAR = """
import sys
import numpy as np
import tensorflow as tf

y = tf.saved_model.load("regular").signatures["serve"](tf.constant(np.load("x.npy")))
np.testing.assert_allclose(y["output_0"], np.load("regular.npy"), rtol=1e-5, atol=1e-5)
assert not any("continual" in name for name in sys.modules)
"""


@pytest.mark.slow
def test_a_saved_model_of_regular_calls_needs_nothing_of_ours(files):
    run(REGULAR, files)


EXPORTED = """
{imports}
import numpy as np

x = np.load("x.npy")
step = tf.saved_model.load("exported").signatures["step"]
for t in range(x.shape[1]):
    y = step(x=tf.constant(x[:, t]), streams=tf.range(2))["y"]
np.testing.assert_allclose(y, np.load("steps.npy")[:, -1], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ours first", "tensorflow first"])
def test_the_import_is_enough_for_a_saved_model_of_steps(files, order):
    imports = [IMPORT, "import tensorflow as tf"]
    imports = imports if order == "ours first" else imports[::-1]
    run(EXPORTED.format(imports="\n".join(imports)), files)


SESSION = """
import numpy as np
import continual_transformers_tf as ct

x = np.load("x.npy")
for path in ("model.keras", "streaming.keras"):
    session = ct.Session(path)
    y = session.steps(x)[:, session.delay :]
    np.testing.assert_allclose(y, np.load("steps.npy"), rtol=1e-5, atol=1e-5)
session.load_weights("model.keras")
"""


@pytest.mark.slow
def test_a_session_of_a_keras_file(files):
    run(SESSION, files)


@pytest.mark.slow
def test_pack_loads_keras_files_by_itself(files):
    program = "import sys; from continual_transformers_tf.cli import main; main()"
    command = [sys.executable, "-c", program, "pack", "streaming.keras", "packed.safetensors"]
    command += ["--check", "x.npy", "--tolerance", "1e-4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=files, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "checked: 2 streams" in result.stdout


# In this process.


def test_every_layer_is_saved_under_the_name_that_says_what_to_import():
    assert len(LAYERS) == 17
    for name in LAYERS:
        layer_class = getattr(ct, name)
        assert keras.saving.get_registered_name(layer_class) == f"{IMPORT}>{name}"
        for package in (IMPORT, "continual_transformers_tf"):
            assert keras.saving.get_registered_object(f"{package}>{name}") is layer_class


def test_files_of_0_1_0_load(files):
    """They have the package's name only."""
    old = io.BytesIO()
    with zipfile.ZipFile(files / "model.keras") as archive, zipfile.ZipFile(old, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name).replace(f"{IMPORT}>".encode(), OLD_NAME))
    assert OLD_NAME in old.getvalue()
    (files / "old.keras").write_bytes(old.getvalue())
    y = keras.models.load_model(files / "old.keras")(np.load(files / "x.npy"))
    np.testing.assert_allclose(y, np.load(files / "regular.npy"), rtol=1e-5, atol=1e-5)


def test_clones_and_pickles_and_json_in_the_same_process(files):
    model = regular_model()
    x = np.load(files / "x.npy")
    for copy in (
        keras.models.clone_model(model),
        pickle.loads(pickle.dumps(model)),
        keras.models.model_from_json(model.to_json()),
        keras.models.load_model(files / "model.h5"),
    ):
        copy.set_weights(model.get_weights())
        np.testing.assert_allclose(copy(x), model(x), rtol=1e-6, atol=1e-6)


def test_paths_of_other_files_are_refused(files):
    with pytest.raises(TypeError, match=r"path of a \.keras file, but got .*Session.load"):
        ct.Session(str(files / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such model file"):
        ct.Session(files / "nowhere.keras")
