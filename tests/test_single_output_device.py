"""Single-output attention on the device of its state, step after step in a loop of a graph."""

import numpy as np
import pytest
import tensorflow as tf

import reference
from continual_transformers_tf.ops import AttentionCache, single_output_attention
from single_output_cases import expected_of, steps_of

pytestmark = pytest.mark.sampled(4, rest="slow")


def test_state_and_outputs_stay_on_the_device(backend, random):
    here = tf.zeros([]).device  # Of `--device`.
    cache = AttentionCache(2, 3, 5, 8, 6)
    state = (cache.keys, cache.values, cache.key_mask, cache.position)
    assert [variable.device for variable in state] == [here] * 4
    inputs = [tf.constant(x) for x in steps_of(2, 4, 3, 8, 6, "float32", random)]
    outputs = single_output_attention(*inputs, cache, return_attention_scores=True)
    graph = tf.function(lambda *x: single_output_attention(*x, cache))
    assert [x.device for x in (*outputs, graph(*inputs))] == [here] * 3
    assert [variable.device for variable in state] == [here] * 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_graph_whose_loop_takes_the_steps(backend, random, dtype, masked):
    """Each step sees the state that the last one left, also when the graph runs again."""
    m, h, n, d = 3, 2, 5, 8
    cache = AttentionCache(m, h, n, d, dtype=dtype)
    streams = [reference.Stream(n) for _ in range(m)]
    mask = np.arange(n) % 3 > 0 if masked else None

    @tf.function
    def loop(query, key, value, key_mask):
        outputs = tf.TensorArray(query.dtype, query.shape[1], element_shape=[m, h, d])
        for t in tf.range(query.shape[1]):
            output = single_output_attention(
                query[:, t], key[:, t], value[:, t], cache,
                key_mask=key_mask[:, t], attention_mask=mask,
            )  # fmt: skip
            outputs = outputs.write(t, output)
        return tf.transpose(outputs.stack(), [1, 0, 2, 3])

    compute = cache.compute_dtype
    steps = 2 * n + 1
    for _ in range(2):
        inputs = steps_of(m, steps, h, d, d, "float64", random)
        kept = [tf.cast(tf.cast(x, dtype), compute) for x in inputs]
        key_mask = random.random((m, steps)) < (0.7 if masked else 2)
        full = None if mask is None else np.broadcast_to(mask, (m, h, steps, n))
        expected, _ = expected_of(
            streams, *(x.numpy().astype("float64") for x in kept), mask=full, key_mask=key_mask
        )
        output = loop(*kept, tf.constant(key_mask))
        assert reference.relative_error(output, expected) < reference.BOUNDS[compute.name]
    np.testing.assert_array_equal(cache.position, [2 * steps] * m)
