"""Attention whose windows a session on a GPU cuts into parts, one block of threads each.

The emulator reports 9 multiprocessors. With few streams, windows of 128 rows and more are cut.
"""

import ctypes

import numpy as np
import pytest

import plan_reference
from continual_transformers_tf.session import TooManyStreamsError
from on_gpu import library
from plan_files import attention_only_plan, attention_plan, attention_ports_plan
from reference import BOUNDS
from streamed import Streamed, check

F = np.float32
WINDOW = 150
KINDS = {
    "plain": {},
    "one_key_head": dict(key_heads=1, window=300),
    "bias_sink_and_cap": dict(bias=True, sink=True, soft_cap=1.5),
    "columns": dict(bias=True, first_column=5, end_column=WINDOW - 6),
    "late_queries": dict(first_column=11, query_delay=7, sink=True),
    "unaligned": dict(key_size=5, value_size=3),
    "large_heads": dict(heads=2, key_heads=1, key_size=128, value_size=200, scale=0.1),
    "three_rows_a_step": dict(rows=3, bias=True, query_delay=4),
}


@pytest.fixture
def emulator(device, request):
    """Return the emulator's library, or None on a GPU."""
    if "emulated" not in request.node.name:
        return None
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_blocks.restype = ctypes.c_int64
    emulator.cuda_emulator_allocated.restype = ctypes.c_size_t
    emulator.cuda_emulator_set_room.argtypes = [ctypes.c_size_t]
    return emulator


def blocks(emulator, work):
    """Return how many blocks of threads the kernels of a piece of work have."""
    before = emulator.cuda_emulator_blocks()
    work()
    return emulator.cuda_emulator_blocks() - before


def test_long_windows_are_cut(device, emulator):
    if emulator is None:
        pytest.skip("a GPU does not say how many blocks it has run")

    def more_than_uncut(window, streams):
        counts = []
        for n in (window, 127):
            session = attention_only_plan(n).session(device=device)
            x = np.ones((streams, 4), F)
            counts.append(blocks(emulator, lambda s=session, x=x: s.step(x)))
        return counts[0] - counts[1]

    assert more_than_uncut(128, 1) == 1
    assert more_than_uncut(256, 1) == 3
    assert more_than_uncut(256, 9) == 9 * 3  # 36 blocks are resident.
    assert more_than_uncut(256, 40) == 40
    assert more_than_uncut(256, 200) == 0


def random_calls(random, plan, streams, steps):
    """Return a plan's inputs (streams, steps, ...), and whether each step is no gap."""
    arrays = []
    for port in plan.plan["inputs"]:
        value = plan.plan["values"][port["value"]]
        shape = (streams, steps, *value["shape"])
        mask = value["dtype"] == "bool"
        arrays.append(random.random(shape) < 0.8 if mask else random.standard_normal(shape))
    return arrays, random.random((streams, steps)) < 0.9


def expected_steps(plan, one_row, arrays, has_key):
    """Return the reference's outputs (streams, steps, ...).

    Args:
        plan, one_row: A plan, and the same one with one row in a step.
        arrays, has_key: As `random_calls` returns them.
    """
    shapes = [one_row.plan["values"][port["value"]]["shape"] for port in one_row.plan["inputs"]]
    outputs = []
    for m, is_key in enumerate(has_key):
        stream = plan_reference.Stream(one_row.plan, one_row.tensors)
        rows = [x[m].reshape(-1, *shape) for x, shape in zip(arrays, shapes, strict=True)]
        is_key = np.repeat(is_key, len(rows[0]) // len(is_key))
        outputs += [stream.step(row, k)[0] for *row, k in zip(*rows, is_key, strict=True)]
    (port,) = plan.plan["outputs"]
    shape = plan.plan["values"][port["value"]]["shape"]
    return np.reshape(outputs, (*has_key.shape, *shape))


class OnBoth:
    """Sessions of a plan on the GPU and on the CPU, which take the same calls."""

    def __init__(self, plan, device, streams, **options):
        sessions = [plan.session(device=d, **options) for d in (device, "cpu")]
        self.on_gpu, self.on_cpu = map(Streamed, sessions)
        self.ids, self.there = (s.open(streams) for s in sessions)

    def call(self, arrays, order, has_key=None):
        """Return the outputs of both for streams `order`: of one step, or of several if the arrays
        have an axis of steps.
        """
        several = arrays[0].ndim > 1 + len(self.on_gpu.session.inputs[0].shape)
        name = "steps" if several else "step"
        return [
            getattr(streamed, name)(arrays, streams=ids[order], key_mask=has_key)
            for streamed, ids in ((self.on_gpu, self.ids), (self.on_cpu, self.there))
        ]

    def age(self, arrays):
        """Take several steps of all streams on the CPU, and copy them to the GPU."""
        self.on_cpu.steps(arrays, streams=self.there)
        self.on_gpu.session.set_state(self.on_cpu.session.get_state(self.there), self.ids)

    def states_are_equal(self):
        return self.on_gpu.session.get_state(self.ids) == self.on_cpu.session.get_state(self.there)


@pytest.mark.parametrize(
    ("kind", "cache_dtype"),
    [(kind, "float32") for kind in KINDS]
    + [(kind, t) for kind in ("bias_sink_and_cap", "unaligned") for t in ("bfloat16", "float16")],
)
@pytest.mark.usefixtures("persist")
def test_every_kind_of_attention(device, emulator, kind, cache_dtype):
    """Streams of all ages in any order, in single steps and several, with gaps and both masks."""
    options = {"window": WINDOW, "scale": 0.5, **KINDS[kind]}
    plan = attention_ports_plan(np.random.default_rng(1), **options)
    one_row = attention_ports_plan(np.random.default_rng(1), **{**options, "rows": None})
    random = np.random.default_rng(2)
    steps = options["window"] + 30
    arrays, has_key = random_calls(random, plan, 3, steps)
    expected = expected_steps(plan, one_row, arrays, has_key)
    both = OnBoth(plan, device, 3, cache_dtype=cache_dtype)

    found = []  # Outputs of the GPU, the CPU and the reference.

    def take(order, at):
        given = [x[order, at] for x in arrays]
        outputs = both.call(given, np.ravel(order), has_key[order, at])
        found.append(
            [y.reshape(-1, *expected.shape[2:]) for (y,) in (*outputs, [expected[order, at]])]
        )

    # The first stream's window is full, the second one's half full, and the third stream is new.
    taken = np.array([steps - 12, options["window"] // 2, 0])
    for m in (0, 1):
        take([[m]], np.arange(taken[m])[None])
    for i in range(9):
        order = random.permutation(3)[: 1 + i % 3]
        take(order, taken[order])
        taken[order] += 1
    for m in range(3):
        take([[m]], np.arange(taken[m], taken[m] + 3)[None])
    on_gpu, on_cpu, in_float64 = map(np.concatenate, zip(*found, strict=True))
    check([on_gpu], [in_float64], BOUNDS[cache_dtype])
    check([on_gpu], [on_cpu], BOUNDS[cache_dtype])
    assert both.states_are_equal()
    if emulator is not None:
        given = [x[:, -1] for x in arrays]
        launched = blocks(emulator, lambda: both.on_gpu.step(given, streams=both.ids))
        assert launched >= 2 * 3 * options.get("heads", 4) * (options.get("rows") or 1)


@pytest.mark.sanitizer
@pytest.mark.parametrize("layers", [1, 2])
def test_other_numbers_of_streams(device, random, layers):
    """Each has its own graph and its own number of parts, in the same memory."""
    both = OnBoth(attention_only_plan(256, layers=layers), device, 40)
    x = random.standard_normal((40, 256, 4)).astype(F)
    both.age([x])
    for m in (1, 40, 2, 9, 1, 20, 40, 3):
        order = random.permutation(40)[:m]
        check(*both.call([x[order, m]], order), BOUNDS["float32"])
    both.on_gpu.session.profile(1)  # It launches the kernels without a graph.
    check(*both.call([x[:3, 0]], np.arange(3)), BOUNDS["float32"])


def test_windows_that_only_several_streams_cut(device, emulator, random):
    """The 27 blocks of one stream fit into one wave of the emulator's 36, those of two into a bad
    second one.
    """
    heads, full = 27, 300
    plan = attention_ports_plan(
        random, heads=heads, key_heads=heads, key_size=4, value_size=4, window=full
    )
    both = OnBoth(plan, device, 2)
    arrays, _ = random_calls(random, plan, 2, full + 2)
    both.age([x[:, :full] for x in arrays])

    def step(at, order):
        outputs = both.call([x[order, at] for x in arrays], order)
        check(*outputs, BOUNDS["float32"])

    if emulator is None:
        step(full, np.arange(1))
        step(full + 1, np.arange(2))
        return
    of_one = blocks(emulator, lambda: step(full, np.arange(1)))
    of_two = blocks(emulator, lambda: step(full + 1, np.arange(2)))
    assert of_two - of_one >= 3 * heads  # 27 blocks, and then 108


def test_errors_leave_no_trace(device, emulator, random):
    """A step of 1,000 streams takes 16 MB, and 1,000 steps of one stream as much."""
    both = OnBoth(attention_plan(random, window=256, outputs=4_000), device, 1000)
    x = random.standard_normal((1000, 4, 6)).astype(F)
    some = np.arange(3)

    def goes_on(t):
        check(*both.call([x[:3, t]], some), BOUNDS["float32"])

    goes_on(0)
    with pytest.raises(ValueError, match="twice"):
        both.on_gpu.step([x[:2, 0]], streams=both.ids[[0, 0]])
    goes_on(1)
    if emulator is None:
        return  # Filling a GPU's memory takes it from other programs.
    try:
        emulator.cuda_emulator_set_room(emulator.cuda_emulator_allocated() + (1 << 20))
        message = "the GPU has no memory for the .* bytes of a step"
        with pytest.raises(TooManyStreamsError, match=message):
            both.on_gpu.step([x[:, 0]], streams=both.ids)
        goes_on(2)
        with pytest.raises(TooManyStreamsError, match=message):
            both.on_gpu.steps([x[None, :, 0]], streams=both.ids[:1])
        goes_on(3)
    finally:
        emulator.cuda_emulator_set_room(1 << 36)


@pytest.mark.parametrize("sink", [False, True])
def test_windows_without_a_key_are_zeros(device, sink):
    plan = attention_ports_plan(np.random.default_rng(3), sink=sink, window=WINDOW)
    session = Streamed(plan.session(device=device))
    stream = session.session.open()
    arrays = [np.ones((1, WINDOW + 5, spec.shape[0])) for spec in session.session.inputs]
    (y,) = session.steps(arrays, streams=stream, key_mask=np.zeros((1, WINDOW + 5), bool))
    np.testing.assert_array_equal(y, 0)


def test_large_logits_and_nan_in_one_stream(device, random):
    both = OnBoth(attention_only_plan(WINDOW), device, 3)
    x = random.standard_normal((3, WINDOW + 20, 4)).astype(F)
    x[0] *= 100  # Logits of 1e4.
    x[1, 15] = np.nan
    (y,), (expected,) = both.call([x], np.arange(3))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(y[[0, 2]]).all()
    assert np.isnan(y[1, 15:-5]).all()
    assert np.isfinite(y[1, -5:]).all()  # The row has left the window.
