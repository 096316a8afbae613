"""Small steps, whose kernels take the inputs and deliver the outputs themselves."""

import ctypes

import numpy as np
import pytest

from on_gpu import OnEmulator, library, to_gpu
from plan_files import PlanFile, attention_plan, negative_plan

F = np.float32
# A step of one stream of `negative_plan` with so many features sends 64 KiB.
LARGEST = (65536 - 4 * 256) // 4


@pytest.fixture
def copies(device, request):
    """Return a function that returns how often the host has copied, or None on a GPU."""
    if "emulated" not in request.node.name:
        return lambda: None
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_copies.restype = ctypes.c_int64
    return emulator.cuda_emulator_copies


@pytest.mark.parametrize(
    ("features", "streams", "small"),
    [(3, 1, True), (LARGEST, 1, True), (LARGEST + 1, 1, False), (LARGEST // 5, 5, True),
     (1, 4000, False), (1, 3000, True)],
)  # fmt: skip
def test_small_steps_make_no_copies(device, copies, random, features, streams, small):
    session = negative_plan(["x"], 0, features).session(device=device)
    ids = session.open(streams)
    x = random.standard_normal((streams, features)).astype(F)
    on_gpu, _ = to_gpu(x)
    out, result = to_gpu(np.zeros_like(x))
    session.step(x, streams=ids)
    before = copies()
    np.testing.assert_array_equal(session.step(2 * x, streams=ids), -2 * x)
    np.testing.assert_array_equal(session.step(on_gpu, streams=ids[::-1]), -x)
    session.step(3 * x, streams=ids, out=out)
    np.testing.assert_array_equal(result(), -3 * x)
    if before is not None:
        made = copies() - before
        assert (made == 0) == small
    assert (session.position(ids) == 4).all()
    several = np.repeat(x[:, None], 3, axis=1)  # With another graph.
    np.testing.assert_array_equal(session.steps(several, streams=ids), -several)
    np.testing.assert_array_equal(session.step(x, streams=ids), -x)
    assert (session.position(ids) == 8).all()


class Shifted:
    """The elements of a flat array on the GPU from the second one on, in a shape."""

    def __init__(self, there, shape):
        self.there, self.shape = there, shape

    def __dlpack_device__(self):
        return self.there.__dlpack_device__()

    def __dlpack__(self, **options):
        if isinstance(self.there, OnEmulator):
            return self.there.view[1:].reshape(self.shape).__dlpack__()
        return self.there[1:].reshape(self.shape).__dlpack__(**options)


@pytest.mark.sanitizer
@pytest.mark.parametrize("features", [1, 3, 4, 7, 16, 33])
def test_arrays_at_any_address(device, random, features):
    """They begin 4 bytes after a multiple of 16."""
    session = negative_plan(["x"], 0, features).session(device=device)
    ids = session.open(5)
    for streams in (1, 2, 5):
        x = random.standard_normal((streams, features)).astype(F)
        given, _ = to_gpu(np.append(F(0), x))
        out, result = to_gpu(np.full(1 + x.size, 7, F))
        shifted = Shifted(out, x.shape)
        session.step(Shifted(given, x.shape), streams=ids[:streams], out=shifted)
        np.testing.assert_array_equal(result(), np.append(F(7), -x))
        np.testing.assert_array_equal(session.step(x, streams=ids[:streams]), -x)


@pytest.mark.parametrize("ports", [1, 7, 8, 9, 20])
def test_many_ports(device, copies, random, ports):
    """Some are on the GPU. With more than 8, they are copied."""
    names = [f"x{i}" for i in range(ports)]
    session = negative_plan(names, list(range(ports)), 5).session(device=device)
    ids = session.open(3)
    session.step([np.zeros((3, 5), F)] * ports, streams=ids)
    before = copies()
    for _ in range(3):
        arrays = [random.standard_normal((3, 5)).astype(F) for _ in names]
        given = [to_gpu(x)[0] if i % 3 == 1 else x for i, x in enumerate(arrays)]
        outputs = session.step(given, streams=ids)
        for y, x in zip(outputs, arrays, strict=True):
            np.testing.assert_array_equal(y, -x)
    if before is not None:
        assert (copies() == before) == (ports <= 8)


def test_outputs_that_are_inputs(device, random):
    """An output is an input, and two have the same value."""
    plan = PlanFile()
    x = plan.input("x", 5)
    y = plan.node("activation", [x], plan.value(5), function="negative")
    for name, value in (("same", x), ("first", y), ("second", y)):
        plan.output(name, value)
    plan.plan["output_structure"] = [0, 1, 2]
    session = plan.session(device=device)
    for _ in range(3):
        x = random.standard_normal((1, 5)).astype(F)
        for y, expected in zip(session.step(x), (x, -x, -x), strict=True):
            np.testing.assert_array_equal(y, expected)


def test_large_outputs_alone(device, copies, random):
    plan = PlanFile()
    plan.output("y", plan.dense(random, plan.input("x", 2), 20_000))
    session, on_cpu = plan.session(device=device), plan.session()
    x = random.standard_normal((1, 2)).astype(F)
    for _ in range(2):
        before = copies()
        np.testing.assert_allclose(session.step(x), on_cpu.step(x), rtol=1e-4, atol=1e-5)
    if before is not None:
        assert copies() > before


def test_gaps_and_errors(device, random):
    """The mailbox keeps nothing of a step before, and an error leaves no trace."""
    plan = attention_plan(random)
    sessions = [plan.session(device=d) for d in (device, "cpu")]
    ids = [session.open(3) for session in sessions]
    for t in range(9):
        x = random.standard_normal((3, 6)).astype(F)
        mask = random.random(3) < 0.7 if t % 2 else None
        y, expected = (
            session.step(x, streams=of, key_mask=mask)
            for session, of in zip(sessions, ids, strict=True)
        )
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="twice"):
            sessions[0].step(x[:2], streams=ids[0][[1, 1]])


def test_memory_counts_the_mailbox(device):
    session = negative_plan(["x"], 0, 4).session(device=device)
    session.step(np.ones((1, 4), F))
    assert session.memory().arenas >= 2 * 65536
