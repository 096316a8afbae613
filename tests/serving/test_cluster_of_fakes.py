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
