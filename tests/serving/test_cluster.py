"""`Cluster` with real servers on loopback: they join, are drained, die and hang under load."""

import re
import signal

import numpy as np
import pytest
import tritonclient.grpc as triton
from guards import access, guards, make_certificates, tls_files
from kserve import infer
from load_on_cluster import LoadOnCluster
from loopback_cluster import LoopbackCluster, loopback_servers
from tritonclient.utils import InferenceServerException

import continual_transformers_tf as ct
from continual_transformers_tf.serving.cluster import Cluster

FEATURES = 6


@pytest.fixture(params=[False, True], ids=["no journal", "journal"])
def with_journal(request):
    return request.param


@pytest.fixture
def servers(start_sharded, with_journal, request):
    journal = request.getfixturevalue("redis") if with_journal else None
    with loopback_servers(start_sharded, ("n1", "n2"), journal) as made:
        yield made


@pytest.fixture
def load(servers, model_file):
    made = LoadOnCluster(servers.urls(), model_file)
    yield made
    made.stop()


def check_places(servers, load):
    """Every stream is on its own server and nowhere else."""
    load.stop()
    streams = [*load.together, *(stream.name for stream in load.alone)]
    counts = dict.fromkeys(servers.members, 0)
    for name in streams:
        counts[servers.cluster.table.owner(name)] += 1
    for name in servers.members:
        api = servers.api(name)
        assert api.open_streams() == counts[name]
        assert api.foreign_streams("small") == []


def test_a_server_joins_and_another_is_drained(servers, load):
    load.wait_for(3)
    assert servers.shares() == {"n1": 128, "n2": 128}
    first = servers.cluster.table.epoch
    servers.start("n3")
    servers.settle()
    assert sorted(servers.shares().values()) == [85, 85, 86]
    load.wait_for(3)
    servers.leaving.add("n1")
    servers.settle()
    assert servers.shares() == {"n1": 0, "n2": 128, "n3": 128}
    assert servers.cluster.has_nothing("n1")
    assert not servers.cluster.has_nothing("n2")
    load.wait_for(3)
    check_places(servers, load)
    # No more than 16 shards were away at a time.
    moves = [e for e in servers.events if e["event"] == "table" and e["epoch"] > first]
    assert max(move["moved"] for move in moves) == 16
    assert servers.running["n1"].stop() == 0
    del servers.members["n1"]
    servers.settle(until=lambda: set(servers.cluster.table.servers) == {"n2", "n3"})


@pytest.mark.parametrize("with_journal", [True], indirect=True)
def test_a_server_is_killed(servers, load):
    servers.start("n3")
    servers.settle()
    load.wait_for(7)  # More than the receptive field.
    servers.running["n3"].kill()
    servers.settle(until=lambda: servers.shares() == {"n1": 128, "n2": 128})
    load.wait_for(3)
    servers.start("n3")  # As it does when it is started again later.
    servers.settle(until=lambda: len(servers.shares()) == 3)
    load.wait_for(3)
    check_places(servers, load)


@pytest.mark.parametrize("with_journal", [True], indirect=True)
def test_a_server_that_is_started_again_at_once_keeps_its_shards(servers, load):
    load.wait_for(7)
    before = servers.cluster.table
    servers.running["n2"].kill()
    servers.start("n2")
    servers.settle()
    assert servers.cluster.table.shards == before.shards
    load.wait_for(3)
    check_places(servers, load)


@pytest.mark.parametrize("with_journal", [True], indirect=True)
def test_a_service_that_ended_starts_again_on_its_journal(servers, samples, session):
    names = [f"s{i}" for i in range(20)]
    ids = session.open(len(names))

    def step(t):
        x = samples(len(names), FEATURES)
        with ct.serving.Client(servers.urls(), timeout=30) as client:
            y = client.step(x, names, [t] * len(names), start=t == 0)
        np.testing.assert_allclose(y, session.step(x, streams=ids), atol=1e-5)

    step(0)
    servers.leaving.add("n1")
    servers.settle()  # In several epochs.
    step(1)
    before = servers.cluster.table
    servers.leaving.clear()
    for name in ("n1", "n2"):
        servers.running[name].kill()
        servers.start(name)
    servers.new_controller()
    servers.settle()
    assert servers.cluster.table.epoch > before.epoch
    step(2)


@pytest.mark.parametrize("with_journal", [False], indirect=True)
def test_without_a_journal_clients_learn_which_streams_are_lost(servers, model_file, samples):
    load = LoadOnCluster(servers.urls(), model_file, together=0)
    with ct.serving.Client(servers.urls(), timeout=30, attempt_timeout=1) as client:
        names = [f"s{i}" for i in range(20)]
        table = servers.cluster.table
        lost = {name for name in names if table.owner(name) == "n2"}
        client.steps(samples(20, 3, FEATURES), names, [0] * 20, start=True)
        load.wait_for(7)
        servers.running["n2"].kill()
        servers.settle(until=lambda: servers.shares() == {"n1": 256})
        load.wait_for(3)  # These have kept their inputs, and send them again.
        load.stop()
        with pytest.raises(ct.serving.ServingError) as error:
            client.step(samples(20, FEATURES), names, [3] * 20)
        assert error.value.reason == "out_of_step"
        assert error.value.expected == dict.fromkeys(lost, 0)
        assert 0 < len(lost) < 20


def step_without_a_table(url, name, step, x, **parameters):
    """Send a step as a client does that knows nothing of shards."""
    with triton.InferenceServerClient(url) as client:
        return infer(
            client, x[None], sequence_id=name, step=step, parameters=parameters, client_timeout=10
        )


@pytest.mark.slow
def test_a_server_that_hung_serves_nothing_stale(servers, with_journal, model_file, samples):
    # Without a journal, only streams whose inputs the client has kept go on.
    load = LoadOnCluster(servers.urls(), model_file, together=24 if with_journal else 0)
    load.wait_for(7)
    before = servers.cluster.table
    stream = next(s for s in load.alone if before.owner(s.name) == "n2")
    servers.send("n2", signal.SIGSTOP)
    servers.settle(until=lambda: servers.shares() == {"n1": 256})
    load.wait_for(3)
    load.stop()
    servers.send("n2", signal.SIGCONT)
    url = servers.members["n2"].address.grpc
    # It does not know yet that it has lost its shards.
    if with_journal:
        # A step that fits its old state. It cannot write it.
        with pytest.raises(InferenceServerException, match="expects step") as error:
            step_without_a_table(url, stream.name, stream.next_step, samples(FEATURES))
        expected = int(re.search(r"expects step (\d+)", str(error.value))[1])
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            step_without_a_table(url, stream.name, expected, samples(FEATURES))
    else:
        # A client that knows a newer table says so.
        epoch = servers.cluster.table.epoch
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            step_without_a_table(
                url, stream.name, stream.next_step, samples(FEATURES), shard_epoch=epoch
            )
    servers.settle(until=lambda: servers.shares() == {"n1": 128, "n2": 128})
    # Now it does, and its streams of then are gone.
    for name in servers.members:
        assert servers.api(name).foreign_streams("small") == []
    elsewhere = next(f"x{i}" for i in range(999) if servers.cluster.table.owner(f"x{i}") == "n1")
    with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
        step_without_a_table(url, elsewhere, 0, samples(FEATURES))


@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_a_new_controller_ends_the_move_that_another_began(servers, load, monkeypatch, interrupted):
    load.wait_for(7)
    servers.start("n3")
    calls = []

    def put(names, put=servers.cluster._put):
        calls.append(names)
        if len([names for names in calls if names]) > 2 * interrupted:
            raise KeyboardInterrupt
        return put(names)

    monkeypatch.setattr(servers.cluster, "_put", put)
    with pytest.raises(KeyboardInterrupt):
        servers.settle()
    epoch = servers.cluster.table.epoch
    servers.new_controller()
    servers.settle()
    assert servers.cluster.table.epoch > epoch
    assert sorted(servers.shares().values()) == [85, 85, 86]
    load.wait_for(3)
    check_places(servers, load)


def test_two_controllers_that_made_the_same_epoch(servers, load):
    load.wait_for(3)
    other = Cluster(journal=servers.cluster._journal, log=servers._log)
    servers.clusters.append(other)
    other.turn(servers.members)
    assert other.table == servers.cluster.table
    # Each gives the next table to one server.
    for cluster, name, moves in ((servers.cluster, "n1", 3), (other, "n2", 5)):
        table = cluster.table.next(cluster.table.servers, {"n1"}, moves, now=0)
        servers.api(name).put_table(table, name, 10)
        cluster.table = table
    servers.settle()
    assert servers.shares() == {"n1": 128, "n2": 128}
    assert any(event["event"] == "table_repaired" for event in servers.events)
    for name in servers.members:
        assert servers.api(name).view().table == servers.cluster.table
    load.wait_for(3)
    check_places(servers, load)


def test_servers_with_certificates_and_a_token(
    start_sharded, with_journal, request, certificates, model_file
):
    journal = request.getfixturevalue("redis") if with_journal else None
    options = {"arguments": guards(certificates), "tls": tls_files(certificates)}
    with loopback_servers(start_sharded, ("n1", "n2"), journal, **options) as servers:
        load = LoadOnCluster(servers.urls(), model_file, **access(certificates))
        try:
            load.wait_for(7)
            servers.start("n3")
            servers.settle()
            assert sorted(servers.shares().values()) == [85, 85, 86]
            load.wait_for(3)
            servers.leaving.add("n1")
            servers.settle()
            assert servers.shares()["n1"] == 0
            load.wait_for(3)
            servers.new_controller()
            servers.settle()
            check_places(servers, load)
        finally:
            load.stop()


def test_a_server_whose_certificate_is_not_accepted_gets_no_shards(
    start_sharded, certificates, tmp_path
):
    make_certificates(tmp_path)  # Of another authority.
    other = tls_files(certificates)._replace(ca=str(tmp_path / "ca.pem"))
    servers = LoopbackCluster(start_sharded, arguments=guards(certificates), tls=other)
    servers.start("n1")
    try:
        for _ in range(3):
            servers.turn()
        (lost,) = [event for event in servers.events if event["event"] == "server_lost"]
        assert "certificate verify failed" in lost["reason"]
        assert servers.cluster.table.epoch == 0
        # It is alive, and not to be killed.
        assert servers.api("n1").live()
        assert "certificate verify failed" in servers.api("n1").trouble()
    finally:
        servers.close()


def test_streams_keep_their_names_when_they_move(servers, samples, session):
    names = ["a b/c?d=1", "ä", "%41", "x" * 256]
    ids = session.open(len(names))
    with ct.serving.Client(servers.urls()) as client:
        for t in range(4):
            x = samples(len(names), FEATURES)
            y = client.step(x, names, [t] * len(names), start=t == 0)
            np.testing.assert_allclose(y, session.step(x, streams=ids), atol=1e-5)
            if t < 2:
                servers.leaving = {f"n{t + 1}"}
                servers.settle()
                assert servers.shares()[f"n{t + 1}"] == 0
