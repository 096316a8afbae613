"""Continual single-output attention on projected steps, against the float64 reference."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.ops import AttentionCache, single_output_attention
from continual_transformers_tf.ops.library import SINGLE_OUTPUT, has_kernel
from single_output_cases import GOOD, cache_at, expected_of, steps_of
from traced import traced

pytestmark = pytest.mark.sampled(3)  # `make bazel-test` runs all fused cases.

WINDOWS = (1, 2, 3, 16, 17, 64, 120, 1000)


KEY_DIMS = (1, 12, 16, 24, 33, 64, 128)


@functools.cache
def grid_case(key_dim, value_dim, n, dtype, t):
    """Return positions, state, streams and two calls' (inputs, expected) of a test of the grid.

    Both backends share it, because the reference takes most of the time.
    """
    num_heads = 2
    random = np.random.default_rng([key_dim, n, t, dtype == "float64"])
    positions = random.permutation([0, 1, n - 1, n, n + 1, 2 * n + 3])
    cache, streams = cache_at(positions, num_heads, n, key_dim, value_dim, dtype, random)
    chosen = random.permutation(len(positions))[:4]
    calls = []
    for steps in (t, 1):
        inputs = steps_of(len(chosen), steps, num_heads, key_dim, value_dim, dtype, random)
        calls.append((inputs, expected_of([streams[s] for s in chosen], *inputs)))
    return positions, cache.get_state(), chosen, calls


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seq_len", WINDOWS)
@pytest.mark.parametrize("key_dim", KEY_DIMS)
def test_grid(backend, key_dim, seq_len, dtype):
    """Streams of all ages, in any order, take T steps and then one more."""
    n, num_heads = seq_len, 2
    value_dim = key_dim if key_dim in (1, 64) else key_dim // 2 + 3
    # A window of 1000 is compared at fewer lengths of calls, because the reference is slow.
    lengths = (1, 2, n, n + 5) if dtype == "float32" else (2, n + 5)
    for t in lengths if n < 1000 else (1, 2):
        positions, state, chosen, calls = grid_case(key_dim, value_dim, n, dtype, t)
        cache = AttentionCache(len(positions), num_heads, n, key_dim, value_dim, dtype)
        cache.set_state(state)
        for inputs, (expected, expected_scores) in calls:
            output, scores = single_output_attention(
                *inputs, cache, streams=chosen, return_attention_scores=True
            )
            assert output.dtype == dtype
            assert reference.relative_error(output, expected) < reference.BOUNDS[dtype]
            assert reference.relative_error(scores, expected_scores) < reference.BOUNDS[dtype]
        taken = np.array(positions)
        taken[chosen] += t + 1
        np.testing.assert_array_equal(cache.position, taken)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_in_one_call_equal_calls_of_one_step(backend, random, dtype):
    sizes = (3, 5, 8, 6)
    positions = [0, 4, 13]
    one, _ = cache_at(positions, *sizes[:1], *sizes[1:], dtype, np.random.default_rng(1))
    many, _ = cache_at(positions, *sizes[:1], *sizes[1:], dtype, np.random.default_rng(1))
    query, key, value = steps_of(3, 12, 3, 8, 6, dtype, random)
    together = single_output_attention(query, key, value, many)
    apart = [single_output_attention(query[:, t], key[:, t], value[:, t], one) for t in range(12)]
    assert reference.relative_error(together, np.stack(apart, 1)) < reference.BOUNDS[dtype]
    for name, array in one.get_state().items():
        np.testing.assert_array_equal(array, many.get_state()[name])


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("t", [1, 7])
def test_attention_mask(backend, random, rank, t):
    m, h, n, d, dv = 3, 2, 5, 8, 4
    cache, streams = cache_at([0, 3, 11], h, n, d, dv, "float32", random)
    shape = {1: (n,), 2: (m, n), 3: (m, h, n), 4: (m, h, t, n)}[rank]
    mask = random.random(shape) < 0.6
    axes = {
        1: (None, None, None),
        2: (slice(None), None, None),
        3: (slice(None), slice(None), None),
    }
    full = np.broadcast_to(mask[axes.get(rank, ())], (m, h, t, n))
    inputs = steps_of(m, t, h, d, dv, "float32", random)
    output, scores = single_output_attention(
        *inputs, cache, attention_mask=mask, return_attention_scores=True
    )
    expected, expected_scores = expected_of(streams, *inputs, mask=full)
    assert reference.relative_error(output, expected) < 5e-6
    assert reference.relative_error(scores, expected_scores) < 5e-6


def test_fully_masked_gives_zeros_and_masked_nan_does_no_harm(backend, random):
    h, n, d = 2, 4, 3
    cache, _ = cache_at([7], h, n, d, d, "float32", random)
    query, key, value = steps_of(1, 1, h, d, d, "float32", random)
    output, scores = single_output_attention(
        query, key, value, cache, attention_mask=np.zeros(n, bool), return_attention_scores=True
    )
    np.testing.assert_array_equal(output, np.zeros_like(value))
    np.testing.assert_array_equal(scores, np.zeros((1, h, 1, n)))

    key[:], value[:] = np.nan, np.nan
    newest_masked = np.arange(n) < n - 1
    output = single_output_attention(query, key, value, cache, attention_mask=newest_masked)
    assert np.isfinite(output).all()


@pytest.mark.parametrize("t", [1, 3, 9])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_step_without_a_key_is_never_attended_to(backend, random, t, rank):
    """No query attends to such a step, now or later; it may hold anything. Masks apply too."""
    m, h, n, d = 3, 2, 7, 4
    cache, streams = cache_at([0, 3, 11], h, n, d, d, "float32", random)
    for _ in range(27 // t):
        inputs = steps_of(m, t, h, d, d, "float32", random)
        key_mask = random.random((m, t)) < 0.6
        mask = None if rank is None else random.random((m, h, t, n)) < 0.7
        for x in inputs[1:]:
            x[~key_mask] = random.choice([np.nan, np.inf, 3.0])
        expected, expected_scores = expected_of(streams, *inputs, mask=mask, key_mask=key_mask)
        one = t == 1 and rank is None
        output, scores = single_output_attention(
            *((x[:, 0] for x in inputs) if one else inputs),
            cache,
            attention_mask=mask,
            key_mask=key_mask[:, 0] if one else key_mask,
            return_attention_scores=True,
        )
        if one:
            output, scores = output[:, None], scores[:, :, None]
        assert reference.relative_error(output, expected) < 5e-6
        assert reference.relative_error(scores, expected_scores) < 5e-6


@pytest.mark.parametrize("t", [1, 3])
def test_nan_stays_in_its_stream_and_leaves_with_its_window(backend, random, t):
    h, n, d = 2, 6, 4
    cache, streams = cache_at([9, 9], h, n, d, d, "float32", random)
    query, key, value = steps_of(2, 12, h, d, d, "float32", random)
    key[0, 0], value[0, 0] = np.nan, np.inf
    outputs = [
        single_output_attention(*(x[:, i : i + t] for x in (query, key, value)), cache)
        for i in range(0, 12, t)
    ]
    outputs = np.concatenate(outputs, 1)
    expected, _ = expected_of(streams, query, key, value)
    assert np.isnan(outputs[0, :n]).all()
    assert reference.relative_error(outputs[0, n:], expected[0, n:]) < 5e-6
    assert reference.relative_error(outputs[1], expected[1]) < 5e-6


@pytest.mark.parametrize("largest", [1e1, 1e2, 1e4])
def test_large_logits(backend, random, largest):
    """The bound for any logits is twice the error of a naive implementation in the type."""
    h, n, d = 2, 33, 16
    cache, streams = cache_at([40], h, n, d, d, "float32", random)
    query, key, value = steps_of(1, 5, h, d, d, "float32", random)
    query *= largest / np.abs(query).max()
    key *= 1 / np.abs(key).max()
    history_keys, history_values = list(streams[0].keys), list(streams[0].values)
    output = single_output_attention(query, key, value, cache, scale=1.0)
    expected, _ = expected_of(streams, query, key, value, scale=1.0)
    naive = []
    for t in range(5):
        history_keys.append(key[0, t])
        history_values.append(value[0, t])
        keys = np.stack(history_keys[-n:]).astype("float32")
        logits = np.einsum("hd,nhd->hn", query[0, t], keys)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        values = np.stack(history_values[-n:]).astype("float32")
        naive.append(np.einsum("hn,nhd->hd", weights, values))
    assert np.isfinite(output).all()
    naive_error = reference.relative_error(np.stack(naive)[None], expected)
    assert reference.relative_error(output, expected) <= max(2 * naive_error, 5e-6)


def test_infinite_logits_that_pass_do_not_spoil_finite_ones(backend):
    """A key of -infinity has weight zero at any place in the window."""
    cache = AttentionCache(1, 1, 100, 1)
    ones = np.ones((1, 1, 1, 1), np.float32)
    for _ in range(70):  # This is more than a block of rows.
        output = single_output_attention(ones, ones * -np.inf, ones, cache)
        np.testing.assert_array_equal(output, ones * 0)
    output = single_output_attention(ones, ones, 5 * ones, cache)
    np.testing.assert_array_equal(output, 5 * ones)


def test_no_drift_after_100_000_steps(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    h, n, d = 2, 64, 16
    cache = AttentionCache(1, h, n, d)
    steps = 1000
    for _ in range(100):
        inputs = steps_of(1, steps, h, d, d, "float32", random)
        output = single_output_attention(*inputs, cache)
    stream = reference.Stream(n, *(x[0, -n - 50 : -50] for x in inputs[1:]))
    newest = [x[:, -50:] for x in inputs]
    expected, _ = expected_of([stream], *newest)
    assert reference.relative_error(output[:, -50:], expected) < 5e-6
    assert int(cache.position[0]) == 100_000


def test_graph_with_unknown_sizes(backend, random):
    h, n, d, dv = 2, 5, 8, 6
    cache, streams = cache_at([0, 3, 12], h, n, d, dv, "float32", random)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, h, d]),
            tf.TensorSpec([None, None, h, d]),
            tf.TensorSpec([None, None, h, dv]),
            tf.TensorSpec([None], tf.int32),
        ]
    )
    def step(query, key, value, chosen):
        output = single_output_attention(query, key, value, cache, streams=chosen)
        assert output.shape.as_list() == [None, None, h, dv]
        return output

    for chosen, t in (([0, 1, 2], 1), ([2, 0], 4), ([1], 9)):
        inputs = steps_of(len(chosen), t, h, d, dv, "float32", random)
        expected, _ = expected_of([streams[s] for s in chosen], *inputs)
        output = step(*inputs, tf.constant(chosen))
        assert reference.relative_error(output, expected) < 5e-6
    before = cache.get_state()
    inputs = steps_of(2, 1, h, d, dv, "float32", random)
    for bad in ([0, 3], [1, 1], [-1, 0]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
            step(*inputs, tf.constant(bad))
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])


def test_inside_xla_the_twin_is_traced(random):
    cache, streams = cache_at([0, 3], 2, 5, 8, 6, "float32", random)
    chosen = tf.constant([0, 1])
    step = traced(
        lambda *inputs: single_output_attention(*inputs, cache, streams=chosen), jit_compile=True
    )
    inputs = steps_of(2, 3, 2, 8, 6, "float32", random)
    expected, _ = expected_of(streams, *inputs)
    assert reference.relative_error(step(*map(tf.constant, inputs)), expected) < 5e-6


def test_eagerly_one_op(monkeypatch, executed_ops):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache = AttentionCache(2, 3, 5, 8, 6)
    tensors = [tf.constant(GOOD[name]) for name in ("query", "key", "value")]
    streams = tf.constant([0, 1])
    executed_ops.clear()
    single_output_attention(*tensors, cache, streams=streams)
    assert executed_ops == ["ContinualTransformers>SingleOutputAttention"]


@pytest.mark.parametrize("query_dtype", ["as the cache", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(backend, random, dtype, query_dtype):
    """Only stored keys and values, and an output in that type, are rounded."""
    dtype = tf.as_dtype(dtype)
    query_dtype = dtype if query_dtype == "as the cache" else tf.float32
    for n, d, dv, t in (
        (1, 1, 1, 2),
        (5, 8, 6, 3),
        (17, 12, 12, 20),
        (64, 33, 16, 1),
        (120, 64, 64, 7),
    ):
        cache = AttentionCache(3, 2, n, d, dv, dtype)
        streams = [reference.Stream(n) for _ in range(3)]
        for steps in (t, 1, n + 2):
            inputs = steps_of(3, steps, 2, d, dv, "float32", random)
            kept = [tf.cast(tf.cast(x, dtype), query_dtype) for x in inputs]
            expected, expected_scores = expected_of(
                streams, *(x.numpy().astype("float64") for x in kept)
            )
            output, scores = single_output_attention(*kept, cache, return_attention_scores=True)
            assert output.dtype == scores.dtype == query_dtype
            bound = 5e-6 if query_dtype == tf.float32 else reference.ROUNDING[dtype.name]
            assert reference.relative_error(tf.cast(output, "float32"), expected) < bound
            assert reference.relative_error(tf.cast(scores, "float32"), expected_scores) < bound


@pytest.mark.cpu_only("no kernel takes values of 4,096 features")
def test_every_value_of_float16_is_read_right(backend):
    """Each value is the only one attended to, also subnormals, infinities and NaN."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(16, 1, 1, -1)
    cache = AttentionCache(16, 1, 3, 1, every.shape[-1], "float16")
    zeros = tf.zeros((16, 1, 1, 1), "float16")
    newest = np.array([False, False, True])
    output = single_output_attention(zeros, zeros, every, cache, attention_mask=newest)
    np.testing.assert_array_equal(output, every)
    before = np.array([False, True, False])  # Now the value comes from the ring.
    output = single_output_attention(
        zeros, zeros, np.zeros_like(every), cache, attention_mask=before
    )
    np.testing.assert_array_equal(output, every)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_with_large_logits(random, dtype):
    cache = AttentionCache(1, 2, 5, 16, dtype=dtype)
    query, key, value = (tf.cast(x, dtype) for x in steps_of(1, 9, 2, 16, 16, "float32", random))
    output = single_output_attention(query * 30, key * 30, value, cache)
    assert np.isfinite(tf.cast(output, "float32")).all()


@pytest.mark.parametrize("scale", [0.5, np.float32(0.5), tf.constant(0.5)])
def test_scale(backend, random, scale):
    cache, streams = cache_at([4], 2, 5, 8, 6, "float32", random)
    inputs = steps_of(1, 2, 2, 8, 6, "float32", random)
    expected, _ = expected_of(streams, *inputs, scale=0.5)
    output = single_output_attention(*inputs, cache, scale=scale)
    assert reference.relative_error(output, expected) < 5e-6


def test_kernels():
    with_cuda = has_kernel(SINGLE_OUTPUT, "GPU")
    assert ct.ops.kernels() == ({"CPU", "GPU"} if with_cuda else {"CPU"})
    assert ct.ops.load_error() is None
