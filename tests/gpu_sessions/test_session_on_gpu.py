"""Sessions of hand-made plans on a GPU, against sessions on the CPU.

`gpu` runs on a GPU. `emulated` runs everywhere: the same sources, built for the emulator of CUDA in
tools/gpu/emulator.
"""

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import cuda_build
import nvcc
from continual_transformers_tf.session import (
    OtherModelError,
    TooManyStreamsError,
    UnknownStreamError,
)
from on_gpu import CORE, LIBRARY, OnEmulator, VersionedOnEmulator, library, to_gpu
from plan_files import (
    attention_only_plan,
    attention_plan,
    many_ports_plan,
    normalized_plan,
    two_ports_plan,
)

FEATURES, OUTPUTS, WINDOW = 6, 5, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
F = np.float32


@pytest.fixture
def plan(random):
    return attention_plan(random, FEATURES, window=WINDOW, outputs=OUTPUTS)


@pytest.fixture
def session(plan, device):
    return plan.session(device=device)


@pytest.fixture
def on_cpu(plan):
    return plan.session()


@pytest.fixture
def x(random):
    """Return steps of 8 streams, (8, 20, FEATURES)."""
    return random.standard_normal((8, 20, FEATURES)).astype(F)


def test_steps_of_several_streams(session, on_cpu, x):
    """Calls of any number of streams and steps, so also more numbers of streams than graphs."""
    ids, there = session.open(40), on_cpu.open(40)
    random = np.random.default_rng(1)
    for _ in range(2):
        for m in (*range(1, 21), 40, 3):
            steps = random.standard_normal((m, 3, FEATURES)).astype(F)
            order = random.permutation(40)[:m]
            y = session.step(steps[:, 0], streams=ids[order])
            expected = on_cpu.step(steps[:, 0], streams=there[order])
            np.testing.assert_allclose(y, expected, **CLOSE)
            if m % 5 == 0:
                y = session.steps(steps, streams=ids[order])
                expected = on_cpu.steps(steps, streams=there[order])
                np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_array_equal(session.position(ids), on_cpu.position(there))


@pytest.mark.parametrize("refused", ["nowhere", "by an old driver", "when it is instantiated"])
def test_launches_of_a_step_overlap(session, on_cpu, x, request, refused):
    """All but two of each step: the second begins when the first has taken the inputs.

    If the driver refuses such graphs, steps are taken too.
    """
    if "emulated" not in request.node.name:
        pytest.skip("a GPU's graphs do not say how they run")
    emulator = ctypes.CDLL(str(library("emulated")))
    for counter in (emulator.cuda_emulator_nodes, emulator.cuda_emulator_early_nodes):
        counter.restype = ctypes.c_int64

    def counts():
        return emulator.cuda_emulator_nodes(), emulator.cuda_emulator_early_nodes()

    ids, there = session.open(2), on_cpu.open(2)
    before = counts()
    try:
        where = ["nowhere", "by an old driver", "when it is instantiated"].index(refused)
        emulator.cuda_emulator_set_refuses_overlap(where)
        for t in range(2 * WINDOW):
            y = session.step(x[:2, t], streams=ids)
            np.testing.assert_allclose(y, on_cpu.step(x[:2, t], streams=there), **CLOSE)
    finally:
        emulator.cuda_emulator_set_refuses_overlap(0)
    nodes, early = (after - first for after, first in zip(counts(), before, strict=True))
    assert nodes > 2 * (2 * WINDOW)
    assert early == (nodes - 2 * (2 * WINDOW) if refused == "nowhere" else 0)


def test_no_streams_and_no_steps(session, x):
    assert session.step(x[:0, 0], streams=np.zeros(0, np.int64)).shape == (0, OUTPUTS)
    a = session.open()
    assert session.steps(x[:1, :0], streams=a).shape == (1, 0, OUTPUTS)
    assert session.position(a) == 0


@pytest.mark.sanitizer
def test_gaps(session, on_cpu, x):
    ids, there = session.open(3), on_cpu.open(3)
    random = np.random.default_rng(2)
    with_nan = x[:3].copy()
    for t in range(6):
        mask = random.random(3) < 0.6
        with_nan[~mask, t] = np.nan  # What is in a gap's key does not matter afterwards.
        y = session.step(with_nan[:, t], streams=ids, key_mask=mask)
        expected = on_cpu.step(x[:3, t], streams=there, key_mask=mask)
        np.testing.assert_allclose(y[mask], expected[mask], **CLOSE)
    mask = random.random((3, 8)) < 0.6
    y = session.steps(x[:3, 6:14], streams=ids, key_mask=mask)
    expected = on_cpu.steps(x[:3, 6:14], streams=there, key_mask=mask)
    np.testing.assert_allclose(y, expected, **CLOSE)
    # A ring that held NaN moves to the CPU without them.
    on_cpu.set_state(session.get_state(ids), there)
    y = session.step(x[:3, 14], streams=ids)
    np.testing.assert_allclose(on_cpu.step(x[:3, 14], streams=there), y, **CLOSE)


def test_a_fully_masked_window_is_zeros(device):
    session = attention_only_plan().session(device=device)
    a = session.open()
    for _ in range(6):
        y = session.step(np.ones((1, 4), F), streams=a, key_mask=np.zeros(1, bool))
        np.testing.assert_array_equal(y, 0)


def test_large_logits_and_nan_in_one_stream(device):
    session, on_cpu = (attention_only_plan().session(device=d) for d in (device, "cpu"))
    ids, there = session.open(3), on_cpu.open(3)
    x = np.random.default_rng(3).standard_normal((3, 6, 4)).astype(F)
    x[0] *= 100  # Logits of 1e4.
    x[1, 2] = np.nan
    y, expected = session.steps(x, streams=ids), on_cpu.steps(x, streams=there)
    np.testing.assert_allclose(y, expected, **CLOSE)
    assert np.isfinite(y[[0, 2]]).all()


def test_cleaned_and_reopened_streams_have_seen_nothing(session, x):
    a = session.open()
    fresh = np.stack([session.step(x[:1, t], streams=a)[0] for t in range(3)])
    session.clean_state(a)
    assert session.position(a) == 0
    again = np.stack([session.step(x[:1, t], streams=a)[0] for t in range(3)])
    np.testing.assert_array_equal(again, fresh)
    session.close(a)
    b = session.open()
    with pytest.raises(UnknownStreamError):
        session.step(x[:1, 0], streams=a)
    again = np.stack([session.step(x[:1, t], streams=b)[0] for t in range(3)])
    np.testing.assert_array_equal(again, fresh)


@pytest.mark.sanitizer
def test_default_streams(session, on_cpu, x):
    for t in range(5):
        y, expected = session.step(x[:, t]), on_cpu.step(x[:, t])
        np.testing.assert_allclose(y, expected, **CLOSE)
    assert session.open_streams == 8


@pytest.mark.sanitizer
def test_errors_leave_streams_as_they_were(session, x):
    a, b = session.open(2)
    session.steps(x[:2, :5], streams=[a, b])
    before = session.get_state([a, b])
    refused = [
        lambda: session.step(x[:2, 0], streams=[a, a]),
        lambda: session.step(x[:2, 0], streams=[a, b + 12345]),
        lambda: session.step(x[:3, 0], streams=[a, b]),
        lambda: session.step(x[:2, 0, :-1], streams=[a, b]),
        lambda: session.step(x[:2, 0].astype("float64"), streams=[a, b]),
        lambda: session.set_state([before[0], before[1][:-1]], [a, b]),
        lambda: session.set_state([before[0], b"CTSTREAM" + bytes(100)], [a, b]),
    ]
    for call in refused:
        with pytest.raises((ValueError, TypeError)):
            call()
    assert session.get_state([a, b]) == before


def test_tokens_out_of_range_are_refused_before_a_stream_changes(device, random):
    plan, table = many_ports_plan(random)
    session = plan.session(device=device)
    ids = session.open(2)
    given = {"sound": np.ones((2, 3), F), "word": np.array([1, len(table) - 1], np.int32)}
    session.step(given, streams=ids)
    before = session.get_state(ids)
    with pytest.raises(ValueError, match="no stream has taken a step"):
        session.step({**given, "word": np.array([1, len(table)], np.int32)}, streams=ids)
    assert session.get_state(ids) == before


def test_weights_are_replaced(device, random, x):
    first, second = (attention_plan(random, FEATURES) for _ in range(2))
    session, on_cpu = first.session(device=device), first.session()
    a, b = session.open(), on_cpu.open()
    session.steps(x[:1, :5], streams=a)
    on_cpu.steps(x[:1, :5], streams=b)
    for each in (session, on_cpu):
        each._load_weights_bytes(second.to_bytes())
    y, expected = (s.steps(x[:1, 5:], streams=i) for s, i in ((session, a), (on_cpu, b)))
    np.testing.assert_allclose(y, expected, **CLOSE)
    with pytest.raises(OtherModelError):
        session._load_weights_bytes(attention_plan(random, FEATURES, heads=1).to_bytes())
    # A copy made with other weights is refused here too.
    before = first.session()
    copy = before.get_state(before.open())
    with pytest.raises(OtherModelError, match="other weights"):
        session.set_state(copy, a)


@pytest.mark.parametrize("key_size", [3, 8, 16, 33])
@pytest.mark.parametrize(
    ("cache_dtype", "weights_dtype"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"),
     ("float16", "bfloat16")],
)  # fmt: skip
def test_narrow_types(device, random, x, cache_dtype, weights_dtype, key_size):
    """The CPU rounds keys, values and kernels to the same bits."""
    plan = attention_plan(random, FEATURES, key_size=key_size)
    dtypes = {"cache_dtype": cache_dtype, "weights_dtype": weights_dtype}
    session, on_cpu = plan.session(device=device, **dtypes), plan.session(**dtypes)
    ids, there = session.open(3), on_cpu.open(3)
    y, expected = (s.steps(x[:3], streams=i) for s, i in ((session, ids), (on_cpu, there)))
    np.testing.assert_allclose(y, expected, rtol=1e-2, atol=1e-3)
    on_cpu.set_state(session.get_state(ids), there)
    np.testing.assert_allclose(
        on_cpu.step(x[3:6, 0], streams=there), session.step(x[3:6, 0], streams=ids), rtol=1e-2,
        atol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "int8"}, "cache dtype int8 has no kernels on cuda:0, expected float32, b"),
        ({"weights_dtype": "int8"}, "weights dtype int8 has no kernels on cuda:0, expected float"),
    ],
)
def test_types_without_kernels_are_refused_by_name(plan, device, options, message):
    with pytest.raises(ValueError, match=message):
        plan.session(device=device, **options)


def test_heads_that_are_too_large_are_refused_by_name(device, random):
    assert attention_plan(random, FEATURES, key_size=256).session(device=device)
    plan = attention_plan(random, FEATURES, key_size=257)
    name = next(node["name"] for node in plan.plan["nodes"] if node["op"] == "attention")
    message = f"{name}: attention with heads of 257 features has no kernel on cuda:0, expected at"
    with pytest.raises(ValueError, match=message):
        plan.session(device=device)


def test_a_device_that_does_not_exist(plan, device):
    with pytest.raises(ValueError, match='"cuda:9999": there (is|are) .* GPUs?, counted from 0'):
        plan.session(device="cuda:9999")


def test_without_the_library_it_says_so(plan, monkeypatch, tmp_path):
    monkeypatch.setenv(LIBRARY, str(tmp_path / "none.so"))
    with pytest.raises(ValueError, match=r"none\.so: cannot open.*; build the package with"):
        plan.session(device="cuda:0")
    monkeypatch.setenv(LIBRARY, str(CORE))
    with pytest.raises(ValueError, match="has no sessions on a GPU"):
        plan.session(device="cuda:0")
    assert plan.session().device == "cpu"


@pytest.mark.slow
def test_without_a_driver_it_says_so(plan, monkeypatch):
    """A library that nvcc built loads on every machine."""
    if cuda_build.why_no_driver() is None:
        pytest.skip("this machine has a driver")
    try:
        nvcc.find()
    except nvcc.Unusable as why:
        pytest.skip(str(why))
    directory = cuda_build.default_directory(False, "90", sessions=True)
    monkeypatch.setenv(LIBRARY, str(cuda_build.build(directory, False, "90", CORE)))
    with pytest.raises(ValueError, match='no device "cuda:0": the driver is missing, or older'):
        plan.session(device="cuda:0")


def test_many_streams_come_and_go(device, random):
    """Streams of several slabs, some of which are freed."""
    plan = attention_only_plan(window=600, size=64)
    session, on_cpu = plan.session(device=device), plan.session()
    ids, there = session.open(40), on_cpu.open(40)  # 300 KB each.
    x = random.standard_normal((40, 3, 64)).astype(F)
    np.testing.assert_allclose(
        session.steps(x, streams=ids), on_cpu.steps(x, streams=there), **CLOSE
    )
    kept = [1, 38]
    session.close(np.delete(ids, kept))
    used = session.memory().streams
    others = session.open(5)
    np.testing.assert_allclose(
        session.step(x[kept, 0], streams=ids[kept]),
        on_cpu.step(x[kept, 0], streams=there[kept]),
        **CLOSE,
    )
    session.step(x[:5, 0], streams=others)
    assert 0 < used < 40 * session.state_bytes


@pytest.mark.parametrize("window", [16, 128, 512])
def test_little_memory_is_lost(device, request, window):
    """Blocks of about 8 KiB, 64 KiB and 256 KiB. CUDA gives memory in multiples of 2 MiB."""
    if "emulated" not in request.node.name:
        pytest.skip("other programs may use the GPU too")
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_allocated.restype = ctypes.c_size_t
    session = attention_only_plan(window=window, size=64).session(device=device)
    before = emulator.cuda_emulator_allocated()

    def taken():
        return emulator.cuda_emulator_allocated() - before

    first = session.open()
    assert taken() <= 4 << 20
    streams = (160 << 20) // session.state_bytes
    ids = session.open(streams)
    # The newest 64 MiB may not be used yet.
    assert taken() <= 1.1 * streams * session.state_bytes + (64 << 20)
    # Streams are opened where others were closed.
    session.close(ids[::3])
    most = taken()
    again = session.open(len(ids[::3]))
    assert taken() == most
    session.close([*again, *np.delete(ids, np.s_[::3])])
    assert taken() <= 8 << 20  # One empty slab is kept.
    session.close(first)


def test_memory_that_is_full(device, request, random):
    """The streams that are open go on."""
    if "emulated" not in request.node.name:
        pytest.skip("filling a GPU's memory takes it from other programs")
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_set_room.argtypes = [ctypes.c_size_t]
    session = attention_only_plan(window=2000, size=64).session(device=device)  # 1 MB a stream
    try:
        emulator.cuda_emulator_set_room(64 << 20)
        ids = session.open(20)
        with pytest.raises(TooManyStreamsError, match="the GPU's memory is full.*: close streams"):
            session.open(100)
        x = random.standard_normal((1, 64)).astype(F)
        assert np.isfinite(session.step(x, streams=ids[-1])).all()
        before = session.get_state(ids[0])
        with pytest.raises(TooManyStreamsError, match="no memory for the .* bytes of a step"):
            session.steps(np.zeros((1, 10**6, 64), F), streams=ids[0])
        assert session.get_state(ids[0]) == before
        session.close(ids[:10])
        session.step(x, streams=session.open())
    finally:
        emulator.cuda_emulator_set_room(1 << 36)


def test_threads(session, on_cpu, x):
    """Steps, copies, opens and closes from several threads, against the CPU."""
    expected = on_cpu.steps(x)
    failures = []

    def run(number):
        try:
            for _ in range(2):
                stream = session.open()
                rows = []
                for t in range(x.shape[1]):
                    rows.append(session.step(x[number : number + 1, t], streams=stream)[0])
                    if t % 7 == number % 7:
                        copy = session.get_state(stream)
                        session.clean_state(stream)
                        session.set_state(copy, stream)
                np.testing.assert_allclose(rows, expected[number], **CLOSE)
                session.close(stream)
        except BaseException as error:
            failures.append(error)

    session.release_gil = True
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_pythons_lock_is_free_while_a_call_waits(session, request, x):
    """A Python function on the default stream could otherwise not end, and so neither the call."""
    if "emulated" not in request.node.name:
        pytest.skip("a GPU cannot tell whether the lock is held")
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_set_probe(
        ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p)
    )
    try:
        ids = session.open(2)
        session.step(x[:2, 0], streams=ids)
        session.step(OnEmulator(x[:2, 0]), streams=ids)
        session.steps(x[:2], streams=ids)
        session.set_state(session.get_state(ids), ids)
        assert emulator.cuda_emulator_probed() == 0
        session.release_gil = False
        session.step(x[:2, 0], streams=ids)
        assert emulator.cuda_emulator_probed() > 0
    finally:
        emulator.cuda_emulator_set_probe(None)


def test_first_steps_beside_a_thread_that_synchronizes(session, on_cpu, x, request):
    """A capture of a stream would fail, and so would the other thread."""
    if "emulated" in request.node.name:
        pytest.skip("the emulator has no captures: code that captures does not compile for it")
    torch = pytest.importorskip("torch")
    ends, failures = threading.Event(), []

    def synchronize():
        try:
            while not ends.is_set():
                torch.cuda.synchronize()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=synchronize)
    thread.start()
    try:
        for m in range(1, 9):  # Each has a graph of its own.
            np.testing.assert_allclose(session.step(x[:m, 0]), on_cpu.step(x[:m, 0]), **CLOSE)
    finally:
        ends.set()
        thread.join()
    assert not failures


def test_a_forked_process_is_refused(device):
    """In a process of its own, because this one has TensorFlow's threads."""
    program = """
import os, sys
sys.path[:0] = ["tests"]
import numpy as np
from plan_files import attention_plan
plan = attention_plan(np.random.default_rng(0), 6)
session = plan.session(device="cuda:0")
stream, x = session.open(), np.ones((1, 6), "float32")
before = session.step(x, streams=stream)
if os.fork() == 0:
    calls = [
        lambda: session.step(x, streams=stream),
        lambda: session.get_state(stream),
        lambda: plan.session().step(x),
    ]
    for call in calls:
        try:
            call()
            print("works")
        except ValueError as error:
            print(error)
    session.close(stream)
    del session
    sys.stdout.flush()
    os._exit(0)
os.wait()
assert session.position(stream) == 1
session.step(x, streams=stream)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(CORE.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused = "a session on a GPU works only in the process that made it"
    lines = done.stdout.splitlines()
    assert [line.startswith(refused) for line in lines] == [True, True, False]
    assert lines[2] == "works"


def test_other_gpus_are_left_alone(device, request):
    """In a process of its own, because a context stays for good."""
    if "emulated" not in request.node.name:
        pytest.skip("it needs two GPUs")
    program = """
import ctypes, os, sys
sys.path[:0] = ["tests"]
import numpy as np
from plan_files import attention_plan
plan = attention_plan(np.random.default_rng(0), 6)
session = plan.session(device="cuda:1")
emulator = ctypes.CDLL(os.environ["CONTINUAL_TRANSFORMERS_CUDA_LIBRARY"])

def use(session):
    ids, x = session.open(3), np.ones((3, 6), "float32")
    session.step(x, streams=ids)
    session.steps(x[:, None], streams=ids)
    session.set_state(session.get_state(ids), ids)
    session.profile(2)
    session.close(ids)

use(session)
del session
assert emulator.cuda_emulator_contexts() == 1 << 1
assert emulator.cuda_emulator_gpu() == 0
emulator.cuda_emulator_choose(0)
use(plan.session(device="cuda:1"))
assert emulator.cuda_emulator_gpu() == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(CORE.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.sanitizer
@pytest.mark.parametrize("features", [1, 12, 37])
def test_a_norm_before_dense_layers(device, random, features):
    """With few rows it is part of their launch, with many a launch of its own."""
    plan = normalized_plan(random, features)
    session, on_cpu = plan.session(device=device), plan.session()
    for m in (1, 3, 16, 17):
        x = (5 * random.standard_normal((m, features)) + 7).astype(F)
        got, expected = session.step(x), on_cpu.step(x)
        assert len(got) == len(expected) == 4
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], **CLOSE, err_msg=name)
    assert [row.op for row in session.profile(repeat=1)] == [
        "norm + dense + dense", "binary", "dense + activation"
    ]  # fmt: skip


def test_what_a_session_says(session, plan, device):
    assert session.device == device
    assert f"on {device}>" in repr(session)
    session.step(np.ones((2, FEATURES), F))
    memory = session.memory()
    assert memory.weights >= sum(array.nbytes for array in plan.tensors.values())
    assert memory.arenas > 0
    profile = session.profile(2, repeat=3)
    nodes = [node["name"] for node in plan.plan["nodes"]]
    assert sorted(" + ".join(row.name for row in profile).split(" + ")) == sorted(nodes)
    assert len(profile) < len(nodes)  # Dense layers are launched together.
    assert all(row.seconds > 0 for row in profile)
    again = pickle.loads(pickle.dumps(session))
    assert again.device == device


def test_a_session_frees_its_memory(device, request, plan, x):
    if "emulated" not in request.node.name:
        pytest.skip("other programs may use the GPU too")
    emulator = ctypes.CDLL(str(library("emulated")))
    emulator.cuda_emulator_allocated.restype = ctypes.c_size_t
    gc.collect()
    before = emulator.cuda_emulator_allocated()
    session = plan.session(device=device)
    session.steps(x)
    assert emulator.cuda_emulator_allocated() > before
    del session
    gc.collect()
    assert emulator.cuda_emulator_allocated() == before


def test_outputs_go_where_the_caller_wants(session, on_cpu, x):
    out = np.full((8, OUTPUTS), np.nan, F)
    assert session.step(x[:, 0], out=out) is out
    np.testing.assert_allclose(out, on_cpu.step(x[:, 0]), **CLOSE)


@pytest.mark.sanitizer
def test_arrays_on_the_gpu(session, on_cpu, x):
    ids, there = session.open(4), on_cpu.open(4)
    for t in range(6):
        expected = on_cpu.step(x[:4, t], streams=there)
        given, _ = to_gpu(x[:4, t])
        out, on_host = to_gpu(np.full((4, OUTPUTS), np.nan, F))
        if t % 3 == 0:  # Only the input.
            y = session.step(given, streams=ids)
            assert type(y) is np.ndarray
        elif t % 3 == 1:  # Only the output.
            assert session.step(x[:4, t], streams=ids, out=out) is out
            y = on_host()
        else:
            assert session.step(given, streams=ids, out=out) is out
            y = on_host()
        np.testing.assert_allclose(y, expected, **CLOSE)
    expected = on_cpu.steps(x[:4, 6:], streams=there)
    given, _ = to_gpu(x[:4, 6:13])
    out, on_host = to_gpu(np.zeros((4, 7, OUTPUTS), F))
    session.steps(given, streams=ids, out=out)
    np.testing.assert_allclose(on_host(), expected[:, :7], **CLOSE)
    y = session.steps(to_gpu(x[:4, 13:])[0], streams=ids)
    np.testing.assert_allclose(y, expected[:, 7:], **CLOSE)


def test_arrays_on_the_gpu_and_on_the_host_in_one_step(device, random):
    plan = two_ports_plan(random)
    session, on_cpu = plan.session(device=device), plan.session()
    for t in range(5):
        step = [random.standard_normal((2, size)).astype(F) for size in (3, 2)]
        expected = on_cpu.step(step)
        given = [to_gpu(step[0])[0], step[1]] if t % 2 else [step[0], to_gpu(step[1])[0]]
        for y, x in zip(session.step(given), expected, strict=True):
            np.testing.assert_allclose(y, x, **CLOSE)


def test_arrays_on_a_gpu_that_do_not_fit(session, on_cpu, device, request, x):
    if "emulated" not in request.node.name:
        pytest.skip("the same checks for every GPU")
    a = session.open()
    row = x[:1, 0]
    there = OnEmulator(row)
    refused = [
        (OnEmulator(x[:2, 0]), ValueError, "streams names 1 stream, but x has 2 rows"),
        (OnEmulator(row[:, :-1]), ValueError, r"shape \(1, 5\)"),
        (OnEmulator(row.astype("float64")), ValueError, "dtype float64"),
        (OnEmulator(row.astype("int16")), ValueError, "a dtype or a number of axes that no input"),
        (OnEmulator(row, gpu=1), ValueError, "is on GPU 1. Expected an array on the session's GPU"),
    ]
    transposed = OnEmulator(np.ones((FEATURES, 2), F))
    transposed.view = transposed.view.T
    refused.append((transposed, ValueError, "on the GPU and not C-contiguous"))
    for given, error, message in refused:
        with pytest.raises(error, match=message):
            session.step(given, streams=a)
    with pytest.raises(ValueError, match=r"shape \(1, 4\). Expected \(1, 5\)"):
        session.step(row, streams=a, out=OnEmulator(np.zeros((1, OUTPUTS - 1), F)))
    with pytest.raises(TypeError, match="of type OnEmulator. Expected a NumPy array"):
        on_cpu.step(there)
    assert session.position(a) == 0


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="this NumPy has no DLPack 1.0"
)
def test_read_only_arrays_on_a_gpu(session, on_cpu, request, x):
    """DLPack 1.0 says what is read-only. Older libraries do not know `max_version`."""
    if "emulated" not in request.node.name:
        pytest.skip("the same code for every GPU")
    a, there = session.open(), on_cpu.open()
    row = x[:1, 0]
    out = VersionedOnEmulator(np.zeros((1, OUTPUTS), F), read_only=True)
    with pytest.raises(ValueError, match="out is read-only. Expected an array that can be written"):
        session.step(row, streams=a, out=out)
    assert (out.on_host() == 0).all()
    assert session.position(a) == 0
    later = VersionedOnEmulator(row, read_only=False, version=(2, 0))
    with pytest.raises(ValueError, match="by version 2 of DLPack, although it was asked for ver"):
        session.step(later, streams=a)
    out = VersionedOnEmulator(np.zeros((1, OUTPUTS), F), read_only=False)
    session.step(VersionedOnEmulator(row, read_only=True), streams=a, out=out)
    np.testing.assert_allclose(out.on_host(), on_cpu.step(row, streams=there), **CLOSE)


def test_indices_must_be_on_the_host(device, random):
    session = many_ports_plan(random)[0].session(device=device)
    words, _ = to_gpu(np.ones(1, np.int32))
    with pytest.raises(TypeError, match="Expected a NumPy array"):
        session.step({"sound": np.ones((1, 3), F), "word": words})
