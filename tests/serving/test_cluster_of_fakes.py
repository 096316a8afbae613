"""`Cluster` with servers that are only Python objects: Redis is away, and servers refuse."""

import pytest
from fake_servers import FakeCluster


@pytest.fixture
def make(monkeypatch):
    """Return a function that makes a `FakeCluster`."""
    made = []

    def start(*names, **options):
        made.append(FakeCluster(monkeypatch, names, **options))
        return made[-1]

    yield start
    for fakes in made:
        fakes.cluster.close()


def test_a_table_that_was_not_acted_on_is_given_again(make):
    fakes = make("n1", "n2")
    fakes.servers["n2"].redis = False
    fakes.turn()
    epoch = fakes.cluster.table.epoch
    published = fakes.servers["n2"]
    assert (published.table.epoch, published.applied) == (epoch, False)
    assert not fakes.cluster.has_nothing("n2")
    fakes.turn()
    assert published.puts == [epoch] * 2
    published.redis = True
    fakes.turn()
    assert published.applied
    assert published.puts == [epoch] * 3
    fakes.turn()
    assert published.puts == [epoch] * 3
    assert fakes.cluster.table.epoch == epoch


@pytest.mark.parametrize("journal", [True, False])
def test_the_winner_of_two_tables_of_one_epoch_takes_its_shards_over_again(make, journal):
    fakes = make("n1", "n2", journal=journal)
    fakes.turn()
    base = fakes.cluster.table
    tables = [base.next(base.servers, {"n1"}, moves, now=0) for moves in (3, 5)]
    assert tables[0].epoch == tables[1].epoch
    for server, table in zip(fakes.servers.values(), tables, strict=True):
        server.table = table
    fakes.cluster._look(fakes.members())
    fakes.cluster._adopt()
    repaired = fakes.cluster.table
    assert repaired.shards == tables[0].shards
    pairs = zip(tables[0].shards, tables[1].shards, strict=True)
    differ = [one != other for one, other in pairs]
    assert sum(differ) == 2
    expected = [
        repaired.epoch if journal and d else before
        for d, before in zip(differ, tables[0].since, strict=True)
    ]
    assert list(repaired.since) == expected


def test_a_server_that_refuses_is_alive_and_not_ready(make):
    fakes = make("n1", "n2")
    fakes.turn()
    table = fakes.cluster.table
    fakes.servers["n2"].refusal = 503
    for _ in range(10):
        fakes.turn()
    assert fakes.cluster.alive() == {"n1", "n2"}
    assert fakes.cluster.table == table
    (event,) = [event for event in fakes.events if event["event"] == "server_refuses"]
    assert event == {"event": "server_refuses", "server": "n2", "reason": "refused (503)"}
    # One that refuses from the beginning gets no shards.
    others = make("n1", "n2")
    others.servers["n2"].refusal = 503
    others.turn()
    assert set(others.cluster.table.shards) == {"n1"}
    others.servers["n2"].refusal = 0
    others.turn()
    others.turn()
    assert set(others.cluster.table.shards) == {"n1", "n2"}


def test_a_server_may_have_another_address(make):
    fakes = make("n1", "n2")
    fakes.turn()
    before = fakes.cluster.table
    member = fakes.servers["n2"].member
    moved = member.address._replace(grpc="n2:7")
    fakes.servers["n2"].member = member._replace(address=moved)
    fakes.turn()
    table = fakes.cluster.table
    assert table.servers["n2"] == moved
    assert (table.shards, table.since) == (before.shards, before.since)
    assert [server.table for server in fakes.servers.values()] == [table] * 2


def test_another_server_at_the_address_of_one_that_has_gone(make):
    fakes = make("n1", "n2")
    fakes.turn()
    fakes.servers["n3"] = fakes.servers.pop("n2")
    fakes.servers["n3"].forget()
    while fakes.turn():
        assert len(fakes.events) < 100
    table = fakes.cluster.table
    assert set(table.servers) == {"n1", "n3"}
    assert {len(table.shards_of(name)) for name in table.servers} == {128}
