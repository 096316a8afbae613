"""`ct.serving.Client` with several servers: it learns the table of shards, and follows it."""

import numpy as np
import pytest
from loopback_cluster import loopback_servers

import continual_transformers_tf as ct
from continual_transformers_tf.serving import messages

FEATURES = 6
NAMES = [f"stream {i}" for i in range(30)]


@pytest.fixture
def servers(start_sharded):
    with loopback_servers(start_sharded, ("n1", "n2", "n3")) as made:
        yield made


def connect(servers, *names, **options):
    """Return a client that knows these servers."""
    urls = [servers.members[name].address.grpc for name in names]
    return ct.serving.Client(urls if len(urls) > 1 else urls[0], **options)


def test_a_client_learns_the_table_from_a_refusal(servers, session, samples):
    ids = session.open(len(NAMES))
    with connect(servers, "n2") as client:
        assert client.model == "small"
        assert client._channels.table is None
        for t in range(7):
            x = samples(len(NAMES), FEATURES)
            y = client.step(x, NAMES, [t] * len(NAMES), start=t == 0)
            np.testing.assert_allclose(y, session.step(x, streams=ids), atol=1e-6)
            assert client._channels.table == servers.cluster.table
        x = samples(len(NAMES), 4, FEATURES)
        y = client.steps(x, NAMES, [7] * len(NAMES), end=True)
        np.testing.assert_allclose(y, session.steps(x, streams=ids), atol=1e-6)
    assert sum(servers.cluster.open_streams().values()) == 0


def test_streams_on_several_servers_end_without_a_step(servers, samples):
    with connect(servers, "n2") as client:
        client.step(samples(len(NAMES), FEATURES), NAMES, [0] * len(NAMES))
        assert sum(servers.cluster.open_streams().values()) == len(NAMES)
        client.end(NAMES, [1] * len(NAMES))
        assert sum(servers.cluster.open_streams().values()) == 0
    with connect(servers, "n1") as client:  # It does not know the table.
        client.end(NAMES)


def test_steps_without_numbers_find_their_server_too(servers, session, samples):
    ids = session.open(len(NAMES))
    with connect(servers, "n1") as client:
        for t in range(4):
            x = samples(len(NAMES), FEATURES)
            y = client.step(x, NAMES, start=t == 0)
            np.testing.assert_allclose(y, session.step(x, streams=ids), atol=1e-6)
            servers.leaving = {f"n{t + 1}"} if t < 3 else set()
            servers.settle()


def test_one_stream_goes_on_where_its_shard_goes(servers, session, samples):
    one = session.open()
    with connect(servers, "n3") as client, client.open("one") as stream:
        for leaving in ({"n1", "n2"}, {"n1", "n3"}, {"n2", "n3"}, set()):
            servers.leaving = leaving
            servers.settle()
            for x in samples(3, 1, FEATURES):
                expected = session.step(x, streams=[one])
                np.testing.assert_allclose(stream.step(x[0]), expected[0], atol=1e-6)


def test_a_part_that_is_refused_says_which_streams_expect_what(servers, samples):
    table = servers.cluster.table
    x = samples(len(NAMES), FEATURES)
    with connect(servers, "n1") as client:
        client.step(x, NAMES, [0] * len(NAMES), start=True)
        wrong = [name for name in NAMES if table.owner(name) in ("n1", "n2")]
        numbers = [5 if name in wrong else 1 for name in NAMES]
        with pytest.raises(ct.serving.ServingError) as error:
            client.step(x, NAMES, numbers)
        assert error.value.reason == "out_of_step"
        assert error.value.expected == dict.fromkeys(wrong, 1)
        assert {table.owner(name) for name in wrong} == {"n1", "n2"}
        # The part of n3 was taken. With numbers, all may be sent again.
        counts = servers.cluster.open_streams()
        assert counts["n3"] == len(NAMES) - len(wrong) > 0
        again = client.step(x, NAMES, [1] * len(NAMES))
        assert np.isfinite(again).all()
        with pytest.raises(ct.serving.ServingError) as error:
            client.step(x, NAMES, [7] * len(NAMES))
        assert error.value.expected == dict.fromkeys(NAMES, 2)


def test_a_client_that_knows_several_servers_needs_only_one(servers, samples):
    servers.running["n1"].kill()
    servers.settle(until=lambda: len(servers.shares()) == 2)
    with connect(servers, "n1", "n2", timeout=20, attempt_timeout=1) as client:
        assert client.open("a").step(samples(FEATURES)).shape == (3,)
    with pytest.raises(ValueError, match="got no url"):
        ct.serving.Client([])


def test_a_client_asks_the_other_servers_when_one_is_lost(servers, samples):
    servers.settle()
    with connect(servers, "n2", timeout=20, attempt_timeout=1) as client:
        client.step(samples(len(NAMES), FEATURES), NAMES, start=True)
        lost = next(name for name in NAMES if servers.cluster.table.owner(name) == "n3")
        servers.running["n3"].kill()
        servers.settle(until=lambda: len(servers.shares()) == 2)
        # Its state is gone, and the server that has its shard now says so.
        with pytest.raises(ct.serving.ServingError) as error:
            client.open(lost, next_step=1).step(samples(FEATURES))
        assert error.value.expected == {lost: 0}
        assert client._channels.table == servers.cluster.table


def test_every_server_has_the_table_in_its_metadata(servers):
    with connect(servers, "n1") as client:
        request = messages.ServerMetadataRequest()
        assert client._call("ServerMetadata", request).name == "continual-transformers-server"
        assert client._channels.ask(silent="") is True
        assert client._channels.table == servers.cluster.table
        assert client._channels.ask(silent="") is False


def test_inputs_and_streams_must_be_as_many(servers, samples):
    with (
        connect(servers, "n1") as client,
        pytest.raises(ValueError, match="got 2 streams, and inputs or step numbers of 3"),
    ):
        client.step(samples(3, FEATURES), ["a", "b"])
