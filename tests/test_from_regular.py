"""CoSiMultiHeadAttention.from_regular."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference
from convert_cases import D, E, H, N


def test_from_regular(backend, random):
    regular = keras.layers.MultiHeadAttention(H, D, value_dim=3, use_gate=True, name="mine")
    x = random.normal(size=(2, N, E)).astype("float32")
    with pytest.raises(ValueError, match="mine was never called"):
        ct.CoSiMultiHeadAttention.from_regular(regular, seq_len=N)
    regular(x, x)
    layer = ct.CoSiMultiHeadAttention.from_regular(regular, seq_len=N, warm_up="partial")
    assert (layer.name, layer.seq_len, layer.warm_up) == ("mine", N, "partial")
    expected = regular(x, x)[:, -1].numpy()
    assert reference.relative_error(layer.call_steps(x)[:, -1], expected) < 5e-6
    assert layer(x).shape == (2, 1, E)
    again = ct.CoSiMultiHeadAttention.from_regular(layer, seq_len=3)
    assert (again.seq_len, again.warm_up) == (3, "partial")

    with pytest.raises(ValueError, match="Expected a keras"):
        ct.CoSiMultiHeadAttention.from_regular(keras.layers.Dense(2), seq_len=N)
    regular.query_dense.enable_lora(2)
    with pytest.raises(ValueError, match="low-rank"):
        ct.CoSiMultiHeadAttention.from_regular(regular, seq_len=N)


@pytest.mark.parametrize(
    "name", ["call", "_compute_attention", "_compute_attention_mask", "_masked_softmax"]
)
def test_an_attention_of_ones_own_is_refused(random, name):
    def call(self, query, value, key=None, **kwargs):
        return keras.layers.MultiHeadAttention.call(self, query, value, key, **kwargs)

    def other(self, *args, **kwargs):
        return getattr(keras.layers.MultiHeadAttention, name)(self, *args, **kwargs)

    own = {name: call if name == "call" else other}
    layer = type("Own", (keras.layers.MultiHeadAttention,), own)(H, D, name="mine")
    x = random.normal(size=(2, N, E)).astype("float32")
    layer(x, x, use_causal_mask=True)
    with pytest.raises(ValueError, match=f"Expected the {name} of .*mine .Own. has one of its own"):
        ct.CoSiMultiHeadAttention.from_regular(layer, seq_len=N)
    inputs = keras.Input((N, E))
    with pytest.raises(ValueError, match="cannot be converted.*[\\s\\S]*mine .Own. has one of its"):
        ct.convert(keras.Model(inputs, layer(inputs, inputs)), seq_len=N)


def test_a_subclass_of_the_streaming_layer_takes_what_it_is(random):
    class Mine(ct.CoSiMultiHeadAttention):
        def call(self, query, value=None, **kwargs):
            return super().call(query, value, **kwargs)

    x = random.normal(size=(2, N, E)).astype("float32")
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    layer(x)
    mine = Mine.from_regular(Mine.from_regular(layer, seq_len=N), seq_len=N)
    np.testing.assert_array_equal(mine(x), layer(x))
    with pytest.raises(ValueError, match="has one of its own"):
        ct.CoSiMultiHeadAttention.from_regular(mine, seq_len=N)
