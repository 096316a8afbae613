"""HAProxy in front of several servers: each call reaches the server that has the shard."""

import socket
import time

import numpy as np
import pytest
import tritonclient.grpc as triton
from kserve import infer
from loopback_cluster import loopback_servers
from ports import free_port
from tritonclient.utils import InferenceServerException

from continual_transformers_tf.serving import processes
from continual_transformers_tf.serving.haproxy import Haproxy
from continual_transformers_tf.serving.shards import shard_of

FEATURES = 6


@pytest.fixture
def servers(start_sharded, redis):
    with loopback_servers(start_sharded, ("n1", "n2"), redis) as made:
        yield made


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def proxy(servers, tmp_path, port):
    if not Haproxy.program():
        pytest.skip("there is no haproxy on PATH")
    made = Haproxy(tmp_path / "proxy", "127.0.0.1", port)
    made.set_table(servers.cluster.table)
    yield made
    made.stop()


@pytest.fixture
def client(proxy):
    with triton.InferenceServerClient(proxy.url) as made:
        yield made


def refused(servers):
    """Return how many requests went to a wrong server."""
    total = 0
    for name in servers.members:
        text = servers.api(name)._call("GET", "/metrics").decode()
        (line,) = [s for s in text.splitlines() if 'reason="wrong_server"' in s and s[0] != "#"]
        total += float(line.split()[-1])
    return total


def names_of(random, count):
    """Return names of all kinds that a header may have."""
    letters = [chr(i) for i in range(33, 127)]
    return ["".join(random.choice(letters, size=random.integers(1, 40))) for _ in range(count)]


def test_calls_go_to_the_server_of_their_stream(servers, client, samples, session):
    names = names_of(np.random.default_rng(1), 300)
    for name in names:
        infer(client, samples(1, FEATURES), sequence_id=name, headers={"stream-id": name})
    assert refused(servers) == 0  # So HAProxy's shard of each name is ours.
    counts = servers.cluster.open_streams()
    for server in servers.members:
        assert counts[server] == sum(servers.cluster.table.owner(name) == server for name in names)
    one = session.open()
    for t in range(7):
        x = samples(1, FEATURES)
        headers = {"shard": str(shard_of("ä"))}
        y = infer(client, x, sequence_id="ä", step=t, headers=headers)
        np.testing.assert_allclose(y, session.step(x, streams=[one]), atol=1e-5)
    assert refused(servers) == 0


def test_a_call_without_a_key_reaches_any_server(servers, client, samples):
    said = set()
    for name in names_of(np.random.default_rng(2), 20):
        try:
            infer(client, samples(1, FEATURES), sequence_id=name)
        except InferenceServerException as error:
            said.add(error.status())
    assert said == {"StatusCode.UNAVAILABLE"}
    assert 0 < refused(servers) < 20


@pytest.mark.slow
def test_streams_go_on_when_servers_join_leave_and_die(servers, proxy, client, samples, session):
    names = [f"s{i}" for i in range(40)]
    ids = session.open(len(names))
    taken = 0

    def step():
        nonlocal taken
        x = samples(len(names), FEATURES)
        expected = session.step(x, streams=ids)
        for i, name in enumerate(names):
            # A client that sends a step again when it was not taken.
            for _ in range(200):
                try:
                    y = infer(
                        client,
                        x[i : i + 1],
                        sequence_id=name,
                        step=taken,
                        headers={"stream-id": name},
                        client_timeout=5,
                    )
                    break
                except InferenceServerException as error:
                    if error.status() != "StatusCode.UNAVAILABLE":
                        raise
                    time.sleep(0.05)
            np.testing.assert_allclose(y, expected[i : i + 1], atol=1e-5)
        taken += 1

    def settle(*names):
        def balanced():
            owners = set(servers.cluster.table.shards)
            return owners == set(names) and servers.shares().keys() >= owners

        servers.settle(until=balanced)
        proxy.set_table(servers.cluster.table)

    for _ in range(6):
        step()
    servers.start("n3")
    settle("n1", "n2", "n3")
    step()
    servers.leaving.add("n1")
    settle("n2", "n3")
    before = refused(servers)
    step()
    assert refused(servers) == before
    servers.running["n2"].kill()
    servers.leaving.clear()
    settle("n1", "n3")
    step()
    servers.start("n2")  # At another port.
    settle("n1", "n2", "n3")
    step()


def test_a_proxy_is_adopted(servers, proxy, client, tmp_path, port, samples):
    pid = proxy._pid()
    again = Haproxy(tmp_path / "proxy", "127.0.0.1", port)
    assert again._pid() == pid
    with pytest.raises(InferenceServerException):
        infer(client, samples(1, FEATURES), sequence_id="a", headers={"stream-id": "a"})
    again.set_table(servers.cluster.table)
    infer(client, samples(1, FEATURES), sequence_id="a", headers={"stream-id": "a"})
    # With another port it is another one.
    moved = Haproxy(tmp_path / "proxy", "127.0.0.1", free_port())
    assert moved._pid() != pid
    assert not processes.runs_with(pid, tmp_path / "proxy" / "haproxy.cfg")
    moved.stop()
    assert moved._pid() is None
    moved.stop()


def test_a_proxy_that_cannot_start_says_why(tmp_path):
    if not Haproxy.program():
        pytest.skip("there is no haproxy on PATH")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="HAProxy did not start: .*annot bind"):
            Haproxy(tmp_path, "127.0.0.1", taken.getsockname()[1])
