"""`NodeServer` without Ray: its server runs, and is started again."""

import os
import signal
import subprocess
import threading
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
    """Return a function that makes the `NodeServer` of a folder; they end after the test."""
    made = []

    def start(*options, **more):
        arguments = ("n1", "127.0.0.1", {"small": model_file}, [*PORTS, *map(str, options)])
        made.append(NodeServer(tmp_path / "node", *arguments, **more))
        return made[-1]

    yield start
    for node in made:
        if not node._ending.is_set():  # Else another one has its server.
            node.stop()


def wait_for(node, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(state := node.state()):
        assert time.monotonic() < end, state
        time.sleep(0.02)
    return state


@pytest.mark.parametrize("guarded", [pytest.param(False, marks=pytest.mark.slow), True])
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


def test_a_server_that_cannot_be_started_is_tried_again(start_node, tmp_path):
    log = tmp_path / "node" / "server.log"
    log.mkdir(parents=True)
    node = start_node()
    assert "IsADirectoryError" in wait_for(node, lambda state: state.problem).problem
    log.rmdir()
    assert wait_for(node, lambda state: state.address).problem == ""


def test_a_process_that_is_not_written_down_is_a_problem(monkeypatch, start_node):
    run = subprocess.run
    monkeypatch.setattr(node_server, "PID_SECONDS", 0.1)
    monkeypatch.setattr(node_server.subprocess, "run", lambda *_, **__: None)
    node = start_node()
    assert "pid was not written within 0.1 seconds" in wait_for(node, lambda s: s.problem).problem
    monkeypatch.setattr(node_server, "PID_SECONDS", 10)
    monkeypatch.setattr(node_server.subprocess, "run", run)
    assert wait_for(node, lambda state: state.address).problem == ""


def test_a_server_whose_process_was_not_written_down_yet_is_ended(monkeypatch, start_node):
    # The shell is slow: stop() comes before it has written the process.
    run = subprocess.run
    begun, asked = threading.Event(), threading.Event()

    def slow(command, **options):
        begun.set()
        asked.wait(60)
        return run(command, **options)

    monkeypatch.setattr(node_server.subprocess, "run", slow)
    node = start_node()
    assert begun.wait(60)
    stopping = threading.Thread(target=node.stop)
    stopping.start()
    while not node._ending.is_set():
        time.sleep(0.002)
    asked.set()
    stopping.join()
    assert node_server.running_server(node._folder) is None


def test_a_token_that_others_may_know_is_replaced(start_node, tmp_path):
    node = start_node()
    first = wait_for(node, lambda state: state.address)
    node.leave()
    (tmp_path / "node" / "operator-token").chmod(0o644)
    node = start_node()
    # The server knows the new one only when it is started again.
    second = wait_for(node, lambda state: state.address)
    assert second.token != first.token
    assert second.pid != first.pid
    api = OperatorApi(second.address.http, second.token, 10)
    assert api.foreign_streams("small") == []
    api.close()
    node.leave()
    node = start_node()
    third = wait_for(node, lambda state: state.address)
    assert (third.token, third.pid) == (second.token, second.pid)


def test_a_server_whose_model_file_has_gone_is_not_ended(start_node, tmp_path, model_file):
    node = start_node()
    pid = wait_for(node, lambda state: state.address).pid
    node.leave()
    away = model_file.with_suffix(".away")
    model_file.rename(away)
    try:
        node = start_node()
        assert "FileNotFoundError" in wait_for(node, lambda state: state.problem).problem
        assert node_server.running_server(tmp_path / "node") == pid
    finally:
        away.rename(model_file)
    assert wait_for(node, lambda state: state.address).pid == pid
