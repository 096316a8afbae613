"""Kernels in `weights_dtype`: everything that holds a copy follows the current weights."""

import copy
import importlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference

pytestmark = pytest.mark.sampled(6)

N, E = 6, 8
# bfloat16 changes the outputs of these layers by less; other weights change them by more than 0.1.
BOUND = 2e-2
ENCODER = dict(seq_len=N, embed_dim=E, num_heads=2, ff_dim=8, weights_dtype="bfloat16")
LAYERS = {
    "CoSiMultiHeadAttention": lambda: ct.CoSiMultiHeadAttention(
        N, 2, 4, use_gate=True, weights_dtype="bfloat16"
    ),
    "CoSiTransformerEncoder": lambda: ct.CoSiTransformerEncoder(**ENCODER),
    "TransformerEncoder": lambda: ct.TransformerEncoder(2, **ENCODER),
    "TransformerEncoder, one retroactive": lambda: ct.TransformerEncoder(
        1, kind="retroactive", **ENCODER
    ),
    "CoResidual": lambda: ct.CoResidual(LAYERS["CoSiMultiHeadAttention"]()),
}


@pytest.fixture(params=LAYERS)
def layer(request, random, monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = LAYERS[request.param]()
    layer.build((None, N, E))
    assign(layer, random)
    layer.ensure_streams(3)
    return layer


def assign(layer, random):
    for w in layer.weights:
        w.assign(random.normal(size=w.shape) / 2)


def last(step, layer, x):
    layer.clean_state()
    for t in range(x.shape[1]):
        y = step(x[:, t])
    return np.asarray(y)


def regular(layer, x):
    return np.asarray(layer.call_regular(x[:, -layer.receptive_field :]))[:, 0]


def load_weights_file(layer, weights, path):
    model = keras.Sequential([keras.Input((N, E)), layer])
    kept = layer.get_weights()
    for w, value in zip(layer.weights, weights, strict=True):
        w.assign(value)
    model.save_weights(path / "new.weights.h5")
    for w, value in zip(layer.weights, kept, strict=True):
        w.assign(value)
    model.load_weights(path / "new.weights.h5")


def set_own_weights(layer, weights, path):
    layer.set_weights(weights)


def set_model_weights(layer, weights, path):
    model = keras.Sequential([keras.Input((N, E)), layer])
    model.set_weights(weights)
    ct.convert_weights(model)


def load_and_convert(layer, weights, path):
    load_weights_file(layer, weights, path)
    ct.convert_weights(layer)


@pytest.mark.parametrize(
    "change", [load_weights_file, set_own_weights, set_model_weights, load_and_convert]
)
def test_a_traced_step_sees_new_weights(layer, random, tmp_path, change):
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    traced = tf.function(lambda x: layer.call_step(x), autograph=False)  # Traced in half the time.
    old = regular(layer, x)
    assert reference.relative_error(last(traced, layer, x), old) < BOUND
    for _ in range(2):  # In the second round, the eager step has gathered its variables too.
        weights = [random.normal(size=w.shape) / 2 for w in layer.weights]
        change(layer, weights, tmp_path)
        new = regular(layer, x)
        assert reference.relative_error(new, old) > 0.1
        assert reference.relative_error(last(traced, layer, x), new) < BOUND
        assert reference.relative_error(last(layer.call_step, layer, x), new) < BOUND
        old = new


def test_a_traced_step_sees_weights_of_a_step_gathered_again(random, monkeypatch):
    """A new activation makes the eager step gather its variables again. The copies stay."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = LAYERS["CoSiTransformerEncoder"]()
    layer.build((None, N, E))
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    traced = tf.function(lambda x: layer.call_step(x), autograph=False)  # Traced in half the time.
    last(traced, layer, x)
    gelu = layer.feed_forward.activation
    layer.feed_forward.activation = keras.activations.relu
    last(layer.call_step, layer, x)
    layer.feed_forward.activation = gelu
    layer.set_weights([random.normal(size=w.shape) / 2 for w in layer.weights])
    assert reference.relative_error(last(traced, layer, x), regular(layer, x)) < BOUND


def test_the_weights_after_a_checkpoint_is_restored(layer, random, tmp_path):
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    traced = tf.function(lambda x: layer.call_step(x), autograph=False)  # Traced in half the time.
    checkpoint = tf.train.Checkpoint(layer=layer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))  # Saved before the copies are made.
    right = regular(layer, x)
    assign(layer, random)
    last(traced, layer, x)
    checkpoint.restore(path).assert_consumed()
    ct.convert_weights(layer)
    assert reference.relative_error(last(traced, layer, x), right) < BOUND


def test_a_copy_of_the_layer_has_copies_of_its_own(random, monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = LAYERS["CoSiMultiHeadAttention"]()
    layer.build((None, N, E))
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    y = last(layer.call_step, layer, x)
    other = copy.deepcopy(layer)
    other.set_weights([2 * w + 1 for w in other.get_weights()])
    assert reference.relative_error(last(other.call_step, other, x), regular(other, x)) < BOUND
    np.testing.assert_array_equal(last(layer.call_step, layer, x), y)


def test_an_export_has_the_weights_of_now(random, monkeypatch, tmp_path):
    """Export a graph of a layer that was trained after its last step."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = LAYERS["CoSiMultiHeadAttention"]()
    layer.build((None, N, E))
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    last(layer.call_step, layer, x)
    assign(layer, random)
    module = importlib.import_module("continual_transformers_tf.models.export")
    monkeypatch.setattr(module, "_on_a_session", lambda *_: (None, None))
    ct.export(layer, tmp_path / "saved", streams=3, states=False)
    step = tf.saved_model.load(str(tmp_path / "saved")).signatures["step"]
    for t in range(2 * N):
        y = step(streams=tf.range(3), x=tf.constant(x[:, t]))["y"]
    assert reference.relative_error(y.numpy(), regular(layer, x)) < BOUND
