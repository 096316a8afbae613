"""Continual single-output attention by the CUDA kernels, against the float64 reference."""

import numpy as np
import pytest

import cuda_calls
import reference
from cuda_single_output import (
    Call,
    Sizes,
    Streams,
    bound_of,
    check_call,
    check_results,
    to_float64,
    to_stored,
)

pytestmark = pytest.mark.sampled(3, rest="slow")

DTYPES = ("float32", "float64", "bfloat16", "float16")
WINDOWS = (1, 2, 3, 16, 17, 64, 120, 1000)
KEY_DIMS = (1, 12, 16, 24, 33, 64, 128)


def on_each_machine(emulated, gpu):
    """Parametrize by (machine, case). Each machine has its own cases, because one is slow."""
    cases = [("emulated", case) for case in emulated] + [("gpu", case) for case in gpu]
    ids = [f"{name}-{case[0]}-{case[1]}" for name, case in cases]
    return pytest.mark.parametrize(("machine", "case"), cases, indirect=["machine"], ids=ids)


def value_dim_of(key_dim):
    return key_dim if key_dim in (1, 64) else key_dim // 2 + 3


# Window, type, sizes of a key, steps of a call.
EMULATED_GRID = [
    *((n, "float32", (1, 12, 33, 64), (1, 2, n, n + 5)) for n in (1, 2, 3, 16, 17)),
    *((17, dtype, (16, 24), (1, 2, 22)) for dtype in DTYPES[1:]),
    (64, "float32", (16, 128), (1,)),
    (120, "bfloat16", (64,), (1, 2)),
]
GPU_GRID = [
    (n, dtype, KEY_DIMS, (1, 2, n, n + 5) if n < 1000 else (1, 2))
    for n in WINDOWS
    for dtype in DTYPES
] + [(1000, "float32 of many steps", (64,), (1000, 1005))]


@on_each_machine(EMULATED_GRID, GPU_GRID)
def test_grid(machine, random, case):
    """Streams of all ages, in any order, take T steps and then one more."""
    n, dtype, key_dims, lengths = case
    for key_dim in key_dims:
        for t in lengths:
            positions = random.permutation([0, 1, n - 1, n, n + 1, 2 * n + 3])
            sizes = Sizes(2, n, key_dim, value_dim_of(key_dim), dtype.split()[0])
            streams = Streams(random, positions, sizes, gaps=0.2)
            chosen = random.permutation(len(positions))[:4]
            for steps in (t, 1):
                inputs = streams.steps(random, len(chosen), steps)
                check_call(machine, streams, chosen, inputs)


# Window and parts.
@on_each_machine(
    [(640, 7)], [(4096, 1), (4096, 33), (4096, "planned"), (65536, 132), (65536, "planned")]
)
def test_long_windows(machine, random, case):
    n, window_parts = case
    for dtype in DTYPES if machine.is_gpu else ("bfloat16",):
        for positions in ((3 * n + 5, n // 2), (n - 1, n)):
            streams = Streams(random, positions, Sizes(2, n, 64, 64, dtype))
            inputs = streams.steps(random, 2, 1)
            parts = window_parts
            if parts == "planned":
                parts = machine.library.plan_window_parts(4, n, machine.memory.multiprocessors)
                assert parts > 1
            check_call(machine, streams, [1, 0], inputs, window_parts=parts)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 3, 9])
@pytest.mark.parametrize("window_parts", [1, 2, 7])
def test_window_parts(machine, random, window_parts, t, dtype):
    """Two calls in a row, for any number of parts and every other option."""
    n = 7 if t == 9 else 37
    streams = Streams(random, [0, 4, n, 3 * n - 1], Sizes(3, n, 16, 24, dtype), gaps=0.2)
    for chosen in ([2, 0, 3], [3, 1]):
        m = len(chosen)
        inputs = streams.steps(random, m, t)
        options = dict(
            window_parts=window_parts,
            windows=True,
            mask=random.random((m, 3, t, n)) < 0.7,
            key_mask=random.random((m, t)) < 0.7,
        )
        check_call(machine, streams, chosen, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_dim", [1, 16, 33, 64])
def test_unaligned(machine, random, key_dim, dtype):
    """Every pointer is aligned only to the size of its elements."""
    streams = Streams(random, [3, 30], Sizes(2, 12, key_dim, 16, dtype))
    for t, parts in ((1, 1), (2, 3)):
        inputs = streams.steps(random, 2, t)
        options = dict(windows=True, window_parts=parts, misaligned=True)
        check_call(machine, streams, [1, 0], inputs, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(4, 4), (12, 12), (20, 28), (36, 60), (100, 68), (132, 12)])
def test_rows_of_8_bytes(machine, random, dims, dtype):
    """Rows of 16-bit numbers that are whole vectors of 8 bytes, but not of 16."""
    streams = Streams(random, [0, 3, 40], Sizes(3, 17, *dims, dtype), gaps=0.2)
    for t, parts in ((1, 1), (1, 3), (4, 1)):
        inputs = streams.steps(random, 2, t)
        check_call(machine, streams, [2, 0], inputs, windows=True, window_parts=parts)


@pytest.mark.parametrize("t", [1, 7])
@pytest.mark.parametrize("axes", ["N", "MN", "MHN", "MHTN", "HN", "TN"])
def test_attention_mask(machine, random, axes, t):
    m, h, n = 3, 2, 19
    streams = Streams(random, [0, 11, 50], Sizes(h, n, 8, 12))
    shape = [size if axis in axes else 1 for axis, size in zip("MHTN", (m, h, t, n), strict=True)]
    for window_parts in (1, 2):
        mask = random.random(shape) < 0.6
        inputs = streams.steps(random, m, t)
        options = dict(mask=mask, window_parts=window_parts)
        check_call(machine, streams, [2, 0, 1], inputs, **options)


@pytest.mark.parametrize("t", [1, 3])
def test_query_mask(machine, random, t):
    """A masked query gives zeros. Its stream still takes the step."""
    streams = Streams(random, [0, 11, 50], Sizes(2, 7, 8, 12))
    for window_parts in (1, 2):
        inputs = streams.steps(random, 3, t)
        query_mask = np.array([True, False, False])
        options = dict(query_mask=query_mask, window_parts=window_parts)
        results = check_call(machine, streams, [0, 2, 1], inputs, **options)
        np.testing.assert_array_equal(results["output"][1:], 0)
        np.testing.assert_array_equal(results["scores"][1:], 0)


@pytest.mark.parametrize("window_parts", [1, 3])
def test_fully_masked_gives_zeros_and_masked_nan_does_no_harm(machine, random, window_parts):
    n = 9
    streams = Streams(random, [20], Sizes(2, n, 5, 4))
    query, key, value = streams.steps(random, 1, 1)
    options = dict(mask=np.zeros((1, 1, 1, n), bool), window_parts=window_parts)
    results = check_call(machine, streams, [0], (query, key, value), **options)
    np.testing.assert_array_equal(results["output"], 0)
    np.testing.assert_array_equal(results["scores"], 0)
    key[:], value[:] = np.nan, np.inf
    options["mask"] = np.arange(n)[None, None, None] < n - 1
    call = Call(machine, streams, [0], (query, key, value), **options)
    call.launch()
    assert np.isfinite(call.results()["output"]).all()


@pytest.mark.parametrize("t", [1, 3, 9])
def test_a_step_without_a_key_is_never_attended_to(machine, random, t):
    """No query attends to such a step, now or later. Its key and value may hold anything."""
    streams = Streams(random, [0, 3, 11], Sizes(2, 7, 4, 4), gaps=0.3)
    for _ in range(18 // t):
        query, key, value = streams.steps(random, 3, t)
        key_mask = random.random((3, t)) < 0.6
        for x in (key, value):
            x[~key_mask] = random.choice([np.nan, np.inf, 3.0])
        check_call(machine, streams, [0, 1, 2], (query, key, value), key_mask=key_mask)


@pytest.mark.parametrize("t", [1, 3])
def test_nan_stays_in_its_stream_and_leaves_with_its_window(machine, random, t):
    n = 6
    streams = Streams(random, [9, 9], Sizes(2, n, 4, 4))
    for i in range(0, 12, t):
        query, key, value = streams.steps(random, 2, t)
        if i == 0:
            key[0, 0], value[0, 0] = np.nan, np.inf
        call = Call(machine, streams, [0, 1], (query, key, value), window_parts=1 + i % 2)
        call.launch()
        output = call.results()["output"]
        expected, _ = streams.expected([0, 1], (query, key, value), call.scale)
        streams.take([0, 1], (query, key, value))
        spoiled = np.arange(i, i + t) < n
        assert np.isnan(output[0, spoiled]).all()
        assert reference.relative_error(output[0, ~spoiled], expected[0, ~spoiled]) < 5e-6
        assert reference.relative_error(output[1], expected[1]) < 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [1e1, 1e2, 1e4])
def test_large_logits(machine, random, largest, dtype):
    """The bound for any logits is twice the error of a naive implementation in the type."""
    n, t = 33, 5
    streams = Streams(random, [40], Sizes(2, n, 16, 16, dtype))
    query, key, value = streams.steps(random, 1, t)
    query *= largest / np.abs(query).max()
    key = to_stored(to_float64(key, dtype) / np.abs(to_float64(key, dtype)).max(), dtype)
    expected, _ = streams.expected([0], (query, key, value), 1.0)
    keys, values = (
        to_float64(np.concatenate([old, new[0]]), dtype).astype(query.dtype)
        for old, new in zip(streams.history[0][:2], (key, value), strict=True)
    )
    naive = []
    for i in range(t):
        rows = slice(len(keys) - t + i + 1 - n, len(keys) - t + i + 1)
        logits = np.einsum("hd,nhd->hn", query[0, i], keys[rows])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        naive.append(np.einsum("hn,nhd->hd", weights, values[rows]))
    allowed = 2 * reference.relative_error(np.stack(naive)[None], expected)
    for window_parts in (1, 3):
        options = dict(scale=1.0, window_parts=window_parts, update_state=False)
        bound = max(allowed, bound_of(dtype))
        check_call(machine, streams, [0], (query, key, value), bound, **options)


def test_infinite_logits_that_pass_do_not_spoil_finite_ones(machine):
    """A key of -infinity has weight zero at any place in the window."""
    streams = Streams(np.random.default_rng(), [0], Sizes(1, 100, 1, 1))
    ones = np.ones((1, 1, 1, 1), np.float32)

    def output(key, value, parts):
        call = Call(machine, streams, [0], (ones, key, value), window_parts=parts, scores=False)
        call.launch()
        streams.take([0], (ones, key, value))
        return call.results()["output"]

    for i in range(20):
        np.testing.assert_array_equal(output(ones * -np.inf, ones, 1 + i % 3), 0)
    for i in range(1, 4):
        np.testing.assert_array_equal(output(ones, 5 * ones, i), 5)


@pytest.mark.sanitizer
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("window_parts", [1, 2])
def test_peeking_leaves_every_byte_of_the_state(machine, random, window_parts, t):
    streams = Streams(random, [0, 3, 11, 40], Sizes(2, 7, 16, 8))
    for _ in range(2):
        inputs = streams.steps(random, 3, t)
        options = dict(update_state=False, windows=True, window_parts=window_parts)
        check_call(machine, streams, [3, 0, 1], inputs, **options)


@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_window_copies(machine, random, window, dtype):
    sizes = Sizes(2, window, 12, 4, dtype)
    streams = Streams(random, [0, 1, window - 1, 3 * window + 1], sizes, gaps=0.3)
    for t in (1, 3, 9):
        inputs = streams.steps(random, 4, t)
        check_call(machine, streams, [3, 0, 2, 1], inputs, windows=True, scores=False)


@pytest.mark.sanitizer
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("window_parts", [1, 2])
def test_no_such_stream_touches_nothing(machine, random, window_parts, t):
    """A number out of range, or a negative position, gives NaN and changes no byte of any state."""
    streams = Streams(random, [5, -1, 3, 0, np.iinfo(np.int64).min], Sizes(2, 7, 16, 8))
    chosen = [2, 5, 1, -1, 0, np.iinfo(np.int32).max, np.iinfo(np.int32).min, 4]
    for _ in range(2):
        inputs = streams.steps(random, len(chosen), t)
        options = dict(windows=True, window_parts=window_parts)
        check_call(machine, streams, chosen, inputs, **options)


@pytest.mark.sanitizer
@pytest.mark.parametrize("t", [1, 3, 9])
def test_positions_that_stay(machine, random, t):
    streams = Streams(random, [5, 0, 30], Sizes(2, 7, 16, 8))
    inputs = streams.steps(random, 3, t)
    options = dict(advance_position=False, window_parts=2)
    check_call(machine, streams, [2, 0, 1], inputs, **options)


def test_rows_beyond_the_streams_held_are_no_streams(machine, random):
    """Without `streams`, row m is stream m."""
    streams = Streams(random, [5, 0, 30], Sizes(2, 7, 4, 4))
    for m in (2, 3, 5):
        check_call(machine, streams, range(m), streams.steps(random, m, 1), in_order=True)


def test_no_rows(machine, random):
    streams = Streams(random, [5, 0, 30], Sizes(2, 7, 4, 4))
    check_call(machine, streams, [], streams.steps(random, 0, 1))


def refused_call(machine, random, sizes, t=1, **fields):
    """Check that a call that no kernel takes writes nothing; return the error message."""
    streams = Streams(random, [5, 7], sizes)
    call = Call(machine, streams, [1, 0], streams.steps(random, 2, t))
    for name, value in fields.items():
        setattr(call.struct, name, value)
    with pytest.raises(cuda_calls.Refused) as refused:
        call.launch()
    call.arena.written.clear()
    call.arena.results()
    return str(refused.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", [(256, 8), (8, 130), (200, 256), (260, 260), (512, 4), (4, 1024)], ids=str
)
def test_large_heads_are_right_or_refused(machine, random, dims, dtype):
    streams = Streams(random, [5, 0], Sizes(1, 3, *dims, dtype))
    inputs = streams.steps(random, 2, 1)
    for window_parts in (1, 2):
        if max(dims) > 256:
            with pytest.raises(cuda_calls.Refused, match="at most 256"):
                check_call(machine, streams, [0, 1], inputs, window_parts=window_parts)
        else:
            check_call(machine, streams, [0, 1], inputs, window_parts=window_parts)


def test_sizes_that_no_kernel_takes_are_said(machine, random):
    for sizes in (
        Sizes(1, 2, 100_000, 1),
        Sizes(1, 2, 1, 100_000),
        Sizes(1, 2, 2001, 3, "float16"),
    ):
        assert "size" in refused_call(machine, random, sizes)
    good = Sizes(1, 3, 4, 4)
    for name in ("num_steps", "num_heads", "window", "key_dim", "value_dim", "window_parts"):
        for value in (0, -1):
            assert "expected" in refused_call(machine, random, good, **{name: value})
    for name in ("compute_dtype", "cache_dtype"):
        assert "under float32" in refused_call(machine, random, good, **{name: 9})
    fields = dict(compute_dtype=cuda_calls.FLOAT64, cache_dtype=cuda_calls.BFLOAT16)
    assert "under float32" in refused_call(machine, random, good, **fields)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window_parts", [1, 3])
def test_no_drift(machine, random, window_parts, overlap):
    """Errors do not add up over many steps that are launched without waiting.

    The steps of a lap lie side by side in memory, and each launch reads one of them.
    """
    sizes = Sizes(2, 64 if machine.is_gpu else 20, 16, 8)
    lap = 1001 if machine.is_gpu else 51
    laps = 100 if machine.is_gpu and window_parts == 1 else 3
    streams = Streams(random, [0], sizes)
    query, key, value = streams.steps(random, lap, 1)
    options = dict(window_parts=window_parts, overlap=overlap, scores=False)
    call = Call(machine, streams, [0] * lap, (query, key, value), **options)
    call.struct.num_streams = 1
    first = {name: getattr(call.struct, name) for name in ("query", "key", "value", "output")}
    for _ in range(laps):
        for i in range(lap):
            for name in first:
                array = call.arena.arrays[name]
                setattr(call.struct, name, first[name] + i * array[0].nbytes)
            call.launch()
    results = call.results()
    for i in range(lap - 2 * sizes.window, lap):
        inputs = [x[i : i + 1] for x in (query, key, value)]
        expected, _ = streams.expected([0], inputs, call.scale)
        streams.take([0], inputs)
        if i >= lap - sizes.window:
            assert reference.relative_error(results["output"][i : i + 1], expected) < 5e-6
    np.testing.assert_array_equal(results["position"], laps * lap)


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("window_parts", [1, 3])
def test_replayed_while_the_streams_age(machine, random, window_parts, t):
    """A step is captured once in a graph, if there are graphs: the host knows no positions."""
    streams = Streams(random, [0, 2, 30], Sizes(2, 7, 16, 8))
    chosen = [2, 0]
    inputs = streams.steps(random, 2, t)
    options = dict(window_parts=window_parts)
    # A kernel's first launch does work that must not happen in a capture.
    check_call(machine, Streams(random, [0, 2, 30], streams.sizes), chosen, inputs, **options)
    call = Call(machine, streams, chosen, inputs, **options)
    replay = machine.memory.capture(call.launch)
    for step in range(20):
        if step > 0:
            inputs = streams.steps(random, 2, t)
            for name, x in zip(("query", "key", "value"), inputs, strict=True):
                call.arena.set(name, x)
        if step == 10:
            chosen = [1, 2]
            call.arena.set("streams", chosen)
        replay()
        check_results(call, streams, chosen, inputs, **options)


def test_planned_parts(machine):
    """At most as many parts as rows, enough for every multiprocessor, one for many queries."""
    plan = machine.library.plan_window_parts
    for queries in (0, 1, 8, 1000, 1 << 40):
        for window in (1, 16, 1000, 65536):
            for multiprocessors in (1, 20, 132):
                parts = plan(queries, window, multiprocessors)
                assert 1 <= parts <= window
    assert plan(8, 65536, 132) * 8 >= 132
    assert plan(1 << 20, 65536, 132) == 1
    # Two parts of each query would be more than eight waves (`MostCutQueries`).
    assert {plan(8 * 528 // 2 + 1, window, 132) for window in (128, 4096, 1 << 20)} == {1}
    # 528 blocks run at once. A last wave with few blocks would be as long as a full one.
    for queries in (528, 600, 1056):
        parts = plan(queries, 4096, 132)
        assert (queries * parts % 528 or 528) > 0.9 * 528


def test_nothing_is_launched(machine):
    machine.library.nothing(machine.memory.stream)
    machine.memory.synchronize()


def test_the_same_reference(random):
    """The expected results here equal those of tests/reference.py, step by step."""
    n, dtype = 5, "bfloat16"
    sizes = Sizes(2, n, 4, 3, dtype)
    streams = Streams(random, [3, 9], sizes, gaps=0.2)
    for t in (1, 3, 8):
        inputs = streams.steps(random, 2, t)
        mask = random.random((2, 2, t, n)) < 0.8
        key_mask = random.random((2, t)) < 0.7
        output, scores = streams.expected([1, 0], inputs, 0.5, mask, key_mask)
        for row, stream in enumerate([1, 0]):
            keys, values, has_key = streams.history[stream]
            told = reference.Stream(n, to_float64(keys, dtype), to_float64(values, dtype))
            told.has_key = list(has_key)
            for i in range(t):
                query, key, value = (x[row, i] for x in inputs)
                step = told.step(
                    query, to_float64(key, dtype), to_float64(value, dtype), 0.5,
                    mask[row, :, i], key_mask[row, i],
                )  # fmt: skip
                for got, expected in zip((output[row, i], scores[row, :, i]), step, strict=True):
                    np.testing.assert_allclose(got, expected, atol=1e-14)
        streams.take([1, 0], inputs, key_mask)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_by_hand(random, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes rounds to bfloat16")
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    x = (random.normal(size=10_000) * 2.0 ** random.integers(-20, 15, 10_000)).astype(np.float32)
    x[:3] = np.inf, -np.inf, 0
    np.testing.assert_array_equal(to_stored(x, dtype), x.astype(kind).view(np.uint16))
    np.testing.assert_array_equal(to_float64(to_stored(x, dtype), dtype), x.astype(kind))
    assert np.isnan(to_float64(to_stored(np.array([np.nan]), dtype), dtype)).all()
