"""Servers on loopback that share the shards, without Ray."""

import contextlib
import os
import signal
import time

from continual_transformers_tf.serving.cluster import Cluster, Member
from continual_transformers_tf.serving.operator_api import OperatorApi
from continual_transformers_tf.serving.shards import ServerAddress


class LoopbackCluster:
    """Servers on loopback, and the cluster that commands them.

    Args:
        start: The function of the fixture `start_sharded`.
        journal: The address of a Redis, or None.
        arguments: More options of the servers.
        tls: If these turn TLS on, the files for the operator's calls.
    """

    def __init__(self, start, journal=None, arguments=(), tls=None):
        self._start, self._journal, self._arguments = start, journal, arguments
        self._tls = tls
        self.running, self.members, self.leaving = {}, {}, set()
        self.events, self.clusters = [], []
        self.new_controller()

    def new_controller(self):
        """Take another controller, which knows nothing."""
        self.cluster = Cluster(
            journal=self._journal is not None, log=self._log, patience=2, tls=self._tls
        )
        self.clusters.append(self.cluster)

    def _log(self, event, **facts):
        self.events.append({"event": event, **facts})

    def start(self, name):
        """Start a server. With a name that is known it is the same one, started again."""
        arguments = ("--journal", self._journal) if self._journal else ()
        server = self._start(*arguments, *self._arguments)
        self.running[name] = server
        address = ServerAddress(server.grpc_url, f"127.0.0.1:{server.http_port}")
        self.members[name] = Member(address, "an operator's secret")

    def urls(self):
        return [member.address.grpc for member in self.members.values()]

    def api(self, name):
        context = self._tls and self._tls.context()
        return OperatorApi(self.members[name].address.http, self.members[name].token, 10, context)

    def turn(self):
        return self.cluster.turn(self.members, self.leaving)

    def settle(self, until=lambda: True, seconds=60):
        """Take turns until there is nothing to do, and until something holds."""
        end = time.monotonic() + seconds
        while self.turn() or not until():
            assert time.monotonic() < end, self.events[-20:]

    def shares(self):
        """Return how many shards each server has."""
        table = self.cluster.table
        return {name: len(table.shards_of(name)) for name in table.servers}

    def send(self, name, number):
        os.kill(self.running[name].process.pid, number)

    def close(self):
        for cluster in self.clusters:
            cluster.close()
        for server in self.running.values():
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def loopback_servers(start, names, journal=None, **options):
    """Run servers of these names, which have shared the shards, for as long as a `with` block."""
    made = LoopbackCluster(start, journal, **options)
    for name in names:
        made.start(name)
    made.settle()
    try:
        yield made
    finally:
        made.close()
