"""SavedModels that take steps: in a Python without the package, and in C++ without Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from co_si_mha_cases import D, E, H, N, pair

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "cpp_savedmodel"
CLEAN_PYTHON = """
import sys
import numpy as np
import tensorflow as tf

library, folder, steps = sys.argv[1:]
tf.load_op_library(library)
step = tf.saved_model.load(folder).signatures["step"]
outputs = []
for x in np.load(steps):
    result = step(x=tf.constant(x), streams=tf.range(len(x)))
    outputs.append(np.concatenate([result["y"], result["ready"].numpy()[:, None]], 1))
assert not any(name.startswith("continual_transformers") for name in sys.modules)
np.save(steps, outputs)
"""


PARTIAL = dict(warm_up="partial")
SIZES = (N, E, H, 9)


def whole_model(random):
    inputs = keras.Input((N, E))
    x = ct.CircularPositionalEncoding(2 * N, E)(inputs)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(H, D)(x, x))
    return ct.convert(keras.Model(inputs, keras.layers.Dense(3)(x[:, -1])), N, **PARTIAL)


def model_of(*layers):
    """Return a StreamingModel of these layers and a head, one after another."""
    x = inputs = keras.Input((N, E))
    for layer in (*layers, keras.layers.Dense(3)):
        x = layer(x)
    return ct.StreamingModel(keras.Model(inputs, x), **PARTIAL)


# Everything that can be exported, built.
LAYERS = {
    "attention": lambda random: pair(random=random, layer_options=PARTIAL)[0],
    "encoder": lambda random: ct.CoSiTransformerEncoder(*SIZES, **PARTIAL),
    "delayed": lambda random: pair(
        random=random, use_gate=True, layer_options=dict(query_index=2, **PARTIAL)
    )[0],
    "whole": whole_model,
    "half": lambda random: ct.CoSiMultiHeadAttention(N, H, D, cache_dtype="bfloat16", **PARTIAL),
    "all_rows": lambda random: ct.CoReMultiHeadAttention(N, H, D, use_gate=True, **PARTIAL),
    "all_rows_encoder": lambda random: ct.CoReTransformerEncoder(*SIZES, **PARTIAL),
    "single_output": lambda random: ct.TransformerEncoder(2, *SIZES, **PARTIAL),
    "retroactive": lambda random: ct.TransformerEncoder(3, *SIZES, kind="retroactive", **PARTIAL),
    "late_model": lambda random: model_of(
        ct.CoResidual(ct.CoSiMultiHeadAttention(N, H, D, query_index=2))
    ),
    "deep_model": lambda random: model_of(
        ct.CoReTransformerEncoder(*SIZES), ct.CoSiTransformerEncoder(*SIZES)
    ),
    "delay": lambda random: ct.CoDelay(3, **PARTIAL),
}


# These are made of layers that are tested here too. Their plain TensorFlow graphs take seconds to
# trace.
COMPOSED = ("whole", "single_output", "retroactive", "late_model", "deep_model")


@pytest.mark.sampled(8, rest="slow")
@pytest.mark.parametrize(("backend", "name"), [
    pytest.param(
        backend, name,
        marks=pytest.mark.slow if backend == "tensorflow" and name in COMPOSED else (),
    )
    for backend in ("fused", "tensorflow")
    for name in LAYERS
], indirect=["backend"])  # fmt: skip
def test_goes_on_where_it_was(backend, random, tmp_path, name):
    """Every signature runs in this process. Its streams are separate from the layer's."""
    layer = LAYERS[name](random)
    x = random.normal(size=(2 * N + 3, 3, E)).astype("float32")
    for t in range(3):
        layer.call_step(x[t])
    ct.export(layer, tmp_path / "saved", streams=5)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert set(loaded.signatures) == {"step", "clean", "ensure_streams"}
    step, clean = loaded.signatures["step"], loaded.signatures["clean"]
    streams = tf.constant([2, 0])
    for t in range(3, 2 * N + 3):
        rows = tf.constant(x[t, [2, 0]])
        expected = layer.call_step(rows, streams=streams)
        got = step(x=rows, streams=streams)
        if expected is not None:
            np.testing.assert_allclose(got["y"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got["ready"], tf.gather(layer.ready, streams))
    assert got["ready"].numpy().all()
    assert clean(streams=tf.constant([0]))["position"].numpy().tolist() == [0]
    after = step(x=tf.constant(x[0, :1]), streams=tf.constant([0]))
    assert not after["ready"].numpy().any()
    for bad in ([0, 5], [1, 1], [-1, 2]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
            step(x=tf.constant(x[0, :2]), streams=tf.constant(bad))
    assert int(loaded.signatures["ensure_streams"](count=tf.constant(7))["count"]) == 7
    step(x=tf.constant(x[0, :2]), streams=tf.constant([0, 5]))


def stepped(layer, x):
    """Return the outputs of steps x [T, M, E], and whether they are ready: [T, M, features + 1]."""
    graph = tf.function(layer.call_step)
    outputs = []
    for step in x:
        y = graph(tf.constant(step)).numpy()
        outputs.append(np.concatenate([y, layer.ready.numpy()[: len(y), None]], 1))
    return np.stack(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "whole", "retroactive"])
def test_in_a_fresh_python_with_nothing_but_the_op_library(monkeypatch, random, tmp_path, name):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = LAYERS[name](random)
    x = random.normal(size=(N + 4, 2, E)).astype("float32")
    layer.call_step(x[0])
    ct.export(layer, tmp_path / "saved")
    np.save(tmp_path / "steps.npy", x[1:])
    paths = [str(ct.ops.LIBRARY_PATH), str(tmp_path / "saved"), str(tmp_path / "steps.npy")]
    subprocess.run([sys.executable, "-c", CLEAN_PYTHON, *paths], check=True, timeout=300)
    got, expected = np.load(tmp_path / "steps.npy"), stepped(layer, x[1:])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert expected[:, :, -1].sum() == 2 * 5


def snippets(language):
    readme = (EXAMPLE / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with the program, built and run as its README says, and what it printed."""
    folder = tmp_path_factory.mktemp("cpp")
    shutil.copy(EXAMPLE / "stream.cc", folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (python,) = snippets("python")
    commands = "\n".join(snippets("bash"))
    subprocess.run([sys.executable, "-c", python], cwd=folder, check=True, timeout=300)
    result = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        env={**os.environ, "PATH": path},
        check=True,
        timeout=600,
        stdout=subprocess.PIPE,
        text=True,
    )
    return folder / "stream", result.stdout


@pytest.mark.slow
def test_the_readme_of_the_example(built):
    _, printed = built
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines] == ["warming"] * 3
    assert all(len(line) == 1 + 5 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "encoder", "whole"])
def test_in_cpp_without_python(monkeypatch, built, random, tmp_path, name):
    """C++ gives the same numbers, for streams that continue, restart and are refused."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = LAYERS[name](random)
    x = random.normal(size=(N + 4, 2, E)).astype("float32")
    layer.call_step(x[0])
    ct.export(layer, tmp_path / "saved")
    lines = []
    for step in x[1:]:
        lines += [
            " ".join(["step", str(m), *(f"{v:.9g}" for v in row)]) for m, row in enumerate(step)
        ]

    def stream(lines):
        return subprocess.run(
            [built[0], ct.ops.LIBRARY_PATH, tmp_path / "saved"],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=300,
        )

    result = stream([*lines, "clean 1", lines[1]])
    assert result.returncode == 0, result.stderr
    *steps, after_clean = [line.split() for line in result.stdout.splitlines()]
    got = np.array([[float(v) for v in words[1:]] for words in steps]).reshape(N + 3, 2, -1)
    expected = stepped(layer, x[1:])
    np.testing.assert_allclose(got, expected[..., :-1], rtol=1e-5, atol=1e-6)
    ready = np.array([words[0] == "ready" for words in steps]).reshape(N + 3, 2)
    np.testing.assert_array_equal(ready, expected[..., -1])
    assert after_clean[0] == "warming"

    result = stream([lines[0].replace("step 0", "step 9")])
    assert result.returncode == 1
    assert re.search("(?i)expected streams", result.stderr)
    assert 'got "walk 3"' in stream(["walk 3"]).stderr


def test_inputs_by_name(backend, random, tmp_path):
    """Inputs of different sizes have separate names; inputs of the same size can have them."""
    layer = ct.CoSiMultiHeadAttention(N, H, D, warm_up="partial")
    layer.call_step(np.ones((1, E)), np.ones((1, 3)), np.ones((1, 4)))
    ct.export(layer, tmp_path / "sizes")
    step = tf.saved_model.load(str(tmp_path / "sizes")).signatures["step"]
    _, inputs = step.structured_input_signature
    assert {name: spec.shape.as_list() for name, spec in inputs.items()} == {
        "query": [None, E], "value": [None, 3], "key": [None, 4], "streams": [None],
    }  # fmt: skip
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    ct.export(layer, tmp_path / "two", streams=1, inputs=["query", "value"])
    step = tf.saved_model.load(str(tmp_path / "two")).signatures["step"]
    query, value = random.normal(size=(2, 1, E)).astype("float32")
    got = step(query=tf.constant(query), value=tf.constant(value), streams=tf.constant([0]))
    np.testing.assert_allclose(got["y"], layer.call_step(query, value), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_exported_is_refused(tmp_path):
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    with pytest.raises(ValueError, match="never been called"):
        ct.export(layer, tmp_path)
    layer.build((None, N, E))
    for bad in (dict(streams=0), dict(inputs=["x"]), dict(inputs=["value"]), dict(inputs=[])):
        with pytest.raises(ValueError, match="Expected"):
            ct.export(layer, tmp_path, **bad)
    with pytest.raises(ValueError, match="give a model that has only Keras.* to ct.convert"):
        ct.export(keras.Sequential([keras.Input((N, E)), keras.layers.Dense(1)]), tmp_path)


def test_names_that_the_signatures_need_are_refused(tmp_path):
    inputs = {name: keras.Input((N, E), name=name) for name in ("x", "streams")}
    x = keras.layers.MultiHeadAttention(H, D)(*inputs.values())
    with pytest.raises(ValueError, match="Expected no input by the name of 'streams'"):
        ct.export(ct.convert(keras.Model(inputs, x), N), tmp_path)
    y = keras.layers.MultiHeadAttention(H, D)(inputs["x"], inputs["x"])
    ready = keras.Model(inputs["x"], {"ready": y, "y": y})
    with pytest.raises(ValueError, match="Expected no output by the name of 'ready'"):
        ct.export(ct.convert(ready, N), tmp_path)


def test_a_sequential_model_that_was_never_in_another(random, tmp_path):
    model = keras.Sequential([ct.CoSiMultiHeadAttention(N, H, D), keras.layers.Dense(2)])
    x = random.normal(size=(2, N, E)).astype("float32")
    model(x)
    streaming = ct.StreamingModel(model, warm_up="partial")
    ct.export(streaming, tmp_path / "saved", streams=2)
    step = tf.saved_model.load(str(tmp_path / "saved")).signatures["step"]
    got = step(x=tf.constant(x[:, 0]), streams=tf.range(2))
    np.testing.assert_allclose(got["y"], streaming.call_step(x[:, 0]), rtol=1e-5, atol=1e-6)


def test_a_model_with_strides_takes_a_block(backend, random, tmp_path):
    x = keras.Input((None, 3))
    y = keras.layers.Conv1D(4, 3, 2, padding="causal")(x)
    model = ct.convert(keras.Model(x, y), warm_up="partial")
    ct.export(model, tmp_path / "model", streams=2)
    step = tf.saved_model.load(str(tmp_path / "model")).signatures["step"]
    assert step.structured_input_signature[1]["x"].shape.as_list() == [None, 2, 3]
    given = random.normal(size=(2, 6, 3)).astype("float32")
    expected = model.call_steps(given)
    for i in range(3):
        got = step(x=tf.constant(given[:, 2 * i : 2 * i + 2]), streams=tf.constant([0, 1]))
        (y,) = (value for name, value in got.items() if name != "ready")
        np.testing.assert_allclose(tf.reshape(y, [2, 4]), expected[:, i], rtol=1e-5, atol=1e-6)
