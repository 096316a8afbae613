"""Dtypes of CoSiMultiHeadAttention: its own, Keras' policies, and the dtype of its ring."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, pair

pytestmark = pytest.mark.sampled(3, rest="slow")

HALF = ["bfloat16", "float16"]


def naive(weights, windows, dtype):
    """Return the newest output of each window, every operation in `dtype`, in plain TensorFlow."""
    wq, bq, wk, bk, wv, bv, wo, bo = (tf.cast(w, dtype) for w in weights)
    x = tf.cast(windows, dtype)
    query = tf.einsum("...e,ehd->...hd", x[..., -1, :], wq) + bq
    key = tf.einsum("...ne,ehd->...nhd", x, wk) + bk
    value = tf.einsum("...ne,ehd->...nhd", x, wv) + bv
    query *= tf.cast(1 / np.sqrt(wq.shape[-1]), dtype)
    scores = tf.nn.softmax(tf.einsum("...hd,...nhd->...hn", query, key))
    return tf.einsum("...hd,hde->...e", tf.einsum("...hn,...nhd->...hd", scores, value), wo) + bo


@pytest.mark.parametrize("dtype", [*HALF, "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("seq_len", [N, 64])
def test_half_precision(backend, random, dtype, seq_len):
    """The error is at most twice that of a naive implementation in that type."""
    layer = ct.CoSiMultiHeadAttention(seq_len, H, D, dtype=dtype)
    x = random.normal(size=(2, seq_len + 40, E)).astype("float32")
    layer.build((None, seq_len, E))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    half = layer.compute_dtype
    assert half in HALF
    output = layer.call_steps(x)
    assert output.dtype == half
    assert {layer.get_state()[name].dtype.name for name in ("keys", "values")} == {half}

    windows = reference.sliding_windows(x.swapaxes(0, 1), seq_len).transpose(2, 0, 1, 3)
    weights = [tf.cast(w, "float64").numpy() for w in layer.get_weights()]
    expected = reference.newest_of_multi_head_attention(weights, windows)
    naive_error = reference.relative_error(
        tf.cast(naive(weights, windows, half), "float64"), expected
    )
    assert reference.relative_error(tf.cast(output, "float64"), expected) < 2 * naive_error
    one = layer.call_step(x[:, 0])
    assert one.dtype == half
    assert np.isfinite(tf.cast(one, "float32")).all()


@pytest.mark.parametrize(("cache_dtype", "bound"), [("bfloat16", 1e-2), ("float16", 1.5e-3)])
@pytest.mark.parametrize(("seq_len", "num_heads", "key_dim", "features"), [
    (N, H, D, E), (64, 4, 32, 128), (120, 16, 12, 192),
])  # fmt: skip
def test_a_smaller_ring(backend, random, cache_dtype, bound, seq_len, num_heads, key_dim, features):
    """The ring takes half the bytes. The rest of the layer stays float32."""
    options = dict(cache_dtype=cache_dtype)
    layer, regular = pair(
        seq_len, num_heads, key_dim, features, random=random, layer_options=options
    )
    # These weights give keys and values of order one.
    weights = [w * 2.5 / np.sqrt(w.shape[0]) if w.ndim == 3 else w for w in regular.get_weights()]
    layer.set_weights(weights)
    x = random.normal(size=(2, seq_len + 20, features)).astype("float32")
    windows = reference.sliding_windows(x.swapaxes(0, 1), seq_len).transpose(2, 0, 1, 3)
    expected = reference.newest_of_multi_head_attention(
        [w.astype("float64") for w in weights], windows
    )
    together = layer.call_steps(x)
    assert together.dtype == "float32"
    error = reference.relative_error(together, expected)
    assert 1e-6 < error < bound
    state = layer.get_state()
    assert state["keys"].dtype.name == state["values"].dtype.name == cache_dtype
    layer.clean_state()
    # One call begins long windows, because eager steps are slow.
    begun = seq_len - 10 if seq_len > 60 else 0
    assert begun == 0 or layer.call_steps(x[:, :begun]) is None
    apart = [layer.call_step(x[:, t]) for t in range(begun, x.shape[1])]
    apart = np.stack(apart[seq_len - 1 - begun :], 1)
    # Projections that differ in a float's last bit may round to different 16-bit numbers.
    assert reference.relative_error(apart, together.numpy().astype("float64")) < bound / 50
    one_unit = {"bfloat16": 2**-7, "float16": 2**-10}[cache_dtype]
    for name, array in layer.get_state().items():
        np.testing.assert_allclose(
            array.astype("float32"), state[name].astype("float32"), rtol=one_unit, atol=1e-5
        )


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "fits"),
    [
        ("float32", "float32", True),
        ("float32", tf.bfloat16, True),
        ("float32", "float64", False),
        ("float64", "float32", False),
        ("float64", "float64", True),
        ("bfloat16", "float16", False),
        ("float16", "float16", True),
        ("mixed_bfloat16", "bfloat16", True),
        ("float32", "int8", False),
    ],
)
def test_which_rings_there_are(dtype, cache_dtype, fits):
    def layer():
        return ct.CoSiMultiHeadAttention(N, H, D, dtype=dtype, cache_dtype=cache_dtype)

    if not fits:
        with pytest.raises(ValueError, match="cache_dtype"):
            layer()
        return
    name = tf.as_dtype(cache_dtype).name
    assert layer().get_config()["cache_dtype"] == name
    assert layer().get_state()["keys"].dtype.name == name


def test_inputs_of_other_floating_dtypes_are_cast(backend, random):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, E))
    outputs = [
        layer.call_step(tf.cast(x, dtype), update_state=False)
        for dtype in ("float64", "float32", "float16")
    ]
    assert {output.dtype.name for output in outputs} == {"float32"}
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_a_global_policy_of_keras(backend, random):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_float16")
        layer = ct.CoSiMultiHeadAttention(N, H, D, warm_up="partial")
        step = random.normal(size=(2, E))
        peek = layer.call_step(step, update_state=False)
        assert peek.dtype == "float16"
        assert layer.weights[0].dtype == "float32"
        with ct.call_mode("step"):  # This goes through Keras' __call__, which casts variables.
            np.testing.assert_array_equal(layer(step), peek)
        inputs = keras.Input((N, E))
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(layer(inputs)))
        model.compile("sgd", "mse", jit_compile=False)
        x = random.normal(size=(8, N, E)).astype("float32")
        assert np.isfinite(model.fit(x, x[:, -1:, :1], verbose=0).history["loss"]).all()
    finally:
        keras.config.set_dtype_policy(before)
