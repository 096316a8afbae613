"""Saving and restoring of CoSiMultiHeadAttention: files, configs, clones and pickles."""

import copy
import json
import pickle
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, pair
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")

OPTIONS = dict(
    seq_len=N,
    num_heads=H,
    key_dim=D,
    value_dim=4,
    dropout=0.1,
    use_bias=False,
    output_shape=(2, 3),
    attention_axes=1,
    sliding_window=4,
    flash_attention=False,
    kernel_initializer="he_normal",
    bias_initializer="ones",
    kernel_regularizer="l2",
    bias_regularizer="l1",
    activity_regularizer="l2",
    kernel_constraint="non_neg",
    bias_constraint="non_neg",
    use_gate=True,
    seed=3,
    query_index=2,
    single_output=False,
    warm_up="partial",
    cache_dtype="bfloat16",
    call_mode="steps",
)


def test_the_config_holds_every_argument(random):
    layer = ct.CoSiMultiHeadAttention(**OPTIONS, name="mine")
    config = layer.get_config()
    assert set(OPTIONS) <= set(config)
    for built in (False, True):
        if built:
            layer.build((None, N, E))
        again = ct.CoSiMultiHeadAttention.from_config(layer.get_config())
        again.build((None, N, E))
        assert again.get_config() == layer.get_config()
        assert again.name == "mine"
    again.set_weights(layer.get_weights())
    x = random.normal(size=(2, N, E))
    np.testing.assert_array_equal(again(x), layer(x))
    assert json.loads(json.dumps(config))["output_shape"] == [2, 3]


def saved_file(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def cloned(model, folder):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def weights_file(model, folder):
    clone = keras.models.clone_model(model)
    model.save_weights(folder / "model.weights.h5")
    clone.load_weights(folder / "model.weights.h5")
    return clone


WAYS = {
    "file": saved_file,
    "clone": cloned,
    "weights": weights_file,
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_comes_back(random, tmp_path, way):
    """A loaded model has its weights and clean streams: state is not saved with a model."""
    inputs = keras.Input((None, E))
    layer = ct.CoSiMultiHeadAttention(**{**OPTIONS, "query_index": -1})
    model = keras.Model(inputs, layer(inputs))
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = model(x)
    again = WAYS[way](model, tmp_path)
    assert type(again.layers[-1]) is ct.CoSiMultiHeadAttention
    assert again.layers[-1].get_config() == layer.get_config()
    assert again.layers[-1].get_state()["position"].size == 0
    np.testing.assert_array_equal(again(x), expected)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_layer_comes_back(random, tmp_path, way):
    layer, _ = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    again = WAYS[way](layer, tmp_path)
    np.testing.assert_array_equal(again(x), layer(x))
    np.testing.assert_array_equal(again.call_steps(x), layer.call_steps(x))


def test_state_is_part_of_a_saved_model(tmp_path, random):
    layer, _ = pair(random=random)
    x = tf.constant(random.normal(size=(2, N + 2, E)).astype("float32"))
    module = tf.Module()
    module.layer = layer
    module.step = tf.function(layer.call_step, input_signature=[tf.TensorSpec([None, E])])
    for t in range(N):
        module.step(x[:, t])
    tf.saved_model.save(module, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for t in range(N, N + 2):
        np.testing.assert_array_equal(loaded.step(x[:, t]), module.step(x[:, t]))


def test_a_step_is_ready_by_what_has_really_been_taken(backend, random):
    """`ready` follows the state, also if a graph or a checkpoint changed it."""
    layer, _ = pair(random=random)
    x = random.normal(size=(3, N, E)).astype("float32")
    checkpoint = tf.train.Checkpoint(state=layer._stream_state)
    layer.call_steps(x[:, :2])
    young = checkpoint.save(tempfile.mkdtemp() + "/state")
    assert layer.call_steps(x[:, 2:]) is not None
    checkpoint.restore(young)
    assert layer.call_step(x[:, 2]) is None
    graph = traced(layer.call_steps, input_signature=[tf.TensorSpec([None, None, E])])
    graph(x)
    assert layer.call_step(x[:, 0]) is not None
    graph(np.ones((5, 1, E), np.float32))
    assert layer.call_step(x[:2, 0], streams=[3, 4]) is None


@pytest.mark.parametrize("cache_dtype", [None, "bfloat16", "float16"])
def test_state_as_files(backend, random, tmp_path, cache_dtype):
    """The result of get_state goes through np.savez into another layer, bit for bit.

    NumPy's files have no bfloat16: it comes back as two bytes without a type.
    """
    options = dict(query_index=1, cache_dtype=cache_dtype)
    layer, _ = pair(random=random, layer_options=options)
    other, _ = pair(random=random, layer_options=options)
    other.set_weights(layer.get_weights())
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    layer.call_steps(x[:, :N])
    np.savez(tmp_path / "state.npz", **layer.get_state())
    other.set_state(dict(np.load(tmp_path / "state.npz")))
    np.testing.assert_array_equal(other.call_steps(x[:, N:]), layer.call_steps(x[:, N:]))
    assert reference.relative_error(other.ready, np.ones(2)) == 0
    with pytest.raises(ValueError, match="Expected the state's keys to be"):
        other.set_state({**other.get_state(), "keys": np.zeros((2, N, H, D), "V8")})
