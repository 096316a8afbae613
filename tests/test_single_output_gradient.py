"""Gradients of single-output attention: finite differences, and fused against plain TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf

from continual_transformers_tf.ops import AttentionCache, single_output_attention
from single_output_cases import cache_at, steps_of
from traced import traced

pytestmark = pytest.mark.sampled(4, rest="slow")

H, D, DV = 2, 4, 3


def loss_of(inputs, cache, weights, mask=None, key_mask=None, scale=0.7, **options):
    """Return a number that depends on every output and score, without changing the state."""
    output, scores = single_output_attention(
        *inputs,
        cache,
        attention_mask=mask,
        key_mask=key_mask,
        scale=scale,
        return_attention_scores=True,
        update_state=False,
        **options,
    )
    return tf.reduce_sum(output * weights[0]) + tf.reduce_sum(scores * weights[1])


def case(random, n, t, positions=(0, 3, 40), dtype="float64"):
    """Return a cache, steps, weights of the outputs, and masks that do not hide everything."""
    m = len(positions)
    cache, _ = cache_at(positions, H, n, D, DV, dtype, random)
    inputs = [tf.constant(x) for x in steps_of(m, t, H, D, DV, dtype, random)]
    weights = [
        tf.constant(random.normal(size=shape).astype(dtype))
        for shape in ((m, t, H, DV), (m, H, t, n))
    ]
    mask = random.random((m, H, t, n)) < 0.8
    key_mask = random.random((m, t)) < 0.8
    return cache, inputs, weights, mask, key_mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 3), (5, 1), (5, 3), (5, 12), (17, 4)])
def test_gradients_are_those_of_finite_differences(backend, random, n, t, masked):
    cache, inputs, weights, mask, key_mask = case(random, n, t)
    masks = dict(mask=mask, key_mask=key_mask) if masked else {}
    scale = tf.constant(0.7, tf.float64)
    variables = [*inputs, scale]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        loss = loss_of(inputs, cache, weights, scale=scale, **masks)
    gradients = tape.gradient(loss, variables)
    for i, gradient in enumerate(gradients):
        direction = random.normal(size=variables[i].shape)
        ends = []
        for epsilon in (1e-6, -1e-6):
            moved = list(variables)
            moved[i] = variables[i] + epsilon * direction
            ends.append(float(loss_of(moved[:3], cache, weights, scale=moved[3], **masks)))
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope - float(tf.reduce_sum(gradient * direction))) < 1e-6 * max(1, abs(slope))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask_shape", [None, (7,), (3, 7), (3, H, 7)])
@pytest.mark.parametrize("t", [1, 7, 150])
def test_the_fused_gradient_is_that_of_plain_tensorflow(monkeypatch, random, t, mask_shape, dtype):
    cache, inputs, weights, _, key_mask = case(random, 7, t, dtype=dtype)
    mask = None if mask_shape is None else random.random(mask_shape) < 0.8
    gradients = {}
    for backend in ("fused", "tensorflow"):
        monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = loss_of(inputs, cache, weights, mask, key_mask)
        gradients[backend] = tape.gradient(loss, inputs)
    for fused, plain in zip(gradients["fused"], gradients["tensorflow"], strict=True):
        bound = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(fused, plain, atol=bound * np.abs(plain).max())


def test_gradients_do_not_mind_what_is_overwritten(backend, random):
    """Gradients use the rings of their step, even if later steps have overwritten them."""
    cache, inputs, weights, *_ = case(random, 5, 4)
    before = cache.get_state()
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = loss_of(inputs, cache, weights)
    expected = tape.gradient(loss, inputs)
    cache.set_state(before)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output, scores = single_output_attention(
            *inputs, cache, scale=0.7, return_attention_scores=True
        )
        loss = tf.reduce_sum(output * weights[0]) + tf.reduce_sum(scores * weights[1])
        single_output_attention(*(3 * x for x in inputs), cache)
    for got, wanted in zip(tape.gradient(loss, inputs), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_attended_to_has_no_gradient_and_does_no_harm(backend, random, bad):
    cache, inputs, weights, *_ = case(random, 5, 6)
    key_mask = np.ones((3, 6), bool)
    key_mask[:, 2] = False
    inputs = [x.numpy() for x in inputs]
    for x in inputs[1:]:
        x[:, 2] = bad
    inputs = [tf.constant(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = loss_of(inputs, cache, weights, key_mask=key_mask)
    of_query, *of_rest = tape.gradient(loss, inputs)
    assert np.isfinite(of_query).all()
    for gradient in of_rest:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 2], 0 * gradient[:, 2])


def test_a_query_that_attends_to_nothing_may_hold_anything(backend, random):
    cache, inputs, weights, *_ = case(random, 5, 3)
    mask = np.ones((3, 1, 3, 5), bool)
    mask[1, :, 1] = False
    query, key, value = (x.numpy() for x in inputs)
    query[1, 1] = np.nan
    inputs = [tf.constant(x) for x in (query, key, value)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = loss_of(inputs, cache, weights, mask)
    for gradient in tape.gradient(loss, inputs):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("t", [1, 4])
def test_in_a_graph(backend, random, t):
    """The tape is inside the graph, or around it if the graph takes several steps."""
    cache, inputs, weights, *_ = case(random, 5, t)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = loss_of(inputs, cache, weights)
    expected = tape.gradient(loss, inputs)

    @traced
    def within(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = loss_of(inputs, cache, weights)
        return tape.gradient(loss, inputs)

    for got, wanted in zip(within(*inputs), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-12)
    around = traced(lambda *inputs: loss_of(inputs, cache, weights))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = around(*inputs)
    if backend == "fused" and t == 1:
        with pytest.raises(tf.errors.InvalidArgumentError, match="within the tf.function"):
            tape.gradient(loss, inputs)
    else:
        for got, wanted in zip(tape.gradient(loss, inputs), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_in_a_graph_of_unknown_sizes(backend, random):
    cache, inputs, weights, mask, key_mask = case(random, 5, 7)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = loss_of(inputs, cache, weights, mask, key_mask)
    expected = tape.gradient(loss, inputs)

    @tf.function(
        input_signature=[
            *(tf.TensorSpec([None, None, H, size], tf.float64) for size in (D, D, DV)),
            tf.TensorSpec([None, None, None, 5], tf.bool),
            tf.TensorSpec([None, None], tf.bool),
        ]
    )
    def gradients(query, key, value, mask, key_mask):
        inputs = query, key, value
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = loss_of(inputs, cache, weights, mask, key_mask)
        return tape.gradient(loss, inputs)

    for got, wanted in zip(gradients(*inputs, mask, key_mask), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_of_keys_kept_in_half_precision(backend, random):
    """Gradients are those of keys rounded on input. Their type is float32."""
    query, key, value = (tf.constant(x) for x in steps_of(2, 6, H, D, DV, "float32", random))
    rounded = [query, *(tf.cast(tf.cast(x, "bfloat16"), "float32") for x in (key, value))]
    gradients = []
    for dtype, inputs in (("bfloat16", [query, key, value]), ("float32", rounded)):
        cache = AttentionCache(2, H, 4, D, DV, dtype)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(single_output_attention(*inputs, cache) ** 2)
        gradients.append(tape.gradient(loss, inputs))
    for got, wanted in zip(*gradients, strict=True):
        assert got.dtype == tf.float32
        np.testing.assert_allclose(got, wanted, atol=0.01 * np.abs(wanted).max())


def test_a_step_asked_for_no_gradient_copies_no_window(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache, inputs, *_ = case(random, 5, 1)
    step = traced(lambda *inputs: single_output_attention(*inputs, cache))
    graph = step.get_concrete_function(*inputs).graph
    (op,) = [op for op in graph.get_operations() if op.type.endswith("SingleOutputAttention")]
    assert not op.get_attr("return_window")
    assert op.outputs[3].shape == (3, H, 0, D)
