"""Layers whose dense parts only Keras can call: quantized, or regularized in training."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference

pytestmark = pytest.mark.sampled(20)

N, E = 6, 8
ENCODER = dict(seq_len=N, embed_dim=E, num_heads=2, ff_dim=8)
LAYERS = {
    "co_si": lambda: ct.CoSiMultiHeadAttention(N, 2, 4, use_gate=True),
    "co_si with output_shape": lambda: ct.CoSiMultiHeadAttention(N, 2, 4, output_shape=(2, 3)),
    "co_re": lambda: ct.CoReMultiHeadAttention(N, 2, 4),
    "co_re with gate": lambda: ct.CoReMultiHeadAttention(N, 2, 4, use_gate=True),
    "co_re with output_shape": lambda: ct.CoReMultiHeadAttention(N, 2, 4, output_shape=(2, 3)),
    "co_si encoder": lambda: ct.CoSiTransformerEncoder(**ENCODER),
    "co_re encoder": lambda: ct.CoReTransformerEncoder(**ENCODER),
    "stack of one": lambda: ct.TransformerEncoder(1, **ENCODER),
    "retroactive stack": lambda: ct.TransformerEncoder(2, kind="retroactive", **ENCODER),
    "residual": lambda: ct.CoResidual(ct.CoSiMultiHeadAttention(N, 2, 4)),
}
DENSE = (keras.layers.Dense, keras.layers.EinsumDense)


@pytest.fixture(params=LAYERS)
def layer(request, random):
    layer = LAYERS[request.param]()
    layer.build((None, N, E))
    for w in layer.weights:
        w.assign(random.normal(size=w.shape) / 2)
    return layer


@pytest.fixture
def x(random):
    return random.normal(size=(3, 2 * N, E)).astype("float32")


def dense_layers(layer):
    return [part for part in layer._flatten_layers() if isinstance(part, DENSE)]


def check_steps(layer, x, bound, **options):
    """Steps one by one, several, and traced, give the regular call's numbers."""
    expected = np.asarray(layer(x[:, -N:], **options))
    # Without AutoGraph, it is traced in half the time.
    traced = tf.function(lambda x: layer.call_step(x, **options), autograph=False)
    for step in (layer.call_step, traced):
        layer.clean_state()
        for t in range(N - 1, 2 * N):  # These fill the window and move it once.
            y = step(x[:, t], **options) if step is not traced else step(x[:, t])
        y = np.asarray(y).reshape(expected.shape)
        assert reference.relative_error(y, expected) < bound
    layer.clean_state()
    layer.call_steps(x[:, :N], **options)
    y = np.asarray(layer.call_steps(x[:, N:], **options))[:, -1]
    assert reference.relative_error(y.reshape(expected.shape), expected) < bound


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantized_layers_take_steps(backend, layer, x, mode):
    exact = np.asarray(layer(x[:, -N:]))
    for part in dense_layers(layer):
        part.quantize(mode)
    quantized = np.asarray(layer(x[:, -N:]))
    assert reference.relative_error(quantized, exact) > 1e-4
    # An activation halfway between two integers may be rounded to either.
    check_steps(layer, x, {"int8": 2e-2, "float8": 5e-2}[mode])


def test_regularized_activity_in_training(backend, random, x):
    options = dict(activity_regularizer="l2", use_gate=True)
    for layer in (
        ct.CoSiMultiHeadAttention(N, 2, 4, **options),
        ct.CoReMultiHeadAttention(N, 2, 4, **options),
        ct.CoReMultiHeadAttention(N, 2, 4, output_shape=(2, 3), **options),
    ):
        check_steps(layer, x, 5e-6, training=True)


def test_the_output_of_a_retroactive_step_is_regularized_as_a_window(backend, random, x):
    layer = ct.CoReMultiHeadAttention(N, 2, 4, activity_regularizer="l2")
    layer(x[:, -N:], training=True)
    expected = float(layer._output_dense.losses[0])
    with ct.call_mode("step"):
        for t in range(2 * N):
            layer(x[:, t], training=True)
    assert expected > 0
    np.testing.assert_allclose(layer._output_dense.losses[0], expected, rtol=1e-5)


def test_a_part_that_fails_before_the_attention_moves_nothing(backend, layer, x):
    """The part's own error comes through, and the failed call has no effect on later steps."""
    layer.call_steps(x[:, :N])
    for part in dense_layers(layer):
        if part.name not in ("query", "key", "value", "gate") or "block_1" in part.path:
            continue
        part.quantize("int8")
        layer.call_step(x[:, 0])
        before = layer.get_state()
        call = part.quantized_call
        part.quantized_call = fail
        with pytest.raises(RuntimeError, match="of the part"):
            layer.call_step(x[:, N])
        part.quantized_call = call
        after = layer.get_state()
        for a, b in zip(keras.tree.flatten(before), keras.tree.flatten(after), strict=True):
            np.testing.assert_array_equal(a, b)


def fail(*args, **kwargs):
    raise RuntimeError("of the part")
