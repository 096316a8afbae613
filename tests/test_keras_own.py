"""Keras' own tests of MultiHeadAttention, from its wheel, run on CoSiMultiHeadAttention."""

import keras
import pytest
from keras.src.layers.attention import multi_head_attention_test as keras_own

import continual_transformers_tf as ct


@keras.saving.register_keras_serializable("test_keras_own")
class DropIn(ct.CoSiMultiHeadAttention):
    """Our layer with the constructor of Keras' layer, and with all outputs."""

    def __init__(self, num_heads, key_dim, *args, seq_len=8, **kwargs):
        kwargs = {"single_output": False, "call_mode": "regular", **kwargs}
        super().__init__(seq_len, num_heads, key_dim, *args, **kwargs)


class _Layers:
    """keras.layers with one layer replaced."""

    MultiHeadAttention = DropIn

    def __getattr__(self, name):
        return getattr(keras.src.layers, name)


@pytest.fixture(autouse=True)
def exchanged(monkeypatch):
    monkeypatch.setattr(keras_own, "layers", _Layers())


class TestMultiHeadAttention(keras_own.MultiHeadAttentionTest):
    """Every test of Keras' layer."""


def test_they_are_run_on_our_layer():
    assert keras_own.layers.MultiHeadAttention is DropIn
    own = [name for name in dir(keras_own.MultiHeadAttentionTest) if name.startswith("test_")]
    assert len(own) > 30
