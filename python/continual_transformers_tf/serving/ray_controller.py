"""`RayController`: the actor that places servers on the nodes of a Ray cluster.

It finds the nodes, keeps a `RayNode` on each, tells as many as are needed to have a server, and
lets a `Cluster` share the shards among them. It keeps nothing that it cannot find out again: after
its own death, and after that of the whole Ray cluster, a new one goes on with the servers that run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from continual_transformers_tf.serving import private_files
from continual_transformers_tf.serving.cluster import Cluster, Member
from continual_transformers_tf.serving.haproxy import Haproxy
from continual_transformers_tf.serving.operator_api import Tls
from continual_transformers_tf.serving.ray_node import RayNode, RayNodeState
from continual_transformers_tf.serving.shards import ServerAddress

PAUSE = 0.3  # Seconds between two looks at nodes and servers.
ANSWER_SECONDS = 0.3  # How long a look waits for the actors of nodes. Late answers count later.
COUNT_SECONDS = 2.0  # Between two counts of the open streams.
STOP_SECONDS = 30.0
RETRY_SECONDS = 5.0  # Before something that failed on a node is tried again.
SHRINK_BELOW = 0.75  # Servers are taken away when the rest would be less full than this.
EVENTS = 1000  # That are kept for those who follow them.
HEAD = "node:__internal_head__"  # Ray's own resource of the head node.


@dataclasses.dataclass(frozen=True)
class Service:
    """What is to be served, and by how many servers.

    Attributes:
        name: Its name in the Ray cluster.
        models: The SHA-256 of each model's file, by the models' names.
        options: Options of the server's program.
        journal: Whether these have a journal.
        folder: A folder on every node. Each node makes its own one in it.
        min_servers: How many servers there are at least; None: one on every node, or one if
            `streams_per_server` is given.
        max_servers: How many there are at most; None: one on every node.
        streams_per_server: With so many open streams a server is full, and another one is started;
            None: the number of servers does not follow the streams.
        proxy_port: HAProxy listens on this port of the controller's node; None: there is no proxy.
        tls: If the servers have TLS, the files to call them with. They are on every node.
    """

    name: str
    models: Mapping[str, str]
    options: tuple[str, ...]
    journal: bool
    folder: str
    min_servers: int | None = None
    max_servers: int | None = None
    streams_per_server: int | None = None
    proxy_port: int | None = None
    tls: Tls | None = None

    def servers_wanted(self, nodes: int, servers: int, streams: int) -> int:
        """Return how many servers there should be.

        Args:
            nodes: How many nodes may have one.
            servers: How many there are.
            streams: How many streams are open.
        """
        most = min(nodes, self.max_servers or nodes)
        least = min(most, self.min_servers or (1 if self.streams_per_server else most))
        if self.streams_per_server is None:
            return least
        wanted = math.ceil(streams / self.streams_per_server)
        if wanted < servers:
            # Not at once: a stream more or less must not start and end servers.
            wanted = min(servers, math.ceil(streams / (self.streams_per_server * SHRINK_BELOW)))
        return min(max(wanted, least), most)


@dataclasses.dataclass
class _Node:
    """What the controller knows of a node, by its address."""

    actor: Any = None  # The handle of its RayNode.
    node_id: str = ""
    alive: bool = False  # Ray says so.
    head: bool = False
    state: RayNodeState | None = None
    pending: Any = None  # The call of `state` that was not answered yet.
    address: ServerAddress | None = None  # The server's newest.
    token: str = ""
    leaving: bool = False  # There are more servers than needed.
    retry_at: float = 0.0
    task: Any = None  # The call of `start` or `stop` that was not answered yet.
    stopping: bool = False  # It is `stop`.
    problem: str = ""  # The server's newest, which was logged.

    @property
    def name(self) -> str | None:
        """The server's name in the table."""
        return self.state.name if self.state else None


class RayController:
    """The detached actor of a service.

    Args:
        service: What is to be served.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._address = ray.util.get_node_ip_address()
        self._folder = Path(service.folder) / service.name
        self._nodes: dict[str, _Node] = {}
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS)
        self._numbered = 0
        self._streams: dict[str, int] = {}
        self._count_at = 0.0
        self._models: dict[str, Any] = {}  # Model files that were read, by their SHA-256.
        self._proxy: Haproxy | None = None
        self._proxied: object = None  # The table that the proxy has.
        self._cluster = Cluster(journal=service.journal, log=self._log, tls=service.tls)
        self._lock = threading.Lock()
        self._ending, self._ended = threading.Event(), threading.Event()
        self._wake = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def service(self) -> Service:
        """Return what is served."""
        return self._service

    def put_model(self, hash_: str, data: bytes) -> None:
        """Take a model file that nodes will need."""
        self._models[hash_] = ray.put(data)
        self._wake.set()

    def events(self, after: int) -> list[dict[str, Any]]:
        """Return the events since one, by its number, oldest first. The first number is 1."""
        with self._lock:
            return [event for event in self._events if event["number"] > after]

    def status(self) -> dict[str, Any]:
        """Return the table's epoch, and what each node has."""
        table, alive = self._cluster.table, self._cluster.alive()
        nodes = []
        for address, node in sorted(self._nodes.items()):
            server = node.state.server if node.state else None
            name = node.name if server else None
            nodes.append(
                {
                    "node": address,
                    "server": name,
                    "state": self._state_of(node, alive),
                    "grpc": node.address.grpc if server and node.address else None,
                    "http": node.address.http if server and node.address else None,
                    "pid": server.pid if server else None,
                    "shards": len(table.shards_of(name)) if name else 0,
                    "streams": self._streams.get(name or ""),
                    "problem": server.problem if server else "",
                }
            )
        proxy = self._proxy.url if self._proxy else None
        return {"epoch": table.epoch, "proxy": proxy, "nodes": nodes}

    def drain(self, address: str, draining: bool) -> None:
        """Move all streams away from a node and end its server, or let it have one again.

        It returns at once.

        Raises:
            ValueError: If there is no such node.
        """
        node = self._nodes.get(address)
        if node is None or node.actor is None:
            known = ", ".join(sorted(a for a, n in self._nodes.items() if n.actor)) or "none"
            raise ValueError(f"got the node {address}, expected one of: {known}")
        ray.get(node.actor.set_draining.remote(draining), timeout=10)
        self._log("node_draining" if draining else "node_resumed", node=address)
        self._wake.set()

    def end(self) -> None:
        """End all servers, and the proxy. Streams without a journal are gone then."""
        self._ending.set()
        self._wake.set()
        self._ended.wait(2 * STOP_SECONDS)

    def _log(self, event: str, **facts: object) -> None:
        with self._lock:
            self._numbered += 1
            now = round(time.time(), 3)
            self._events.append({"number": self._numbered, "time": now, "event": event, **facts})

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                more = self._turn()
            except Exception as error:  # The next turn begins with what the servers say.
                self._log("turn_failed", reason=f"{type(error).__name__}: {error}")
                more = False
            if not more:
                self._wake.wait(PAUSE)
                self._wake.clear()
        self._end()

    def _turn(self) -> bool:
        self._find_nodes()
        self._ask_nodes()
        self._place()
        self._finish_tasks()
        members, leaving = self._members()
        more = self._cluster.turn(members, leaving) if members else False
        if time.monotonic() >= self._count_at:
            self._streams = self._cluster.open_streams()
            self._count_at = time.monotonic() + COUNT_SECONDS
        self._stop_servers(leaving)
        self._follow()
        return more

    def _find_nodes(self) -> None:
        """Ask Ray for the nodes."""
        alive = {}
        for found in ray.nodes():
            if found["Alive"]:
                alive[found["NodeManagerAddress"]] = found
        for address, found in alive.items():
            node = self._nodes.setdefault(address, _Node())
            if node.node_id != found["NodeID"]:
                # A node that is new, or that has come back. Its server may have run on.
                node.node_id, node.retry_at = found["NodeID"], 0.0
                node.actor = node.pending = node.task = None
                node.head = HEAD in found["Resources"]
            if not node.alive:
                self._log("node_found", node=address)
            node.alive = True
        for address in set(self._nodes) - set(alive):
            node = self._nodes[address]
            if node.alive:
                self._log("node_lost", node=address)
            node.alive, node.actor, node.pending, node.task = False, None, None, None

    def _ask_nodes(self) -> None:
        """Ask the actors of all nodes for their servers, and make those that are missing."""
        now = time.monotonic()
        for address, node in self._nodes.items():
            if node.alive and node.actor is None and now >= node.retry_at:
                node.actor = self._actor_of(address, node)
            if node.actor is not None and node.pending is None:
                node.pending = node.actor.state.remote()
        pending = {node.pending: address for address, node in self._nodes.items() if node.pending}
        for call in _answered(list(pending)):
            node = self._nodes[pending[call]]
            node.pending = None
            try:
                node.state = ray.get(call)
            except ray.exceptions.ActorUnavailableError:
                continue  # Ray starts it again.
            except ray.exceptions.RayError as error:
                self._fail(pending[call], "node_failed", error)
                node.actor = None
                continue
            server = node.state.server
            if server is None:
                continue
            if server.address:
                node.address, node.token = server.address, server.token
            if server.problem not in ("", node.problem):
                # It ended, or runs and cannot be called.
                self._log("server_problem", node=pending[call], said=server.problem)
            node.problem = server.problem

    def _actor_of(self, address: str, node: _Node) -> Any:
        folder = str(self._folder / address.replace(":", "_"))
        return (
            ray.remote(RayNode)
            .options(
                name=f"{self._service.name}/{node.node_id}",
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=8,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            )
            .remote(self._service.folder, folder, address)
        )

    def _fail(self, address: str, event: str, error: Exception) -> None:
        cause = str(error).strip().splitlines()
        self._log(event, node=address, reason=cause[-1] if cause else type(error).__name__)
        self._nodes[address].retry_at = time.monotonic() + RETRY_SECONDS

    def _serving(self) -> dict[str, _Node]:
        """Return the nodes with a server that may have shards."""
        alive = self._cluster.alive()
        return {
            address: node
            for address, node in self._nodes.items()
            if node.state
            and node.state.server
            and not node.state.draining
            and not node.leaving
            and not node.stopping
            # A server that is dead while its node is not is started again there.
            and (node.alive or node.name in alive)
        }

    def _place(self) -> None:
        """Decide which nodes are to have a server."""
        now = time.monotonic()
        states = [node.state for node in self._nodes.values() if node.alive and not node.retry_at]
        if self._cluster.table.epoch == 0 and None in states:
            return  # A node may have a server that runs, with a table.
        idle = {
            address: node
            for address, node in self._nodes.items()
            if node.actor and node.state and not node.state.server
        }
        # First those that run, and that a controller before has started. They have the table.
        adopted = {address for address, node in idle.items() if node.state and node.state.runs}
        serving = self._serving()
        usable = [n for n in self._nodes.values() if n.alive and n.state and not n.state.draining]
        wanted = self._service.servers_wanted(
            len(usable), len(serving), sum(self._streams.values())
        )
        begun = adopted
        if not adopted:
            for node in usable:
                if node.leaving and not node.stopping and len(serving) < wanted:
                    node.leaving = False
                    serving = self._serving()
            spare = [a for a, n in idle.items() if n.state and not n.state.draining]
            spare.sort(key=lambda address: (idle[address].head, address))
            begun = set(spare[: max(0, wanted - len(serving))])
        for address in sorted(begun):
            if idle[address].task is None and now >= idle[address].retry_at:
                self._begin(address, idle[address])
        for address in sorted(serving, key=self._streams_at)[: max(0, len(serving) - wanted)]:
            serving[address].leaving = True
            self._log("server_leaving", node=address, server=serving[address].name)

    def _streams_at(self, address: str) -> tuple[int, str]:
        return self._streams.get(self._nodes[address].name or "", 0), address

    def _begin(self, address: str, node: _Node) -> None:
        """Begin to start a server on a node, with its model files first."""
        assert node.state is not None
        names = {n.name for n in self._nodes.values() if n is not node}
        name = server_name(node.state.name, node.node_id, names)
        node.state = node.state._replace(name=name)
        hashes = sorted(set(self._service.models.values()))
        try:
            missing = ray.get(node.actor.missing.remote(hashes), timeout=ANSWER_SECONDS * 10)
            for hash_ in missing:
                model = self._model(hash_)
                if model is None:
                    raise FileNotFoundError(f"no node has the model file with the hash {hash_}")
                ray.get(node.actor.put_model.remote(model), timeout=STOP_SECONDS)
        except (ray.exceptions.RayError, TimeoutError, FileNotFoundError) as error:
            self._fail(address, "model_missing", error)
            return
        self._log("server_starts", node=address, server=name)
        service = self._service
        node.task = node.actor.start.remote(
            name, dict(service.models), service.options, service.tls
        )

    def _model(self, hash_: str) -> Any:
        """Return a reference to a model file; None: nobody has it."""
        if hash_ in self._models:
            return self._models[hash_]
        for node in self._nodes.values():
            if node.actor is None or node.state is None:
                continue
            if not ray.get(node.actor.missing.remote([hash_]), timeout=ANSWER_SECONDS * 10):
                self._models[hash_] = node.actor.get_model.remote(hash_)
                return self._models[hash_]
        return None

    def _finish_tasks(self) -> None:
        """Look what came of servers that were started and stopped."""
        for address, node in self._nodes.items():
            if node.task is None or not ray.wait([node.task], timeout=0)[0]:
                continue
            task, node.task = node.task, None
            what = "stopped" if node.stopping else "started"
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                self._fail(address, f"server_not_{what}", error)
            else:
                self._log(f"server_{what}", node=address, server=node.name)
                if node.stopping:
                    node.address, node.leaving = None, False
                    node.state = node.state and node.state._replace(server=None, runs=False)
            node.stopping = False

    def _members(self) -> tuple[dict[str, Member], set[str]]:
        """Return the servers, and which of them are to have no shards."""
        members, leaving = {}, set()
        for node in self._nodes.values():
            if node.state is None or node.state.server is None or node.address is None:
                continue
            assert node.name is not None
            members[node.name] = Member(node.address, node.token)
            if node.leaving or node.state.draining:
                leaving.add(node.name)
        return members, leaving

    def _stop_servers(self, leaving: set[str]) -> None:
        """End the servers that have nothing any more, and forget those that are gone."""
        now = time.monotonic()
        for address, node in list(self._nodes.items()):
            if not node.alive and node.name not in self._cluster.alive():
                del self._nodes[address]
            elif (
                node.name in leaving
                and self._cluster.has_nothing(node.name)
                and node.actor
                and node.task is None
                and now >= node.retry_at
            ):
                node.task, node.stopping = node.actor.stop.remote(), True

    def _follow(self) -> None:
        """Let the proxy follow the table."""
        if self._service.proxy_port is None:
            return
        if self._proxy is None:
            folder = self._folder / self._address.replace(":", "_") / "haproxy"
            private_files.make_folder(folder, Path(self._service.folder))
            self._proxy = Haproxy(folder, self._address, self._service.proxy_port)
            self._log("proxy_listens", url=self._proxy.url)
        if self._proxied is not self._cluster.table:
            self._proxy.set_table(self._cluster.table)
            self._proxied = self._cluster.table

    def _end(self) -> None:
        """End everything."""
        if self._proxy is not None:
            self._proxy.stop()
        actors = {a: n.actor for a, n in self._nodes.items() if n.actor is not None}
        calls = [actor.stop.remote() for actor in actors.values()]
        stopped = _answered(calls, STOP_SECONDS)
        for actor in actors.values():
            ray.kill(actor)
        self._cluster.close()
        self._log("ended", not_stopped=len(calls) - len(stopped))
        self._ended.set()

    def _state_of(self, node: _Node, alive: set[str]) -> str:
        """Return a word for people."""
        state = node.state
        if not node.alive:
            return "lost"
        if state is None:
            return "unknown"
        if state.server is None:
            return "drained" if state.draining else "spare"
        if state.draining or node.leaving:
            return "draining"
        if state.server.address is None:
            return "starting"
        return "serving" if node.name in alive else "dead"


def server_name(kept: str | None, node_id: str, others: Collection[str | None]) -> str:
    """Return the name of a node's server.

    Args:
        kept: The name that it had, which the node keeps in its folder; None: it had none.
        node_id: Ray's, in hexadecimal.
        others: The names of other nodes' servers.
    """
    if kept is not None and kept not in others:
        return kept
    # Not a number: two controllers, each with nodes of its own, would count to the same one. The
    # journal knows servers only by their names.
    names = (f"n{node_id[:length]}" for length in range(8, len(node_id) + 1))
    return next(name for name in names if name not in others)


def _answered(calls: list[Any], timeout: float = ANSWER_SECONDS) -> list[Any]:
    """Return which calls of actors have an answer."""
    return ray.wait(calls, num_returns=len(calls), timeout=timeout)[0] if calls else []
