"""The program with a folder for snapshots that it cannot write to."""

import resource
import stat
import time

import numpy as np

import continual_transformers_tf as ct

FEATURES = 6


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_files_that_may_not_grow_are_a_line_in_the_log(start_server, model_file, tmp_path):
    """The signal of such a write ends a process that does not ignore it. Steps go on."""
    state = ["--state-dir", tmp_path / "state", "--snapshot-every", "0.05"]
    server = start_server(model_file, *state)
    session = ct.Session.load(model_file)
    xs = np.random.default_rng(0).normal(size=(20, FEATURES)).astype("float32")
    with ct.serving.Client(server.grpc_url) as client:
        stream = client.open("a")
        for x in xs[:10]:
            stream.step(x)
            session.step(x[None])
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, -1))
        y = stream.step(xs[10])
        wait_for(lambda: server.event("snapshot_failed"))
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
        wait_for(lambda: server.event("snapshots_written_again"))
        expected = session.step(xs[10:11])[0]
        np.testing.assert_allclose(y, expected, atol=1e-5)
    assert server.stop() == 0
    with ct.serving.Client(start_server(model_file, *state).grpc_url) as client:
        y = client.open("a", next_step=11).step(xs[11])
        np.testing.assert_allclose(y, session.step(xs[11:12])[0], atol=1e-5)


def test_the_states_of_streams_are_for_their_user_only(start_server, model_file, tmp_path):
    server = start_server(model_file, "--state-dir", tmp_path / "state")
    with ct.serving.Client(server.grpc_url) as client:
        client.open("a").step(np.zeros(FEATURES, "float32"))
    assert server.stop() == 0
    paths = [tmp_path / "state", *(tmp_path / "state").iterdir()]
    assert len(paths) > 2
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
