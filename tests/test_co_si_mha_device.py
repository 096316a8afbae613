"""Continual layers on the device of their state, step after step in a loop of a graph."""

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import E, N, newest_of_windows, pair
from encoder_cases import FF, RegularEncoder
from encoder_cases import E as ENCODER_E
from encoder_cases import H as ENCODER_H
from encoder_cases import N as ENCODER_N

pytestmark = pytest.mark.sampled(4, rest="slow")


def encoder(random):
    """Return an encoder block, and a function of the regular one: its newest row of each window."""
    n, e = ENCODER_N, ENCODER_E
    layer = ct.CoSiTransformerEncoder(n, e, ENCODER_H, FF, warm_up="partial")
    layer.build((None, n, e))
    layer.set_weights([random.normal(scale=0.5, size=w.shape) for w in layer.weights])
    regular = RegularEncoder(layer)

    def newest(x):
        windows = range(x.shape[1] - n + 1)
        return np.stack([regular.newest(x[:, t : t + n]) for t in windows], 1)

    return layer, newest, n, e


def attention(random):
    """Return the same as `encoder`, for attention."""
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    return layer, lambda x: newest_of_windows(regular, x, N), N, E


@pytest.mark.parametrize("kind", [attention, encoder])
def test_a_graph_whose_loop_takes_the_steps(backend, random, kind):
    layer, newest_of, n, features = kind(random)
    layer.ensure_streams(2)
    here = tf.zeros([]).device  # Of `--device`.

    @tf.function
    def loop(x):
        outputs = tf.TensorArray(x.dtype, x.shape[1], element_shape=[2, features])
        for t in tf.range(x.shape[1]):
            outputs = outputs.write(t, layer.call_step(x[:, t]))
        return tf.transpose(outputs.stack(), [1, 0, 2])

    x = random.normal(size=(2, 4 * n, features)).astype("float32")
    halves = [loop(tf.constant(half)) for half in np.split(x, 2, axis=1)]
    assert [half.device for half in halves] == [here] * 2
    outputs = np.concatenate(halves, 1)[:, n - 1 :]
    assert reference.relative_error(outputs, newest_of(x)) < 1e-5
    step = layer.call_step(tf.constant(x[:, 0]))
    assert step.device == here
