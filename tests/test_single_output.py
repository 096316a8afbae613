"""Continual single-output attention on projected steps, against the float64 reference."""

import threading

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from conftest import BAD_INPUT
from continual_transformers_tf.ops import AttentionCache, single_output_attention

WINDOWS = (1, 2, 3, 16, 17, 64, 120, 1000)
KEY_DIMS = (1, 12, 16, 24, 33, 64, 128)


def cache_at(positions, num_heads, seq_len, key_dim, value_dim, dtype, random):
    """A cache whose streams have taken so many steps, and their references.

    Ring rows that no step has written hold NaN.
    """
    cache = AttentionCache(len(positions), num_heads, seq_len, key_dim, value_dim, dtype)
    state = cache.get_state()
    state["position"][:] = positions
    for name in ("key", "value"):
        state[name][:] = np.nan
    streams = []
    for s, position in enumerate(positions):
        taken = min(position, seq_len)
        keys = random.normal(size=(taken, num_heads, key_dim)).astype(dtype)
        values = random.normal(size=(taken, num_heads, value_dim)).astype(dtype)
        for i in range(taken):
            row = (position - taken + i) % seq_len
            state["key"][s, :, row] = keys[i]
            state["value"][s, :, row] = values[i]
        streams.append(reference.Stream(seq_len, keys, values))
    cache.set_state(state)
    return cache, streams


def steps_of(m, t, num_heads, key_dim, value_dim, dtype, random):
    query, key = random.normal(size=(2, m, t, num_heads, key_dim)).astype(dtype)
    return query, key, random.normal(size=(m, t, num_heads, value_dim)).astype(dtype)


def expected_of(streams, query, key, value, scale=None, mask=None):
    """Steps the references: output [M, T, H, Dv], scores [M, H, T, N]; mask [M, H, T, N]."""
    pairs = [
        [
            stream.step(*(x[m, t] for x in (query, key, value)), scale, mask=mask_of(mask, m, t))
            for t in range(query.shape[1])
        ]
        for m, stream in enumerate(streams)
    ]
    output = np.array([[output for output, _ in steps] for steps in pairs])
    scores = np.array([[scores for _, scores in steps] for steps in pairs])
    return output, scores.transpose(0, 2, 1, 3)


def mask_of(mask, m, t):
    return None if mask is None else mask[m, :, t]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seq_len", WINDOWS)
@pytest.mark.parametrize("key_dim", KEY_DIMS)
def test_grid(backend, random, key_dim, seq_len, dtype):
    """Streams of all ages in one call, in some order, T steps, then one more; every position."""
    n, num_heads = seq_len, 2
    value_dim = key_dim if key_dim in (1, 64) else key_dim // 2 + 3
    # A window of 1000 is compared at fewer lengths of call: the reference is what takes the time.
    for t in (1, 2, n, n + 5) if n < 1000 else (1, 2):
        positions = random.permutation([0, 1, n - 1, n, n + 1, 2 * n + 3])
        cache, streams = cache_at(positions, num_heads, n, key_dim, value_dim, dtype, random)
        chosen = random.permutation(len(positions))[:4]
        for steps in (t, 1):
            inputs = steps_of(len(chosen), steps, num_heads, key_dim, value_dim, dtype, random)
            output, scores = single_output_attention(
                *inputs, cache, streams=chosen, return_attention_scores=True
            )
            expected, expected_scores = expected_of([streams[s] for s in chosen], *inputs)
            assert output.dtype == dtype
            assert reference.relative_error(output, expected) < reference.BOUNDS[dtype]
            assert reference.relative_error(scores, expected_scores) < reference.BOUNDS[dtype]
        positions[chosen] += t + 1
        np.testing.assert_array_equal(cache.position, positions)


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
    """The bound for any logits: twice the error of a naive implementation in the type."""
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
    """A key of -infinity has weight zero, wherever in the window it lies."""
    cache = AttentionCache(1, 1, 100, 1)
    ones = np.ones((1, 1, 1, 1), np.float32)
    for _ in range(70):  # More than a block of rows.
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


@pytest.mark.parametrize("t", [1, 3, 9])
def test_peeking_gives_the_next_output_and_changes_nothing(backend, random, t):
    cache, _ = cache_at([0, 5, 12], 2, 4, 8, 6, "float32", random)
    inputs = steps_of(3, t, 2, 8, 6, "float32", random)
    before = cache.get_state()
    peek = single_output_attention(*inputs, cache, update_state=False)
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(single_output_attention(*inputs, cache), peek)


def test_state_moves_to_another_cache_bit_for_bit(backend, random):
    here, _ = cache_at([3, 9, 2], 2, 5, 8, 6, "float32", random)
    there = AttentionCache(4, 2, 5, 8, 6)
    there.set_state(here.get_state(streams=[2, 1]), streams=[0, 3])
    inputs = steps_of(2, 6, 2, 8, 6, "float32", random)
    expected = single_output_attention(*inputs, here, streams=[2, 1])
    np.testing.assert_array_equal(single_output_attention(*inputs, there, streams=[0, 3]), expected)
    whole = AttentionCache(0, 2, 5, 8, 6)
    whole.set_state(here.get_state())
    np.testing.assert_array_equal(whole.position, here.position)


def test_clean_streams_begin_again_and_others_go_on(backend, random):
    cache, streams = cache_at([7, 9], 2, 5, 8, 8, "float32", random)
    cache.clean_state(streams=[0])
    streams[0] = reference.Stream(5)
    inputs = steps_of(2, 3, 2, 8, 8, "float32", random)
    expected, _ = expected_of(streams, *inputs)
    assert reference.relative_error(single_output_attention(*inputs, cache), expected) < 5e-6
    np.testing.assert_array_equal(cache.ready, [False, True])
    cache.clean_state()
    np.testing.assert_array_equal(cache.position, [0, 0])


def test_room_for_more_streams_leaves_those_held(backend, random):
    cache, streams = cache_at([7, 9], 2, 5, 8, 8, "float32", random)
    cache.ensure_streams(4)
    streams += [reference.Stream(5), reference.Stream(5)]
    inputs = steps_of(4, 2, 2, 8, 8, "float32", random)
    expected, _ = expected_of(streams, *inputs)
    assert reference.relative_error(single_output_attention(*inputs, cache), expected) < 5e-6
    cache.ensure_streams(1)
    assert cache.get_state()["position"].shape == (4,)


def test_what_was_read_before_a_step_stays_as_it_was(backend, random):
    """The step changes the variables in place, but never a tensor that someone holds."""
    cache, _ = cache_at([7], 2, 5, 8, 8, "float32", random)
    tensor = cache.key.read_value()
    before = tensor.numpy().copy()
    for _ in range(3):
        single_output_attention(*steps_of(1, 2, 2, 8, 8, "float32", random), cache)
    np.testing.assert_array_equal(tensor, before)
    assert (cache.key.numpy() != before).any()


def test_no_streams_at_all(backend):
    cache = AttentionCache(2, 3, 4, 5, 6)
    empty = np.zeros((0, 3, 5), np.float32)
    output = single_output_attention(
        empty, empty, np.zeros((0, 3, 6), np.float32), cache, streams=[]
    )
    assert output.shape == (0, 3, 6)


GOOD = dict(
    query=np.zeros((2, 1, 3, 8), np.float32),
    key=np.zeros((2, 1, 3, 8), np.float32),
    value=np.zeros((2, 1, 3, 6), np.float32),
    streams=[0, 1],
)
BAD = {
    "rank of query": dict(query=np.zeros((2, 8), np.float32)),
    "heads of query": dict(query=np.zeros((2, 1, 4, 8), np.float32)),
    "size of query and key": {
        name: np.zeros((2, 1, 3, 9), np.float32) for name in ("query", "key")
    },
    "size of key": dict(key=np.zeros((2, 1, 3, 9), np.float32)),
    "steps of key": dict(key=np.zeros((2, 2, 3, 8), np.float32)),
    "rows of value": dict(value=np.zeros((1, 1, 3, 6), np.float32)),
    "size of value": dict(value=np.zeros((2, 1, 3, 8), np.float32)),
    "dtype of query": dict(query=tf.zeros((2, 1, 3, 8), tf.float64)),
    "dtype of value": dict(value=tf.zeros((2, 1, 3, 6), tf.int32)),
    "no steps": {
        name: np.zeros((2, 0, 3, 8 if name != "value" else 6), np.float32)
        for name in ("query", "key", "value")
    },
    "stream beyond": dict(streams=[0, 5]),
    "stream negative": dict(streams=[-1, 1]),
    "stream twice": dict(streams=[1, 1]),
    "stream beyond int32": dict(streams=np.array([0, 2**32])),
    "stream tensor beyond int32": dict(streams=tf.constant([0, 2**32], tf.int64)),
    "streams too few": dict(streams=[1]),
    "streams not a vector": dict(streams=[[0, 1]]),
    "streams not integers": dict(streams=[0.0, 1.0]),
    "mask of another window": dict(attention_mask=np.ones(6, bool)),
    "mask of other rows": dict(attention_mask=np.ones((3, 5), bool)),
    "mask of too many axes": dict(attention_mask=np.ones((1, 2, 3, 1, 5), bool)),
    "mask not bool": dict(attention_mask=np.ones(5, np.float32)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_changes_nothing(backend, random, what):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    before = cache.get_state()
    with pytest.raises(BAD_INPUT) as error:
        single_output_attention(**{**GOOD, **BAD[what]}, cache=cache)
    message = str(error.value).lower()
    assert any(word in message for word in ("expected", "requested", "must be"))
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    single_output_attention(**GOOD, cache=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", tf.Variable(tf.zeros([3, 3, 5, 9]))),
        ("value", tf.Variable(tf.zeros([3, 3, 6, 6]))),
        ("value", tf.Variable(tf.zeros([3, 3, 5, 6], tf.float64))),
        ("key", tf.Variable(tf.zeros([3, 5, 8]))),
        ("position", tf.Variable(tf.zeros([2], tf.int64))),
    ],
)
def test_a_cache_of_another_shape_is_refused(monkeypatch, name, value):
    """By the kernel itself: `AttentionCache` would not let it happen."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache = AttentionCache(3, 3, 5, 8, 6)
    setattr(cache, name, value)
    with pytest.raises(BAD_INPUT, match="(?i)expected|shape"):
        single_output_attention(**GOOD, cache=cache)


def test_a_position_near_the_end_of_63_bits_is_refused(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    state = cache.get_state()
    state["position"][1] = 2**63 - 1
    cache.set_state(state)
    with pytest.raises(tf.errors.InvalidArgumentError, match="63 bits"):
        single_output_attention(**GOOD, cache=cache)
    np.testing.assert_array_equal(cache.position, [3, 2**63 - 1, 2])


def test_a_smaller_state_leaves_the_others_clean(backend, random):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    cache.set_state(cache.get_state(streams=[1]))
    np.testing.assert_array_equal(cache.position, [9, 0, 0])


def test_state_that_does_not_fit_is_refused(random):
    cache, _ = cache_at([3, 9], 2, 5, 8, 8, "float32", random)
    state = cache.get_state()
    other = AttentionCache(2, 2, 5, 4, 8)
    for wrong in (
        {**state, "key": state["key"][:1]},
        {**state, "key": state["key"].astype("float64")},
        {**state, "position": np.array([-1, 2])},
        {name: state[name] for name in ("key", "value")},
        other.get_state(),
        7,
    ):
        with pytest.raises(ValueError, match="Expected"):
            cache.set_state(wrong)
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize("sizes", [(1, 0, 4, 4), (1, 2, 0, 4), (1, 2, 4, -1), (-1, 2, 4, 4)])
def test_sizes_of_a_cache(sizes):
    with pytest.raises(ValueError, match="Expected .* to be an integer"):
        AttentionCache(*sizes)


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


@pytest.mark.parametrize(
    "what", ["mask of other rows", "steps of key", "rows of value", "no steps", "streams too few"]
)
def test_a_graph_with_unknown_sizes_checks_them_when_it_runs(backend, random, what):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    before = cache.get_state()

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, 3, 8]),
            tf.TensorSpec([None, None, 3, 8]),
            tf.TensorSpec([None, None, 3, 6]),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, 5], tf.bool),
        ]
    )
    def step(query, key, value, streams, mask):
        return single_output_attention(
            query, key, value, cache, streams=streams, attention_mask=mask
        )

    good = {**GOOD, "attention_mask": np.ones((2, 5), bool)}
    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
        step(*{**good, **BAD[what]}.values())
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert step(*good.values()).shape == (2, 1, 3, 6)


def test_shapes_are_checked_while_tracing(backend):
    cache = AttentionCache(2, 3, 5, 8, 6)

    @tf.function
    def step(query, key, value):
        return single_output_attention(query, key, value, cache, streams=[0, 1])

    good = [GOOD[name] for name in ("query", "key", "value")]
    assert step.get_concrete_function(*good).output_shapes == (2, 1, 3, 6)
    for i, shape in ((0, (2, 1, 4, 8)), (1, (2, 1, 3, 9)), (2, (2, 2, 3, 6)), (0, (2, 0, 3, 8))):
        bad = list(good)
        bad[i] = np.zeros(shape, np.float32)
        with pytest.raises(ValueError, match="(?i)expected|must be equal|compatible"):
            step.get_concrete_function(*bad)


def test_inside_xla_the_twin_is_traced(random):
    cache, streams = cache_at([0, 3], 2, 5, 8, 6, "float32", random)
    chosen = tf.constant([0, 1])
    step = tf.function(
        lambda *inputs: single_output_attention(*inputs, cache, streams=chosen), jit_compile=True
    )
    inputs = steps_of(2, 3, 2, 8, 6, "float32", random)
    expected, _ = expected_of(streams, *inputs)
    assert reference.relative_error(step(*map(tf.constant, inputs)), expected) < 5e-6


def run_in_threads(run, threads):
    begin = threading.Barrier(threads)

    def start(i):
        begin.wait()
        run(i)

    workers = [threading.Thread(target=start, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def test_threads_with_streams_of_their_own_disturb_no_one(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    h, n, d, threads, calls = 4, 32, 16, 4, 200
    cache = AttentionCache(threads, h, n, d)
    query, key, value = steps_of(threads, calls, h, d, d, "float32", random)
    outputs = np.empty_like(value)

    def run(i):
        for t in range(calls):
            step = (x[i : i + 1, t] for x in (query, key, value))
            outputs[i, t] = single_output_attention(*step, cache, streams=[i])[0]

    run_in_threads(run, threads)
    expected, _ = expected_of([reference.Stream(n) for _ in range(threads)], query, key, value)
    assert reference.relative_error(outputs, expected) < 5e-6


def test_streams_come_while_others_step(monkeypatch, random):
    """Making room copies the rings: no step may fall between the copy and its return."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    h, n, d, calls, rooms = 4, 64, 16, 1500, 60
    cache = AttentionCache(1, h, n, d)
    numbers = tf.range(1.0, calls + 1)[:, None, None] + tf.zeros((1, h, d))

    def run(i):
        if i == 1:
            for streams in range(2, rooms):
                cache.ensure_streams(streams)
                cache.get_state()
            return
        for t in range(calls):
            x = numbers[t : t + 1]
            single_output_attention(x, x, x, cache, streams=[0])

    run_in_threads(run, 2)
    state = cache.get_state(streams=[0])
    assert state["position"][0] == calls
    steps = np.roll(state["key"][0], -(calls % n), axis=1)  # Oldest first.
    newest = np.arange(calls - n + 1, calls + 1)
    assert (steps == newest[None, :, None]).all()


def test_threads_on_one_stream_take_turns(monkeypatch, random):
    """Each call is whole: the ring is the steps of the last calls, one call after the other."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    h, steps, d, threads, calls = 16, 16, 64, 4, 60
    n = 4 * steps
    cache = AttentionCache(1, h, n, d)
    # Every element of a call's keys and values is the call's own number.
    numbers = np.arange(threads * calls, dtype=np.float32).reshape(threads, calls)
    shape = (1, steps, h, d)

    def run(i):
        for number in numbers[i]:
            x = tf.fill(shape, number)
            single_output_attention(x, x, x, cache)

    run_in_threads(run, threads)
    assert int(cache.position[0]) == threads * calls * steps
    state = cache.get_state()
    for rings in (state["key"], state["value"]):
        last_calls = rings[0].transpose(1, 0, 2).reshape(4, -1)  # A row a call.
        assert (last_calls == last_calls[:, :1]).all()
    np.testing.assert_array_equal(state["key"], state["value"])
    assert len(set(state["key"][0, 0, ::steps, 0])) == 4


def test_eagerly_one_op(monkeypatch, executed_ops):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache = AttentionCache(2, 3, 5, 8, 6)
    tensors = [tf.constant(GOOD[name]) for name in ("query", "key", "value")]
    streams = tf.constant([0, 1])
    executed_ops.clear()
    single_output_attention(*tensors, cache, streams=streams)
    assert executed_ops == ["ContinualTransformers>SingleOutputAttention"]


def test_a_dtype_without_a_fused_kernel_is_plain_tensorflow(monkeypatch, random):
    inputs = steps_of(2, 3, 2, 8, 6, "float32", random)
    expected, _ = expected_of([reference.Stream(5), reference.Stream(5)], *inputs)
    half = AttentionCache(2, 2, 5, 8, 6, "bfloat16")
    output = single_output_attention(*(tf.cast(x, "bfloat16") for x in inputs), half)
    assert reference.relative_error(tf.cast(output, "float32"), expected) < 0.03
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    with pytest.raises(ValueError, match="but got bfloat16 on CPU"):
        single_output_attention(*(tf.cast(x, "bfloat16") for x in inputs), half)


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


def test_the_fused_op_says_that_it_has_no_gradient_and_the_twin_has_one(monkeypatch, random):
    inputs = [tf.constant(x) for x in steps_of(1, 4, 2, 8, 6, "float32", random)]
    for backend in ("fused", "tensorflow"):
        monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
        cache = AttentionCache(1, 2, 3, 8, 6)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(single_output_attention(*inputs, cache) ** 2)
        if backend == "fused":
            with pytest.raises(LookupError, match="no gradient: train on windows"):
                tape.gradient(loss, inputs)
        else:
            assert all(np.abs(g).sum() > 0 for g in tape.gradient(loss, inputs))


def test_kernels():
    assert ct.ops.kernels() == {"CPU"}
    assert ct.ops.load_error() is None
