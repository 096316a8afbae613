"""One session in several threads, and in several processes."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from plan_files import attention_plan, many_ports_plan

F = np.float32
FEATURES = 6

RELEASE = [None, True, False]


@pytest.fixture
def plan(random):
    return attention_plan(random, FEATURES)


@pytest.fixture(params=RELEASE, ids=["by estimate", "released", "kept"])
def session(request, plan):
    session = plan.session()
    session.release_gil = request.param
    return session


@pytest.fixture(autouse=True)
def switching():
    """Let threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(*functions):
    """Run functions at once, and raise what they raise."""
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.result(timeout=300) for future in futures]


def test_threads_on_their_own_streams(session, random):
    x = random.standard_normal((4, 300, FEATURES)).astype(F)
    expected = []
    for steps in x:
        a = session.open()
        expected.append([session.step(step[None], streams=a)[0] for step in steps])
        session.close(a)

    def stream(i):
        a = session.open()
        outputs = [session.step(step[None], streams=a)[0] for step in x[i]]
        session.close(a)
        return outputs

    got = in_threads(*(lambda i=i: stream(i) for i in range(4)))
    np.testing.assert_array_equal(got, expected)


def test_threads_on_one_stream(session):
    """Steps of one stream run one after the other: none is lost or torn."""
    x = np.arange(FEATURES, dtype=F)[None]
    alone, a = session.open(2)
    outputs = {session.step(x, streams=alone).tobytes() for _ in range(4 * 500)}

    def stream():
        return {session.step(x, streams=a).tobytes() for _ in range(500)}

    got = in_threads(stream, stream, stream, stream)
    assert session.position(a) == 4 * 500
    assert set().union(*got) == outputs
    assert session.get_state(a) == session.get_state(alone)


def test_threads_that_name_the_same_streams_in_other_orders(session, random):
    """No two calls deadlock."""
    ids = session.open(6)
    x = random.standard_normal((6, FEATURES)).astype(F)

    def stream(seed):
        order = np.random.default_rng(seed)
        for _ in range(300):
            chosen = order.permutation(6)[: order.integers(1, 7)]
            session.step(x[: len(chosen)], streams=ids[chosen])
        return None

    in_threads(*(lambda seed=seed: stream(seed) for seed in range(4)))


def test_copies_are_never_torn(session, random):
    """While a stream steps, other threads copy, open, close and clean streams."""
    x = random.standard_normal((400, 1, FEATURES)).astype(F)
    alone = session.open()
    states = [session.get_state(alone)[0]]
    for step in x:
        session.step(step, streams=alone)
        states.append(session.get_state(alone)[0])
    known = {state: position for position, state in enumerate(states)}
    a = session.open()
    done = threading.Event()

    def stream():
        try:
            for step in x:
                session.step(step, streams=a)
        finally:
            done.set()

    def copy():
        seen = [0]
        while not done.is_set():
            (state,) = session.get_state(a)
            seen.append(known[state])
            assert seen[-1] >= seen[-2]
            position = session.position(a)
            assert position >= seen[-1]
        return len(set(seen))

    def come_and_go():
        other = np.random.default_rng(1)
        while not done.is_set():
            ids = session.open(int(other.integers(1, 20)))
            session.step(np.zeros((len(ids), FEATURES), F), streams=ids)
            session.clean_state(ids[:1])
            assert session.position(ids).tolist() == [0] + [1] * (len(ids) - 1)
            session.set_state([states[7]], ids[:1])
            assert session.get_state(ids[0]) == [states[7]]
            session.close(ids)

    in_threads(stream, copy, come_and_go, come_and_go)
    assert session.get_state(a) == [states[-1]]
    assert session.open_streams == 2


def test_closing_while_others_step(session):
    """A step of a closed stream is refused; a step in progress ends first."""
    x = np.ones((2, FEATURES), F)
    for _ in range(50):
        keep, gone = session.open(2)

        def stream(keep=keep, gone=gone):
            taken = 0
            try:
                while True:
                    session.step(x, streams=[keep, gone])
                    taken += 1
            except ValueError:
                return taken

        def close(gone=gone):
            session.close(gone)

        taken, _ = in_threads(stream, close)
        assert session.position(keep) == taken
        session.close(keep)


def test_weights_change_between_steps(session, random, tmp_path):
    x = random.standard_normal((1, FEATURES)).astype(F)
    files = [attention_plan(random, FEATURES).write(tmp_path, f"{i}") for i in range(2)]
    outputs = set()
    for file in files:
        session.load_weights(file)
        outputs.add(session.step(x, streams=session.open()).tobytes())
    assert len(outputs) == 2
    done = threading.Event()

    def stream():
        try:
            return {session.step(x, streams=session.open()).tobytes() for _ in range(1000)}
        finally:
            done.set()

    def load():
        while not done.is_set():
            for file in files:
                session.load_weights(file)

    got, _ = in_threads(stream, load)
    assert got <= outputs


def test_other_threads_run_during_a_long_step(plan):
    """Other threads see the step's first outputs before it writes the last ones."""
    session = plan.session()
    assert session.release_gil is None
    x = np.zeros((1, 50_000, FEATURES), F)
    out = np.full((1, 50_000, 5), np.nan, F)
    seen = []
    done = threading.Event()

    def watch():
        while not done.is_set():
            seen.append((np.isnan(out[0, 0, 0]), np.isnan(out[0, -1, -1])))

    def stream():
        a = session.open()
        try:
            for _ in range(20):
                out.fill(np.nan)
                session.steps(x, streams=a, out=out)
                if (False, True) in seen:
                    return True
            return False
        finally:
            done.set()

    found, _ = in_threads(stream, watch)
    assert found


@pytest.mark.parametrize("call", ["step", "get_state", "clean_state", "close"])
def test_other_threads_run_while_one_waits_for_a_stream(plan, call):
    """They run even if the waiting call would otherwise keep Python's global lock."""
    session = plan.session()
    session.release_gil = False
    count = 200_000
    x = np.zeros((1, count, FEATURES), F)
    out = np.full((1, count, 5), np.nan, F)
    a = session.open()
    begun, ended = threading.Event(), threading.Event()
    seen = []

    def stream():
        session.release_gil = True
        session.steps(x, streams=a, out=out)

    def wait():
        while np.isnan(out[0, 0, 0]):
            pass
        session.release_gil = False
        begun.set()
        try:
            if call == "step":
                session.step(x[:, 0], streams=a)
            else:
                getattr(session, call)(a)
        finally:
            ended.set()

    def watch():
        begun.wait()
        while not ended.is_set():
            seen.append(int(np.isnan(out[0, ::1000, 0]).argmax()))

    in_threads(stream, wait, watch)
    # The other thread watched the long step until after its middle.
    assert max(seen) > count // 1000 // 2


def test_indices_cannot_change_during_a_step(random):
    """Another thread writes bad indices during a long step: it refuses or never sees them."""
    plan, table = many_ports_plan(random)
    session = plan.session()
    session.release_gil = True
    words = np.zeros((1, 20_000), np.int32)
    x = {"sound": np.zeros((1, 20_000, 3), F), "word": words}
    done = threading.Event()

    def change():
        while not done.is_set():
            words[0, -1] = 2**31 - 1
            words[0, -1] = 0

    def stream():
        a = session.open()
        outcomes = set()
        try:
            for _ in range(100):
                try:
                    y = session.steps(x, streams=a)
                    np.testing.assert_array_equal(y["sum"][0, -1], table[0])
                    outcomes.add("taken")
                except ValueError:
                    outcomes.add("refused")
        finally:
            done.set()
        return outcomes

    outcomes, _ = in_threads(stream, change)
    assert outcomes <= {"taken", "refused"}


FORK = """
    import os, sys, threading
    import numpy as np
    from continual_transformers_tf.session import Session

    path, threads = sys.argv[1], int(sys.argv[2])
    session = Session.load(path, threads=threads)
    x = np.random.default_rng(3).standard_normal((200, 64, 6)).astype(np.float32)
    ids = session.open(64)
    expected = [session.step(step, streams=ids) for step in x]
    session.clean_state(ids)
    for step in x[:50]:
        session.step(step, streams=ids)

    def go_on(since):
        for t in range(since, 200):
            y = session.step(x[t], streams=ids)
            assert np.array_equal(y, expected[t]), t
        more = session.open(3)
        session.step(x[0, :3], streams=more)
        session.close(more)

    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            go_on(50)
            os._exit(0)
        children.append(child)
    # The parent goes its own way.
    go_on(50)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    # A fork while other threads step: the child can use what they do not hold.
    stop = threading.Event()
    busy = session.open(2)

    def stream(a):
        while not stop.is_set():
            session.step(x[0, :1], streams=a)

    session.release_gil = True
    session.clean_state(ids)
    streaming = [threading.Thread(target=stream, args=(int(a),)) for a in busy]
    for thread in streaming:
        thread.start()
    for _ in range(10):
        child = os.fork()
        if not child:
            go_on(0)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in streaming:
        thread.join()
    print("done")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_fork(plan, tmp_path, threads):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(FORK),
            plan.write(tmp_path),
            str(threads),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_a_session_ends_while_others_live(plan):
    x = np.ones((1, FEATURES), F)
    first, second = plan.session(threads=2), plan.session(threads=2)
    a, b = first.open(), second.open()
    y = first.step(x, streams=a)
    del first
    np.testing.assert_array_equal(second.step(x, streams=b), y)
