"""`NodeServer` without Ray: its server runs, and is started again."""

import os
import signal
import time

import pytest
from guards import access, guards, make_certificates, tls_files

import continual_transformers_tf as ct
from continual_transformers_tf.serving import node_server
from continual_transformers_tf.serving.node_server import NodeServer
from continual_transformers_tf.serving.operator_api import OperatorApi

FEATURES = 6
PORTS = ("--grpc-port", "0", "--http-port", "0")


@pytest.fixture
def start_node(tmp_path, model_file):
    """Return a function that makes the `NodeServer` of a folder; all are stopped after the test."""
    made = []

    def start(*options, **more):
        arguments = ("n1", "127.0.0.1", {"small": model_file}, [*PORTS, *map(str, options)])
        made.append(NodeServer(tmp_path / "node", *arguments, **more))
        return made[-1]

    yield start
    for node in made:
        node.stop()


def wait_for(node, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(state := node.state()):
        assert time.monotonic() < end, state
        time.sleep(0.02)
    return state


@pytest.mark.parametrize("guarded", [False, True])
def test_a_server_that_dies_or_hangs_is_started_again(
    monkeypatch, start_node, certificates, samples, guarded
):
    monkeypatch.setattr(node_server, "LOOK_SECONDS", 0.2)
    tls = tls_files(certificates) if guarded else None
    node = start_node(*(guards(certificates) if guarded else ()), tls=tls)
    state = wait_for(node, lambda state: state.address)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        time.sleep(1)  # It is looked at, and stays.
        assert node.state().pid == state.pid
        os.kill(state.pid, number)
        state = wait_for(node, lambda now, old=state.pid: now.address and now.pid != old)
    assert state.problem == ""
    api = OperatorApi(state.address.http, state.token, 10, tls and tls.context())
    assert api.models() == ["small"]
    api.close()
    shown = access(certificates) if guarded else {}
    with (
        ct.serving.Client(state.address.grpc, timeout=1, **shown) as client,
        pytest.raises(ct.serving.ServingError) as error,
    ):
        client.open("a").step(samples(FEATURES))
    assert error.value.reason == "wrong_server"  # Nobody has given it shards.


def test_a_server_whose_certificate_is_not_accepted_runs_and_has_a_problem(
    monkeypatch, start_node, certificates, tmp_path
):
    monkeypatch.setattr(node_server, "LOOK_SECONDS", 0.2)
    make_certificates(tmp_path)  # Of another authority.
    other = tls_files(certificates)._replace(ca=str(tmp_path / "ca.pem"))
    node = start_node(*guards(certificates), tls=other)
    state = wait_for(node, lambda state: state.problem)
    assert "certificate verify failed" in state.problem
    time.sleep(0.2 * (node_server.HANGS_AFTER + 2))
    assert node.state() == state
    missing = other._replace(ca=str(tmp_path / "missing.pem"))
    with pytest.raises(FileNotFoundError):
        start_node(tls=missing)
