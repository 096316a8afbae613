"""Saving and loading of CoReMultiHeadAttention, also with its streams in saved models."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from co_re_mha_cases import D, E, H, N, pair
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
    warm_up="partial",
    algorithm="recompute",
    call_mode="steps",
)


def saved_file(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_a_model_of_all_rows_comes_back(random, tmp_path, way):
    inputs = keras.Input((None, E))
    layer = ct.CoReMultiHeadAttention(**{**OPTIONS, "call_mode": "regular"}, name="mine")
    model = keras.Model(inputs, layer(inputs))
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = model(x)
    again = {
        "file": saved_file,
        "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
        "deepcopy": lambda model, folder: copy.deepcopy(model),
    }[way](model, tmp_path)
    assert type(again.layers[-1]) is ct.CoReMultiHeadAttention
    assert again.layers[-1].get_config() == layer.get_config()
    np.testing.assert_array_equal(again(x), expected)
    assert json.loads(json.dumps(layer.get_config()))["algorithm"] == "recompute"
    assert set(OPTIONS) <= set(layer.get_config())


def test_state_of_all_rows_is_part_of_a_saved_model(tmp_path, random):
    layer, _ = pair(random=random)
    x = tf.constant(random.normal(size=(2, N + 2, E)).astype("float32"))
    module = tf.Module()
    module.layer = layer
    module.step = traced(layer.call_step, input_signature=[tf.TensorSpec([None, E])])
    for t in range(N):
        module.step(x[:, t])
    tf.saved_model.save(module, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for t in range(N, N + 2):
        np.testing.assert_array_equal(loaded.step(x[:, t]), module.step(x[:, t]))
