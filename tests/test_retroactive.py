"""Continual retroactive attention on projected steps, against the float64 reference."""

import copy
import functools

import numpy as np
import pytest
import tensorflow as tf

import reference
from continual_transformers_tf.ops import RetroactiveCache, library, retroactive_attention
from continual_transformers_tf.ops.retroactive import attend_all_steps
from old_states import NEW_NAMES, old_state
from retroactive_cases import GOOD, cache_at, expected_of, steps_of
from traced import traced

pytestmark = pytest.mark.sampled(3)  # `make bazel-test` runs all fused cases.

WINDOWS = (1, 2, 3, 16, 17, 64, 120)
KEY_DIMS = (1, 12, 16, 24, 33, 64, 128)
WAYS = ["update", "recompute", "tensorflow"]


@pytest.fixture(params=WAYS)
def algorithm(request, monkeypatch):
    """Run a test with each of the fused op's algorithms, and in plain TensorFlow."""
    plain = request.param == "tensorflow"
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow" if plain else "fused")
    return "auto" if plain else request.param


@functools.cache
def grid_case(key_dim, value_dim, n, dtype, t):
    """Return positions, state, streams and two calls' (inputs, expected rows) of the grid.

    All algorithms share it, because the reference takes most of the time.
    """
    num_heads = 2
    random = np.random.default_rng([key_dim, n, t, dtype == "float64"])
    positions = random.permutation([0, 1, n - 1, n, n + 1, 2 * n + 3])
    cache, streams = cache_at(positions, num_heads, n, key_dim, value_dim, dtype, random)
    chosen = random.permutation(len(positions))[:4]
    calls = []
    for steps in (t, 2):
        sizes = (len(chosen), steps, num_heads, key_dim, value_dim)
        inputs = steps_of(*sizes, dtype=dtype, random=random)
        newest = steps if n < 64 else min(steps, 3)
        calls.append((inputs, expected_of([streams[s] for s in chosen], *inputs, newest=newest)))
    return positions, cache.get_state(), chosen, calls


@pytest.mark.sampled(8)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seq_len", WINDOWS)
@pytest.mark.parametrize("key_dim", KEY_DIMS)
def test_grid(algorithm, key_dim, seq_len, dtype):
    """Streams of all ages, in any order, take T steps and then two more."""
    n, num_heads = seq_len, 2
    value_dim = key_dim if key_dim in (1, 64) else key_dim // 2 + 3
    # Long calls of wide windows are compared at only one size, because the reference is slow.
    lengths = (1, 2, n, n + 5) if dtype == "float32" else (2, n + 5)
    for t in lengths if n < 64 or key_dim == 12 else (1, 2):
        positions, state, chosen, calls = grid_case(key_dim, value_dim, n, dtype, t)
        cache = RetroactiveCache(len(positions), num_heads, n, key_dim, value_dim, dtype)
        cache.set_state(state)
        for inputs, expected in calls:
            output = retroactive_attention(*inputs, cache, streams=chosen, algorithm=algorithm)
            steps, newest = inputs[0].shape[1], expected.shape[1]
            assert output.dtype == dtype
            assert output.shape == (4, steps, num_heads, n, value_dim)
            error = reference.relative_error(output[:, steps - newest :], expected)
            assert error < reference.BOUNDS[dtype]
        taken = np.array(positions)
        taken[chosen] += t + 2
        np.testing.assert_array_equal(cache.position, taken)


# The reference takes seconds.
@pytest.mark.parametrize(("key_dim", "dtype"), [
    (12, "float32"),
    pytest.param(64, "float32", marks=pytest.mark.slow),
    pytest.param(12, "float64", marks=pytest.mark.slow),
    pytest.param(64, "float64", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_window_of_1000(monkeypatch, random, key_dim, dtype):
    """The test runs for three windows: a row gets as many updates as any row ever gets."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    n, h = 1000, 1
    cache = RetroactiveCache(1, h, n, key_dim, dtype=dtype)
    stream = reference.RetroactiveStream(n)
    for steps in [100] * 30:
        inputs = steps_of(1, steps, h, key_dim, key_dim, dtype=dtype, random=random)
        output = retroactive_attention(*inputs, cache, algorithm="update")
        expected = expected_of([stream], *inputs, newest=1)
        assert reference.relative_error(output[:, -1:], expected) < reference.BOUNDS[dtype]


@pytest.mark.parametrize("t", [1, 7])
def test_a_step_that_leaves_the_position(algorithm, random, t):
    """The step writes the rings as usual. The caller only has to advance the position.

    A caller may also repeat a call of one step: the repeat ignores the sums kept by the first.
    """
    cache, _ = cache_at([0, 3, 13], 2, 5, 8, 6, "float32", random)
    other = RetroactiveCache(3, 2, 5, 8, 6)
    options = dict(streams=tf.constant([2, 0, 1]), algorithm=algorithm)
    for _ in range(3):  # The second and third calls update the sums of the call before.
        other.set_state(cache.get_state())
        position = cache.position.numpy()
        inputs = steps_of(3, t, 2, 8, 6, dtype="float32", random=random)
        inputs = [tf.constant(x) for x in inputs]
        expected, _, taken = attend_all_steps(*inputs, other, **options)
        for _ in range(2 if t == 1 else 1):
            output, _, steps_taken = attend_all_steps(
                *inputs, cache, advance_position=False, **options
            )
            assert reference.relative_error(output, expected.numpy()) < 5e-6
            np.testing.assert_array_equal(steps_taken, taken)
            np.testing.assert_array_equal(cache.position, position)
        cache.position.assign_add([t] * 3)
        for name, array in other.get_state().items():
            if name not in ("softmax", "weighted_sum"):  # These are equal except for rounding.
                np.testing.assert_array_equal(cache.get_state()[name], array, name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_in_one_call_equal_calls_of_one_step(algorithm, random, dtype):
    positions = [0, 4, 13]
    one, _ = cache_at(positions, 3, 5, 8, 6, dtype, np.random.default_rng(1))
    many, _ = cache_at(positions, 3, 5, 8, 6, dtype, np.random.default_rng(1))
    inputs = steps_of(3, 12, 3, 8, 6, dtype=dtype, random=random)
    together = retroactive_attention(*inputs, many, algorithm=algorithm)
    apart = [
        retroactive_attention(*(x[:, t] for x in inputs), one, algorithm=algorithm)
        for t in range(12)
    ]
    np.testing.assert_allclose(np.stack(apart, 1), together, rtol=1e-5, atol=1e-6)
    for name, array in one.get_state().items():
        np.testing.assert_allclose(many.get_state()[name], array, rtol=1e-5, atol=1e-6)


def test_peeking_is_the_next_step_and_changes_nothing(algorithm, random):
    for n, t in ((1, 1), (5, 1), (5, 3), (5, 9)):
        cache, streams = cache_at([0, 3, 12], 2, n, 8, 6, "float32", random)
        for _ in range(2):
            before = cache.get_state()
            inputs = steps_of(3, t, 2, 8, 6, dtype="float32", random=random)
            peeked = retroactive_attention(*inputs, cache, algorithm=algorithm, update_state=False)
            for name, array in cache.get_state().items():
                np.testing.assert_array_equal(array, before[name])
            output = retroactive_attention(*inputs, cache, algorithm=algorithm)
            expected = expected_of(streams, *inputs)
            assert reference.relative_error(output, expected) < 5e-6
            # On a GPU several steps that are not kept are computed anew.
            if t == 1 or algorithm != "update" or library.cuda_build() is None:
                np.testing.assert_array_equal(output, peeked)
            else:
                assert reference.relative_error(peeked, expected) < 5e-6


@pytest.mark.parametrize("t", [1, 3, 9])
def test_a_step_without_a_key_is_never_attended_to(algorithm, random, t):
    """No query attends to such a step, now or later; it may hold anything. Its query attends."""
    m, h, n, d = 3, 2, 7, 4
    cache, streams = cache_at([0, 3, 11], h, n, d, d, "float32", random)
    for round_ in range(36 // t):
        inputs = steps_of(m, t, h, d, d, dtype="float32", random=random)
        key_mask = random.random((m, t)) < (0.6 if round_ % 4 else 0.1)
        for x in inputs[1:]:
            x[~key_mask] = random.choice([np.nan, np.inf, 3.0])
        expected = expected_of(streams, *inputs, key_mask=key_mask)
        one = t == 1
        output = retroactive_attention(
            *((x[:, 0] for x in inputs) if one else inputs),
            cache,
            key_mask=key_mask[:, 0] if one else key_mask,
            algorithm=algorithm,
        )
        assert reference.relative_error(output[:, None] if one else output, expected) < 5e-6


def test_where_no_step_has_a_key_there_are_zeros(algorithm, random):
    n = 4
    cache = RetroactiveCache(1, 1, n, 3)
    for t in range(3 * n):
        inputs = steps_of(1, 1, 3, 3, dtype="float32", random=random)
        has_key = np.array([t in (1, n + 3)])
        # A single logit gets all the weight, even if it is far below 0.
        output = retroactive_attention(
            100 * inputs[0], -100 * np.abs(inputs[1]), inputs[2], cache, key_mask=has_key,
            algorithm=algorithm,
        )  # fmt: skip
        taken = min(t + 1, n)
        alone = [i for i in (1, n + 3) if t - n < i <= t]
        assert (output.numpy()[0, 0, : n - taken] == 0).all()
        assert (np.abs(output.numpy()[0, 0, n - taken :]).max(-1) > 0).all() == bool(alone)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_stream_and_leaves_with_its_window(
    algorithm, random, where, bad
):
    h, n, d = 2, 6, 4
    cache, streams = cache_at([9, 9], h, n, d, d, "float32", random)
    inputs = steps_of(2, 20, h, d, d, dtype="float32", random=random)
    inputs[where][0, 2] = bad
    outputs = np.concatenate(
        [
            retroactive_attention(*(x[:, t : t + 2] for x in inputs), cache, algorithm=algorithm)
            for t in range(0, 20, 2)
        ],
        1,
    )
    with np.errstate(all="ignore"):
        expected = expected_of(streams, *inputs)
    assert reference.relative_error(outputs[1], expected[1]) < 5e-6
    assert reference.relative_error(outputs[0, 2 + n :], expected[0, 2 + n :]) < 5e-6
    assert reference.relative_error(outputs[0, :2], expected[0, :2]) < 5e-6
    if where == 0:  # Only the query's own row is affected.
        for t in range(2, 2 + n):
            others = np.arange(n) != n - 1 - (t - 2)
            error = reference.relative_error(outputs[0, t][:, others], expected[0, t][:, others])
            assert error < 5e-6


def test_infinite_logits_that_pass_do_not_spoil_finite_ones(algorithm):
    """A key of -infinity has weight zero at any place in the window."""
    cache = RetroactiveCache(1, 1, 5, 1)
    ones = np.ones((1, 1, 1, 1), np.float32)
    for _ in range(7):
        output = retroactive_attention(ones, ones * -np.inf, ones, cache, algorithm=algorithm)
        np.testing.assert_array_equal(output, np.zeros((1, 1, 1, 5, 1)))
    for _ in range(7):
        output = retroactive_attention(ones, ones, 5 * ones, cache, algorithm=algorithm)
    np.testing.assert_array_equal(output, np.full((1, 1, 1, 5, 1), 5.0))


def test_another_way_can_go_on_at_any_step(monkeypatch, random):
    """Update, recompute and plain TensorFlow alternate in any order, also with other scales."""
    h, n, d, dv = 2, 7, 8, 6
    cache, streams = cache_at([0, 3, 12], h, n, d, dv, "float32", random)
    for _ in range(60):
        way = random.choice(WAYS)
        plain = way == "tensorflow"
        monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow" if plain else "fused")
        chosen = random.permutation(3)[: random.integers(1, 4)]
        scale = random.choice([0.1, 0.5])
        sizes = (len(chosen), random.integers(1, 4), h, d, dv)
        inputs = steps_of(*sizes, dtype="float32", random=random)
        update_state = random.random() < 0.7
        output = retroactive_attention(
            *inputs,
            cache,
            streams=chosen,
            scale=scale,
            algorithm="auto" if plain else way,
            update_state=update_state,
        )
        taken = [streams[s] if update_state else copy.deepcopy(streams[s]) for s in chosen]
        expected = expected_of(taken, *inputs, scale=scale)
        assert reference.relative_error(output, expected) < 5e-6


def test_a_cleaned_stream_begins_again(algorithm, random):
    cache, _ = cache_at([9, 20], 2, 5, 8, 6, "float32", random)
    inputs = steps_of(2, 7, 2, 8, 6, dtype="float32", random=random)
    retroactive_attention(*inputs, cache, algorithm=algorithm)
    cache.clean_state([1])
    fresh = reference.RetroactiveStream(5)
    inputs = steps_of(1, 7, 2, 8, 6, dtype="float32", random=random)
    output = retroactive_attention(*inputs, cache, streams=[1], algorithm=algorithm)
    assert reference.relative_error(output, expected_of([fresh], *inputs)) < 5e-6


def test_graph_with_unknown_sizes(algorithm, random):
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
        output = retroactive_attention(
            query, key, value, cache, streams=chosen, algorithm=algorithm
        )
        assert output.shape.as_list() == [None, None, h, n, dv]
        return output

    for chosen, t in (([0, 1, 2], 1), ([2, 0], 4), ([1], 9)):
        inputs = steps_of(len(chosen), t, h, d, dv, dtype="float32", random=random)
        expected = expected_of([streams[s] for s in chosen], *inputs)
        assert reference.relative_error(step(*inputs, tf.constant(chosen)), expected) < 5e-6
    before = cache.get_state()
    inputs = steps_of(2, 1, h, d, dv, dtype="float32", random=random)
    for bad in ([0, 3], [1, 1], [-1, 0]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
            step(*inputs, tf.constant(bad))
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])


def test_inside_xla_the_twin_is_traced(random):
    cache, streams = cache_at([0, 3], 2, 5, 8, 6, "float32", random)
    chosen = tf.constant([0, 1])
    step = traced(
        lambda *inputs: retroactive_attention(*inputs, cache, streams=chosen), jit_compile=True
    )
    inputs = steps_of(2, 3, 2, 8, 6, dtype="float32", random=random)
    expected = expected_of(streams, *inputs)
    assert reference.relative_error(step(*map(tf.constant, inputs)), expected) < 5e-6


def test_eagerly_one_op(monkeypatch, executed_ops):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache = RetroactiveCache(2, 3, 5, 8, 6)
    tensors = [tf.constant(GOOD[name]) for name in ("query", "key", "value")]
    streams = tf.constant([0, 1])
    executed_ops.clear()
    retroactive_attention(*tensors, cache, streams=streams)
    assert executed_ops == ["ContinualTransformers>RetroactiveAttention"]


def test_gradients_are_those_of_finite_differences(backend, random):
    """Gradients flow to the call's own steps; keys and values in the rings are constants."""
    cache, _ = cache_at([3, 9], 2, 4, 3, 2, "float64", random)
    inputs = [tf.constant(x) for x in steps_of(2, 5, 2, 3, 2, dtype="float64", random=random)]
    weights = random.normal(size=(2, 5, 2, 4, 2))

    def loss(*inputs):
        return tf.reduce_sum(weights * retroactive_attention(*inputs, cache, update_state=False))

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = loss(*inputs)
    gradients = tape.gradient(total, inputs)
    for i, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)
        nearby = [
            loss(*(x + sign * 1e-6 * direction if i == j else x for j, x in enumerate(inputs)))
            for sign in (1, -1)
        ]
        numeric = (nearby[0] - nearby[1]) / 2e-6
        np.testing.assert_allclose(tf.reduce_sum(gradient * direction), numeric, rtol=1e-6)


def test_a_graph_differentiated_from_outside_says_why_it_cannot_be(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache, _ = cache_at([3], 2, 4, 3, 3, "float32", random)
    inputs = [tf.constant(x) for x in steps_of(1, 2, 2, 3, 3, dtype="float32", random=random)]
    step = traced(lambda *inputs: retroactive_attention(*inputs, cache))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = step(*inputs)
    with pytest.raises(tf.errors.InvalidArgumentError, match="training=True"):
        tape.gradient(output, inputs)


def test_a_state_of_old_names_and_axes_is_read(backend, random):
    here, _ = cache_at([3, 9], 2, 5, 8, 6, "float32", random)
    step = steps_of(2, 1, 2, 8, 6, dtype="float32", random=random)
    retroactive_attention(*step, here)
    state = here.get_state()
    assert (state["queries"].shape, state["values"].shape) == ((2, 5, 2, 8), (2, 5, 2, 6))
    there = RetroactiveCache(0, 2, 5, 8, 6)
    there.set_state(old_state(state))
    for name, array in there.get_state().items():
        np.testing.assert_array_equal(array, state[name])
    step = steps_of(2, 1, 2, 8, 6, dtype="float32", random=random)
    np.testing.assert_array_equal(
        retroactive_attention(*step, there), retroactive_attention(*step, here)
    )
    with pytest.raises(ValueError, match="Expected a state with"):
        there.set_state({**old_state(state), "queries": state["queries"]})


def test_old_names_of_a_cache_warn_and_have_the_old_axes(random):
    cache, _ = cache_at([3, 9], 2, 5, 8, 6, "float32", random)
    for old, new in NEW_NAMES.items():
        with pytest.warns(DeprecationWarning, match=f"RetroactiveCache.{old} .* use {new}"):
            tensor = getattr(cache, old)
        np.testing.assert_array_equal(tensor, getattr(cache, new).numpy().transpose(0, 2, 1, 3))
