"""Continual retroactive attention by the CUDA kernels, against the float64 reference."""

import ctypes

import numpy as np
import pytest

import cuda_calls
import reference
from cuda_retroactive import RetroactiveCall, RetroactiveStreams, check_call

pytestmark = pytest.mark.sampled(3, rest="slow")

ALGORITHMS = pytest.mark.parametrize("recompute", [False, True], ids=["update", "recompute"])
# Window, key size, value size, type. Vectors of 4 with each number of lanes, single elements, and
# windows that are no multiple of the rows of a block.
EMULATED_GRID = [
    (1, 4, 4, "float32"),
    (2, 1, 1, "float32"),
    (3, 12, 9, "float32"),
    (7, 16, 16, "float32"),
    (9, 24, 32, "float32"),
    (16, 33, 20, "float32"),
    (17, 64, 36, "float32"),
    (5, 128, 64, "float32"),
    (6, 200, 129, "float32"),
    (4, 12, 5, "float64"),
    (9, 33, 64, "float64"),
]
GPU_GRID = [
    (n, d, dv, dtype)
    for n in (1, 2, 3, 16, 17, 64, 120, 512)
    for d, dv in ((1, 1), (12, 9), (16, 16), (24, 32), (33, 20), (64, 36), (128, 64), (200, 129))
    for dtype in ("float32", "float64")
]
CASES = [("emulated", case) for case in EMULATED_GRID] + [("gpu", case) for case in GPU_GRID]
SANITIZED = [(7, 16, 16, "float32"), (3, 12, 9, "float32")]


@ALGORITHMS
@pytest.mark.parametrize(
    ("machine", "case"),
    [
        pytest.param(
            name, case, id="-".join(map(str, (name, *case))),
            marks=pytest.mark.sanitizer if case in SANITIZED else (),
        )
        for name, case in CASES
    ],
    indirect=["machine"],
)  # fmt: skip
def test_grid(machine, random, case, recompute):
    """Streams of all ages, in any order, take single steps and several, some without a key."""
    n, key_dim, value_dim, dtype = case
    positions = [0, 1, n - 1, n, n + 1, 3 * n + 2]
    streams = RetroactiveStreams(random, positions, 2, n, key_dim, value_dim, dtype)
    for steps in (1, 1, 2, n + 2, 1, 1):
        chosen = random.permutation(len(positions))[:4]
        inputs = streams.steps(random, 4, steps)
        key_mask = random.random((4, steps)) < 0.8
        for x in inputs[1:]:
            x[~key_mask] = np.nan
        check_call(machine, streams, chosen, inputs, key_mask=key_mask, recompute=recompute)


@pytest.mark.sanitizer
@ALGORITHMS
def test_windows_of_many_blocks(machine, random, recompute):
    n = 70 if not machine.is_gpu else 700
    streams = RetroactiveStreams(random, [n - 2, 5 * n + 1], 2, n, 16, 16)
    for _ in range(3):
        check_call(machine, streams, [1, 0], streams.steps(random, 2, 1), recompute=recompute)


def test_both_algorithms_take_turns(machine, random):
    """Recomputing leaves no sums, and an update after it makes them anew."""
    streams = RetroactiveStreams(random, [3, 30], 2, 6, 8, 8)
    for turn, recompute in enumerate([False, False, True, False, True, True, False, False]):
        inputs = streams.steps(random, 2, 1 + turn % 2)
        check_call(machine, streams, [0, 1], inputs, recompute=recompute)
        made_with = streams.state["made_with"]
        assert (made_with[:, 0] == 0).all() if recompute else (made_with[:, 0] > 0).all()


@ALGORITHMS
@pytest.mark.parametrize("t", [1, 3])
def test_steps_that_are_not_kept(machine, random, t, recompute):
    """Their outputs are the same, and every byte of the state stays."""
    streams = RetroactiveStreams(random, [2, 30], 2, 6, 8, 12)
    check_call(machine, streams, [0, 1], streams.steps(random, 2, 1), recompute=recompute)
    inputs = streams.steps(random, 2, t)
    options = dict(recompute=recompute)
    peeked = check_call(machine, streams, [1, 0], inputs, update_state=False, **options)
    taken = check_call(machine, streams, [1, 0], inputs, **options)
    if t == 1 or recompute:
        np.testing.assert_array_equal(peeked["output"], taken["output"])


def test_an_update_reads_only_two_keys(machine, random):
    """And its query's row. A key that neither enters nor leaves may even be spoiled."""
    n = 6
    streams = RetroactiveStreams(random, [20], 2, n, 8, 8)
    check_call(machine, streams, [0], streams.steps(random, 1, 1))
    streams.state["key_cache"][0, 22 % n] = np.nan
    call = RetroactiveCall(machine, streams, [0], streams.steps(random, 1, 1))
    call.launch()
    finite = np.isfinite(call.arena.results()["output"][0, 0]).all((0, 2))
    np.testing.assert_array_equal(finite, [True] * (n - 1) + [False])


def test_positions_that_stay(machine, random):
    """Rings and sums move on, positions do not: the next step sees that the sums do not fit."""
    streams = RetroactiveStreams(random, [3, 8], 1, 5, 4, 4)
    first = streams.steps(random, 2, 1)
    check_call(machine, streams, [0, 1], first, advance_position=False)
    check_call(machine, streams, [0, 1], streams.steps(random, 2, 1))
    check_call(machine, streams, [0, 1], streams.steps(random, 2, 1))


def test_another_scale_computes_the_sums_anew(machine, random):
    streams = RetroactiveStreams(random, [20], 2, 9, 8, 8)
    for scale in (0.5, 0.5, 2.0, 2.0, 0.25):
        check_call(machine, streams, [0], streams.steps(random, 1, 1), scale=scale)


def test_sums_of_another_order_are_computed_anew(machine, random):
    """For example those that a CPU made."""
    streams = RetroactiveStreams(random, [20], 2, 9, 8, 8)
    check_call(machine, streams, [0], streams.steps(random, 1, 1))
    streams.state["made_with"][0, 0] -= 55
    for name in ("softmax", "weighted_sum"):
        streams.state[name][:] = np.nan
    check_call(machine, streams, [0], streams.steps(random, 1, 1))


def test_unaligned(machine, random):
    """Pointers that are aligned only to their elements: other sums, so they are made anew."""
    streams = RetroactiveStreams(random, [4, 30], 2, 7, 16, 8)
    before = False
    for misaligned in (False, True, True, False):
        if misaligned != before:
            for name in ("softmax", "weighted_sum"):
                streams.state[name][:] = np.nan
        before = misaligned
        inputs = streams.steps(random, 2, 1)
        check_call(machine, streams, [1, 0], inputs, misaligned=misaligned)


@pytest.mark.sanitizer
def test_rows_beyond_the_streams_held_are_no_streams(machine, random):
    streams = RetroactiveStreams(random, [4, -3, 9], 2, 5, 8, 8)
    for chosen in ([2, 7, -1, 1], [0, 1, 2, 3]):
        inputs = streams.steps(random, 4, 1)
        check_call(machine, streams, chosen, inputs)
        check_call(machine, streams, chosen, inputs, recompute=True)
    check_call(machine, streams, [0, 1, 2, 3], inputs, in_order=True)


def test_no_rows(machine, random):
    streams = RetroactiveStreams(random, [4], 2, 5, 8, 8)
    check_call(machine, streams, [], streams.steps(random, 0, 1))


@ALGORITHMS
def test_nan_stays_in_its_stream_and_leaves_with_its_window(machine, random, recompute):
    n = 5
    streams = RetroactiveStreams(random, [9, 9], 1, n, 4, 4)
    spoils = [(1, np.nan), (2, np.inf), (2, np.nan), (0, np.nan), (1, -np.inf)]
    for turn in range(7 * n):
        inputs = streams.steps(random, 2, 1)
        if turn % (n + 1) == 0 and turn // (n + 1) < len(spoils):
            which, x = spoils[turn // (n + 1)]
            inputs[which][0, 0, 0, 1] = x
        call = RetroactiveCall(machine, streams, [0, 1], inputs, recompute=recompute)
        call.launch()
        results = call.arena.results()
        outputs = [one.take(*(x[i] for x in inputs)) for i, one in enumerate(streams.references)]
        for name in streams.state:
            streams.state[name] = results[name]
        assert reference.relative_error(results["output"][1], outputs[1]) < 5e-6
        there = np.isfinite(outputs[0])
        got = results["output"][0]
        np.testing.assert_array_equal(np.isfinite(got), there, str(turn))
        assert reference.relative_error(got[there], outputs[0][there]) < 5e-6


@pytest.mark.parametrize("std", [1, 9, 36, 400])
def test_logits_of_any_size(machine, random, std):
    """A departing key that dominated its rows leaves little of their sums: they are made anew.

    The bound is twice the error of recomputing in float32.
    """
    n = 12
    errors = {}
    for recompute in (False, True):
        same = np.random.default_rng(5)
        streams = RetroactiveStreams(same, [n], 1, n, 16, 8)
        worst = 0
        for _ in range(4 * n):
            inputs = streams.steps(same, 1, 1)
            for x in inputs[:2]:
                x *= np.float32(np.sqrt(std))
            call = RetroactiveCall(machine, streams, [0], inputs, recompute=recompute)
            call.launch()
            results = call.arena.results()
            for name in streams.state:
                streams.state[name] = results[name]
            expected = streams.references[0].take(*(x[0] for x in inputs))
            worst = np.maximum(worst, reference.relative_error(results["output"][0], expected))
        errors[recompute] = worst
    assert errors[False] < max(5e-6, 2 * errors[True])


def test_logits_far_above_the_reference(machine, random):
    """A weight that would overflow makes its row anew."""
    streams = RetroactiveStreams(random, [6], 1, 6, 4, 4)
    for size in (1, 1, 300, 1, 1, 1e4, 1, 1, 1, 1, 1, 1):
        query, key, value = streams.steps(random, 1, 1)
        key *= np.float32(size)
        check_call(machine, streams, [0], (query, key, value), bound=1e-4)


def test_no_drift(machine, random):
    """The weights that leave have the bits of those that came, so errors do not add up."""
    n = 8
    streams = RetroactiveStreams(random, [0], 1, n, 8, 8)
    count = 100_000 if machine.is_gpu else 600
    for taken in range(200, count + 1, 200):
        results = check_call(machine, streams, [0], streams.steps(random, 1, 200))
        one = streams.references[0]
        one.steps, one.has_key = one.steps[-n:], one.has_key[-n:]
        assert results["steps_taken"][0] == taken


@pytest.mark.parametrize("t", [1, 3])
@ALGORITHMS
def test_replayed_while_the_streams_age(machine, random, t, recompute):
    """A step is captured once in a graph, if there are graphs: the host knows no positions."""
    streams = RetroactiveStreams(random, [0, 30], 2, 7, 16, 8)
    inputs = streams.steps(random, 2, t)
    check_call(machine, streams, [1, 0], inputs, recompute=recompute)
    call = RetroactiveCall(machine, streams, [1, 0], inputs, recompute=recompute)
    replay = machine.memory.capture(call.launch)
    for _ in range(10):
        inputs = streams.steps(random, 2, t)
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            call.arena.set(name, x)
        replay()
        output = call.arena.results()["output"]
        expected = [
            streams.references[stream].take(*(x[i] for x in inputs))
            for i, stream in enumerate([1, 0])
        ]
        assert reference.relative_error(output, np.stack(expected)) < 5e-6


def test_sizes_that_no_kernel_takes_are_said(machine, random):
    streams = RetroactiveStreams(random, [0], 1, 4, 257, 4)
    with pytest.raises(cuda_calls.Refused, match="sizes of at most 256"):
        RetroactiveCall(machine, streams, [0], streams.steps(random, 1, 1)).launch()
    call = RetroactiveCall(machine, streams, [0], streams.steps(random, 1, 1))
    call.struct.window = 0
    with pytest.raises(cuda_calls.Refused, match="expected steps"):
        machine.library.retroactive(ctypes.byref(call.struct), None)
    call.struct.compute_dtype = cuda_calls.BFLOAT16
    with pytest.raises(cuda_calls.Refused, match="float32 or float64"):
        machine.library.retroactive(ctypes.byref(call.struct), None)
