"""The streams' state in single-output attention: kept, moved, and shared by threads."""

import threading

import numpy as np
import pytest
import tensorflow as tf

import reference
from continual_transformers_tf.ops import AttentionCache, single_output_attention
from continual_transformers_tf.ops.single_output import attend_steps
from old_states import old_state
from single_output_cases import cache_at, expected_of, steps_of

pytestmark = pytest.mark.sampled(3, rest="slow")


@pytest.mark.parametrize("t", [1, 3, 9])
def test_peeking_gives_the_next_output_and_changes_nothing(backend, random, t):
    cache, _ = cache_at([0, 5, 12], 2, 4, 8, 6, "float32", random)
    inputs = steps_of(3, t, 2, 8, 6, "float32", random)
    before = cache.get_state()
    peek = single_output_attention(*inputs, cache, update_state=False)
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(single_output_attention(*inputs, cache), peek)


@pytest.mark.parametrize("t", [1, 3, 9])
def test_a_step_that_leaves_the_position(backend, random, t):
    """The step writes the rings as usual. The caller only has to advance the position."""
    cache, _ = cache_at([0, 5, 12], 2, 4, 8, 6, "float32", random)
    other = AttentionCache(3, 2, 4, 8, 6)
    other.set_state(cache.get_state())
    inputs = [tf.constant(x) for x in steps_of(3, t, 2, 8, 6, "float32", random)]
    streams = tf.constant([2, 0, 1])
    expected, _, taken = attend_steps(*inputs, other, streams=streams)
    for _ in range(2 if t == 1 else 1):  # Only a call of one step can be repeated.
        output, _, steps_taken = attend_steps(
            *inputs, cache, streams=streams, advance_position=False
        )
        np.testing.assert_array_equal(output, expected)
        np.testing.assert_array_equal(steps_taken, taken)
        np.testing.assert_array_equal(cache.position, [0, 5, 12])
    cache.position.assign_add([t] * 3)
    for name, array in other.get_state().items():
        np.testing.assert_array_equal(cache.get_state()[name], array, name)


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


def test_a_state_of_old_names_and_axes_is_read(backend, random):
    here, _ = cache_at([3, 9], 2, 5, 8, 6, "float32", random)
    there = AttentionCache(0, 2, 5, 8, 6)
    state = here.get_state()
    assert set(state) == {"keys", "values", "key_mask", "position"}
    assert (state["keys"].shape, state["values"].shape) == ((2, 5, 2, 8), (2, 5, 2, 6))
    old = old_state(state)
    assert old["key"].shape == (2, 2, 5, 8)
    there.set_state(old)
    for name, array in there.get_state().items():
        np.testing.assert_array_equal(array, state[name])
    inputs = steps_of(2, 6, 2, 8, 6, "float32", random)
    expected = single_output_attention(*inputs, here)
    np.testing.assert_array_equal(single_output_attention(*inputs, there), expected)


def test_names_and_axes_of_a_state_are_not_mixed(random):
    cache, _ = cache_at([3, 9], 2, 5, 8, 8, "float32", random)
    state = cache.get_state()
    old = old_state(state)
    for wrong in (
        {**old, "keys": state["keys"]},
        {**{k: x for k, x in old.items() if k != "value"}, "values": state["values"]},
        {**old, "key": state["keys"]},  # The old name, with this version's order of axes.
        {**state, "keys": old["key"]},
        {**old, "key": 7},
        {**old, "key": old["key"][0]},
    ):
        with pytest.raises(ValueError, match="Expected"):
            cache.set_state(wrong)
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, state[name])


def test_old_names_of_a_cache_warn_and_have_the_old_axes(random):
    cache, _ = cache_at([3, 9], 2, 5, 8, 6, "float32", random)
    for old, new in (("key", "keys"), ("value", "values")):
        with pytest.warns(DeprecationWarning, match=f"AttentionCache.{old} .* use {new}") as record:
            tensor = getattr(cache, old)
        assert record[0].filename == __file__
        np.testing.assert_array_equal(tensor, getattr(cache, new).numpy().transpose(0, 2, 1, 3))
        with pytest.raises(AttributeError):
            setattr(cache, old, tensor)


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
    """A step changes the variables in place, but never a tensor that was read from them."""
    cache, _ = cache_at([7], 2, 5, 8, 8, "float32", random)
    tensor = cache.keys.read_value()
    before = tensor.numpy().copy()
    for _ in range(3):
        single_output_attention(*steps_of(1, 2, 2, 8, 8, "float32", random), cache)
    np.testing.assert_array_equal(tensor, before)
    assert (cache.keys.numpy() != before).any()


def test_no_streams_at_all(backend):
    cache = AttentionCache(2, 3, 4, 5, 6)
    empty = np.zeros((0, 3, 5), np.float32)
    output = single_output_attention(
        empty, empty, np.zeros((0, 3, 6), np.float32), cache, streams=[]
    )
    assert output.shape == (0, 3, 6)


def test_a_smaller_state_leaves_the_others_clean(backend, random):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    cache.set_state(cache.get_state(streams=[1]))
    np.testing.assert_array_equal(cache.position, [9, 0, 0])


def test_state_that_does_not_fit_is_refused(random):
    cache, _ = cache_at([3, 9], 2, 5, 8, 8, "float32", random)
    state = cache.get_state()
    other = AttentionCache(2, 2, 5, 4, 8)
    for wrong in (
        {**state, "keys": state["keys"][:1]},
        {**state, "keys": state["keys"].astype("float64")},
        {**state, "position": np.array([-1, 2])},
        {name: state[name] for name in ("keys", "values")},
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
    """Making room copies the rings. No step may be lost while it copies."""
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
    steps = np.roll(state["keys"][0], -(calls % n), axis=0)  # Oldest first.
    newest = np.arange(calls - n + 1, calls + 1)
    assert (steps == newest[:, None, None]).all()


def test_threads_on_one_stream_take_turns(monkeypatch, random):
    """No call is torn: the ring holds whole calls, one after the other."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    h, steps, d, threads, calls = 16, 16, 64, 4, 60
    n = 4 * steps
    cache = AttentionCache(1, h, n, d)
    # Every element of a call's keys and values is that call's number.
    numbers = np.arange(threads * calls, dtype=np.float32).reshape(threads, calls)
    shape = (1, steps, h, d)

    def run(i):
        for number in numbers[i]:
            x = tf.fill(shape, number)
            single_output_attention(x, x, x, cache)

    run_in_threads(run, threads)
    assert int(cache.position[0]) == threads * calls * steps
    state = cache.get_state()
    for rings in (state["keys"], state["values"]):
        last_calls = rings[0].reshape(4, -1)  # One row for each call.
        assert (last_calls == last_calls[:, :1]).all()
    np.testing.assert_array_equal(state["keys"], state["values"])
    assert len(set(state["keys"][0, ::steps, 0, 0])) == 4
