"""What Keras can do to a layer from outside: give it other weights for a call, or another dtype."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from traced import traced

pytestmark = pytest.mark.sampled(9)

N, E = 6, 8
ENCODER = dict(seq_len=N, embed_dim=E, num_heads=2, ff_dim=8, warm_up="partial")
LAYERS = {
    "co_si": lambda: ct.CoSiMultiHeadAttention(N, 2, 4, warm_up="partial"),
    "co_si, narrow": lambda: ct.CoSiMultiHeadAttention(
        N, 2, 4, warm_up="partial", weights_dtype="bfloat16"
    ),
    "co_re": lambda: ct.CoReMultiHeadAttention(N, 2, 4, warm_up="partial"),
    "co_si encoder": lambda: ct.CoSiTransformerEncoder(**ENCODER),
    "co_re encoder": lambda: ct.CoReTransformerEncoder(**ENCODER),
    "stack": lambda: ct.TransformerEncoder(2, **ENCODER),
    "retroactive stack": lambda: ct.TransformerEncoder(2, kind="retroactive", **ENCODER),
    "positions": lambda: ct.CircularPositionalEncoding(11, E),
    "sinusoids": lambda: ct.CircularPositionalEncoding(11, E, encoding="sinusoidal"),
    "delay": lambda: ct.CoDelay(2, warm_up="partial"),
    "residual": lambda: ct.CoResidual(
        ct.CoSiMultiHeadAttention(N, 2, 4, use_gate=True, warm_up="partial")
    ),
    "model": lambda: streaming_model(),
}


def streaming_model():
    x = keras.Input((N, E))
    y = ct.CoSiMultiHeadAttention(N, 2, 4, single_output=False)(x, use_causal_mask=True)
    y = ct.CoSiMultiHeadAttention(N, 2, 4)(y)
    return ct.StreamingModel(keras.Model(x, keras.layers.Dense(3)(y[:, -1])), warm_up="partial")


def make(name, random):
    layer = LAYERS[name]()
    if not layer.built:
        layer.build((None, N, E))
        layer.built = True
    for w in layer.weights:
        w.assign(random.normal(size=w.shape) / 4)  # Logits of order one, also if doubled.
    layer.ensure_streams(3)
    return layer


@pytest.fixture
def x(random):
    return random.normal(size=(3, 2 * N, E)).astype("float32")


# Keras' stateless scope.


def stateless(layer, given, x, mode, streams=None):
    others = [v.value for v in layer.non_trainable_variables]
    with ct.call_mode(mode):
        return layer.stateless_call(given, others, x)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_steps_in_a_stateless_call_have_the_weights_given(backend, random, x, name):
    layer, other = make(name, random), make(name, random)
    given = [2 * v.value for v in layer.trainable_variables]
    for w, value in zip(other.trainable_variables, given, strict=True):
        w.assign(value)
    ct.convert_weights(other)
    bound = 2e-2 if "narrow" in name else 5e-6
    # Without AutoGraph, it is traced in half the time.
    traced = tf.function(lambda given, x: stateless(layer, given, x, "step"), autograph=False)
    for t in range(N):  # Steps before and after the variables are gathered.
        expected = np.asarray(other.call_step(x[:, t]))
        y = stateless(layer, given, x[:, t], "step") if t % 2 else traced(given, x[:, t])
        assert reference.relative_error(y, expected) < bound
    # The streams have taken the steps: Keras' stateless scope does not hold their state.
    np.testing.assert_array_equal(layer.position, [N] * 3)
    expected = np.asarray(other.call_steps(x[:, N:]))
    assert reference.relative_error(stateless(layer, given, x[:, N:], "steps"), expected) < bound


@pytest.mark.parametrize("name", LAYERS)
def test_a_stateless_call_leaves_the_layers_own_weights(backend, random, x, name):
    layer, other = make(name, random), make(name, random)
    for w, value in zip(other.weights, layer.get_weights(), strict=True):
        w.assign(value)
    given = [2 * v.value for v in layer.trainable_variables]
    stateless(layer, given, x[:, 0], "step")  # The first step: no variables have been gathered yet.
    with keras.StatelessScope(list(zip(layer.trainable_variables, given, strict=True))):
        ct.convert_weights(layer)
    layer.clean_state()
    for t in range(N):
        y, expected = layer.call_step(x[:, t]), np.asarray(other.call_step(x[:, t]))
        assert reference.relative_error(y, expected) < 5e-6


def test_a_peek_in_a_stateless_scope_moves_no_stream(backend, random, x):
    layer = make("co_si", random)
    with keras.StatelessScope():
        layer.call_step(x[:, 0], update_state=False)
    np.testing.assert_array_equal(layer.position, [0] * 3)


# Dtype policies that are set after construction.


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_another_policy_is_refused_by_steps(backend, random, x, name, policy):
    if name == "model":  # A model's own policy has no effect: its layers' policies do.
        layer = make(name, random)
        parts = [layer._graph.layers[1]]
    else:
        layer = make(name, random)
        parts = list(layer._flatten_layers())
    for t in range(2):
        layer.call_step(x[:, t])
    kept = [part.dtype_policy for part in parts]
    for part in parts:
        part.dtype_policy = policy
    before = layer.get_state()
    for method, given in ((layer.call_step, x[:, 2]), (layer.call_steps, x[:, 2:4])):
        for call in (method, traced(lambda x, method=method: method(x))):
            with pytest.raises(ValueError, match="Expected the compute dtype that .* made with"):
                call(given)
    after = layer.get_state()
    for a, b in zip(keras.tree.flatten(before), keras.tree.flatten(after), strict=True):
        np.testing.assert_array_equal(a, b)
    if name != "model":
        dtype = "float64" if policy == "float64" else "bfloat16"
        assert keras.backend.standardize_dtype(layer(x[:, :N]).dtype) == dtype
    for part, own in zip(parts, kept, strict=True):
        part.dtype_policy = own
    layer.call_step(x[:, 2])  # As before.
    np.testing.assert_array_equal(layer.position, [3] * 3)


@pytest.mark.parametrize("name", ["co_si encoder", "co_re encoder", "stack", "retroactive stack"])
def test_the_policy_of_a_whole_without_its_parts_is_refused(random, x, name):
    layer = make(name, random)
    layer.dtype_policy = "float64"
    for method, given in ((layer.call_step, x[:, 0]), (layer.call_regular, x[:, :N])):
        with pytest.raises(ValueError, match="Expected the compute dtype that"):
            method(given)
