"""Servers that are only Python objects: for what real ones do too seldom."""

from continual_transformers_tf.serving import cluster
from continual_transformers_tf.serving.cluster import Cluster, Member
from continual_transformers_tf.serving.operator_api import OperatorError, ServerView
from continual_transformers_tf.serving.shards import ServerAddress, ShardTable


class FakeServer:
    """The operator's side of a server, in place of `OperatorApi`.

    Attributes:
        redis: Whether its Redis is there. Without it, a table is published and not acted on.
        refusal: The HTTP status of every answer; 0: it answers as it should.
    """

    def __init__(self, name):
        self.address, self.token, self.closed = f"{name}:2", "a token", False
        self.member = Member(ServerAddress(f"{name}:1", self.address), self.token)
        self.redis, self.refusal = True, 0
        self.forget()

    def forget(self):
        """Be as a server that was just started."""
        self.table, self.name, self.applied = ShardTable.empty(), None, True
        self.puts = []

    def live(self):
        return True

    def view(self):
        if self.refusal:
            raise OperatorError(f"refused ({self.refusal})", self.refusal, "")
        return ServerView(self.table, self.name, True, self.applied)

    def put_table(self, table, name, timeout):
        self.puts.append(table.epoch)
        assert table.epoch > self.table.epoch or table == self.table
        self.table, self.name, self.applied = table, name, self.redis
        if not self.redis:
            raise OperatorError("Redis is away (503)", 503, "")
        return {}

    def models(self):
        return []

    def close(self):
        self.closed = True


class FakeCluster:
    """A `Cluster` of fake servers, and its events."""

    def __init__(self, monkeypatch, names, journal=True):
        self.servers = {name: FakeServer(name) for name in names}
        self.events = []
        apis = {server.address: server for server in self.servers.values()}
        monkeypatch.setattr(cluster, "OperatorApi", lambda address, *_: apis[address])
        self.cluster = Cluster(journal=journal, log=self._log)

    def _log(self, event, **facts):
        self.events.append({"event": event, **facts})

    def members(self):
        return {name: server.member for name, server in self.servers.items()}

    def turn(self):
        return self.cluster.turn(self.members())
