"""Steps of one stream as persistent kernels: which steps are, and that they are right."""

import ctypes

import numpy as np
import pytest

from on_gpu import library
from plan_files import PlanFile, attention_plan, normalized_plan
from reference import BOUNDS
from session_benchmark import launches, persistent_graphs
from streamed import check
from test_long_windows import OnBoth

F = np.float32


@pytest.fixture
def emulator(device, request):
    """Return the emulator's library. Only it says how a step was launched."""
    if "emulated" not in request.node.name:
        pytest.skip("a GPU's graphs do not say how they run")
    emulator = ctypes.CDLL(str(library("emulated")))
    for name in ("nodes", "blocks", "together_nodes"):
        getattr(emulator, f"cuda_emulator_{name}").restype = ctypes.c_int64
    return emulator


def launched(emulator, session, streams=1):
    """Return the nodes and the blocks of threads of a session's step, and how many of the nodes
    of its new graph are persistent kernels.
    """
    counters = ("nodes", "blocks", "together_nodes")

    def counts():
        return np.array([getattr(emulator, f"cuda_emulator_{name}")() for name in counters])

    before = counts()
    (spec,) = session.inputs
    session.step(np.zeros((streams, *spec.shape), spec.dtype))
    return tuple(counts() - before)


def softmax_plan(random, size=8):
    """x -> dense -> softmax -> dense -> dense. Softmax has no phase."""
    plan = PlanFile()
    y = plan.dense(random, plan.input("x", size), size)
    y = plan.node("softmax", [y], plan.value(size), function="softmax", axis=0)
    y = plan.dense(random, plan.dense(random, y, size), size)
    plan.output("y", y)
    return plan


def test_which_steps_persist(device, emulator, random):
    plan = attention_plan(random)
    assert launched(emulator, plan.session(device=device))[2] == 0  # Not by default.
    with launches(persist=True):
        session = plan.session(device=device)
        nodes, _, persistent = launched(emulator, session)
        assert (nodes, persistent) == (1, 1)
        nodes, _, persistent = launched(emulator, session, streams=2)
        assert nodes > 3
        assert persistent == 0
        # The node without a phase stands between two kernels.
        assert launched(emulator, softmax_plan(random).session(device=device))[::2] == (3, 2)


def test_how_many_blocks_a_kernel_has(device, emulator, random):
    """A cluster of up to 8 blocks takes two turns; the emulator has 9 multiprocessors."""
    with launches(persist=True):
        for columns, blocks in ((16, 8), (16 * 16, 8), (16 * 17, 9)):
            plan = PlanFile()
            plan.output("y", plan.dense(random, plan.input("x", 4), columns))
            assert launched(emulator, plan.session(device=device)) == (1, blocks, 1)


@pytest.mark.parametrize("plan", ["attention", "large", "unaligned", "norm", "segments", "alone"])
@pytest.mark.parametrize("narrow", ["float32", "bfloat16", "float16"])
def test_plans(device, random, plan, narrow, persist):
    """Streams of different ages, one at a time and together."""
    made = {
        "attention": lambda: attention_plan(random, 8, heads=2, key_size=8, outputs=8),
        "large": lambda: attention_plan(random, 300, heads=4, key_size=64, window=40),
        "unaligned": lambda: attention_plan(random, 7, heads=3, key_size=5, window=9),
        "norm": lambda: normalized_plan(random),
        "segments": lambda: softmax_plan(random),
        "alone": lambda: norm_only_plan(random),
    }[plan]()
    weights = "bfloat16" if narrow == "bfloat16" else "float32"
    both = OnBoth(made, device, 3, cache_dtype=narrow, weights_dtype=weights)
    (spec,) = both.on_gpu.session.inputs
    steps = 2 * made.plan["receptive_field"] + 6
    x = random.standard_normal((3, steps, *spec.shape)).astype(F)
    bound = BOUNDS[narrow]
    taken = [0, 0, 0]
    before = persistent_graphs()
    for t in range(2 * steps):
        m = t % 2
        if taken[m] < steps - 3:
            check(*both.call([x[[m], taken[m]]], [m]), bound)
            taken[m] += 1
    assert persistent_graphs() - before == (1 if persist else 0)
    check(*both.call([x[:, -3]], np.arange(3)), bound)
    check(
        *both.call([x[1:2, -2:]], [1]), bound
    )  # Another graph of one stream, and the first again.
    check(*both.call([x[2:, -2]], [2]), bound)
    check(*both.call([x[2:, -1:]], [2]), bound)
    np.testing.assert_array_equal(
        both.on_gpu.session.position(both.ids), both.on_cpu.session.position(both.there)
    )


def norm_only_plan(random, size=70):
    """x -> norm."""
    plan = PlanFile()
    weights = {name: random.standard_normal(size).astype(F) for name in ("gamma", "beta")}
    x = plan.input("x", size)
    plan.output(
        "y", plan.node("norm", [x], plan.value(size), weights, function="layer", epsilon=1e-3)
    )
    return plan


def test_a_driver_that_refuses(device, emulator, random):
    both = OnBoth(attention_plan(random), device, 1)
    try:
        emulator.cuda_emulator_set_refuses_together(1)
        with launches(persist=True):
            for _ in range(6):
                x = random.standard_normal((1, 6)).astype(F)
                check(*both.call([x], [0]), BOUNDS["float32"])
    finally:
        emulator.cuda_emulator_set_refuses_together(0)


@pytest.mark.sanitizer
def test_between_other_numbers_of_streams(device, random):
    """A graph of one stream is made again when the memory of a step grows."""
    with launches(persist=True):
        both = OnBoth(attention_plan(random), device, 30)
        for streams in (1, 2, 1, 30, 1):
            x = random.standard_normal((streams, 6)).astype(F)
            check(*both.call([x], np.arange(streams)), BOUNDS["float32"])
