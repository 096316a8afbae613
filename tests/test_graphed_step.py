"""Eager steps of many ops, which run as a tf.function: it notices what changes about the layer."""

import copy
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from encoder_cases import FF, E, H, N
from errors import BAD_INPUT

pytestmark = pytest.mark.fused_op("RetroactiveAttention")

LAYERS = {
    "stack": lambda: ct.TransformerEncoder(2, N, E, H, FF, kind="retroactive"),
    "block": lambda: ct.CoReTransformerEncoder(N, E, H, FF),
}


@pytest.fixture(params=LAYERS)
def layer(request, random):
    layer = LAYERS[request.param]()
    layer.build((None, N, E))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    return layer


def check(layer, x):
    """Steps x [M, N, E] give what a regular call gives for that window; and bit for bit again."""
    layer.clean_state()
    for t in range(N):
        peeked = layer.call_step(x[:, t], update_state=False)
        output = layer.call_step(x[:, t])
        assert (output is None) == (peeked is None) == (t < N - 1)
    expected = np.reshape(layer.call_regular(x), output.shape)
    assert reference.relative_error(output, expected) < 1e-5
    assert reference.relative_error(peeked, expected) < 1e-5


def test_a_step_is_one_call_of_a_function(layer, executed_ops):
    x = np.ones((2, E), np.float32)
    for _ in range(N):
        layer.call_step(x)
    del executed_ops[:]
    assert layer.call_step(x) is not None
    assert len(executed_ops) < 10, executed_ops
    layer.call_step(x[:1], streams=[1])
    (function,) = layer._graphed_step._functions.values()
    assert function.experimental_get_tracing_count() == 1


def test_it_follows_what_the_layer_becomes(monkeypatch, random, layer):
    x = random.normal(size=(2, N, E)).astype("float32")
    check(layer, x)
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    check(layer, x)
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    check(layer, x)
    block = layer.blocks[0] if hasattr(layer, "blocks") else layer
    block.feed_forward.activation = keras.activations.tanh
    check(layer, x)
    block.output_norm.epsilon = 0.1
    check(layer, x)
    check(copy.deepcopy(layer), x[:, ::-1])
    block.feed_forward.quantize("int8")
    check(layer, x)


def test_what_is_refused_changes_nothing(layer):
    x = np.ones((2, E), np.float32)
    layer.call_step(x)
    before = keras.tree.flatten(layer.get_state())
    for bad in (
        dict(x=x, streams=[0, 2]),
        dict(x=x, streams=[1, 1]),
        dict(x=x, streams=[0]),
        dict(x=np.ones((2, E + 1), np.float32)),
        dict(x=np.ones((2, 1, E), np.float32)),
    ):
        with pytest.raises(BAD_INPUT, match="Expected"):
            layer.call_step(**bad)
    for now, then in zip(keras.tree.flatten(layer.get_state()), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_gradients_flow_through_single_ops(random, layer):
    x = tf.constant(random.normal(size=(2, E)).astype("float32"))
    layer.call_steps(random.normal(size=(2, N, E)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer.call_step(x) ** 2)
    assert np.abs(tape.gradient(loss, x)).max() > 0


def test_threads_take_turns(random, layer):
    x = random.normal(size=(4, 3 * N, E)).astype("float32")
    layer.ensure_streams(4)
    outputs = {}

    def stream(i):
        outputs[i] = [layer.call_step(x[i : i + 1, t], streams=[i]) for t in range(3 * N)]

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        expected = np.reshape(layer.call_regular(x[i : i + 1, -N:]), outputs[i][-1].shape)
        assert reference.relative_error(outputs[i][-1], expected) < 1e-5
