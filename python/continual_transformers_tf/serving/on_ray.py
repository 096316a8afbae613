"""Servers on the nodes of a Ray cluster: what the command line does with it.

Ray places, watches and restarts one native server a node. It carries no steps: clients talk to the
servers.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from continual_transformers_tf.serving import node_server
from continual_transformers_tf.serving.operator_api import Tls
from continual_transformers_tf.serving.ray_controller import HEAD, RayController, Service

NAMESPACE = "continual-transformers"
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # The first call waits until Ray has started the controller.
READY_SECONDS = 120.0
LOOK_SECONDS = 0.3


def connect(address: str) -> None:
    """Connect to a Ray cluster. This machine must be one of its nodes.

    Raises:
        ConnectionError: If there is none.
    """
    host, colon, port = address.rpartition(":")
    try:
        if colon:  # Ray itself tries for minutes.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"there is no Ray cluster at {address} that has a node on this machine: start one "
            f"with `ray start`. Ray says: {error}"
        ) from error


class RayService:
    """A service on the Ray cluster that this process is connected to.

    Every call raises ConnectionError if its controller does not answer.

    Args:
        name: The service's name.

    Raises:
        LookupError: If there is no such service.
    """

    def __init__(self, name: str) -> None:
        try:
            self._controller = ray.get_actor(name)
        except ValueError as error:
            raise LookupError(
                f"no service {name} runs on this Ray cluster: start it with "
                "`continual-transformers serve --ray ADDRESS model.safetensors`"
            ) from error

    @classmethod
    def deploy(cls, service: Service, files: Mapping[str, Path]) -> RayService:
        """Start a service, or return it if it runs.

        Args:
            service: What is to be served.
            files: Its model files, by the models' names. They are sent to the nodes.

        Raises:
            ValueError: If a service of this name serves something else.
        """
        try:
            running = cls(service.name)
        except LookupError:
            pass
        else:
            if running._ask("service") != service:
                raise ValueError(
                    f"the service {service.name} runs with other models or options: end it with "
                    "--end first, or give this one another --name"
                )
            return running
        (head,) = [n["NodeID"] for n in ray.nodes() if n["Alive"] and HEAD in n["Resources"]]
        controller = (
            ray.remote(RayController)
            .options(
                name=service.name,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=16,
                # There the proxy keeps its address. Without the head there is no Ray anyway.
                scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False),
            )
            .remote(service)
        )
        for name, path in files.items():
            call = controller.put_model.remote(service.models[name], path.read_bytes())
            ray.get(call, timeout=ANSWER_SECONDS)
        return cls(service.name)

    def wait_until_ready(self, seconds: float = READY_SECONDS) -> bool:
        """Wait until all shards have a server and no server is starting.

        Args:
            seconds: How long to wait at most.

        Returns:
            Whether it is so. False at once when no server can start.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            nodes = self.status()["nodes"]
            servers = [node for node in nodes if node["server"]]
            starting = any(node["state"] in ("starting", "unknown") for node in nodes)
            if sum(node["shards"] for node in nodes) > 0 and not starting:
                return True
            if servers and all(node["problem"] for node in servers):
                return False
            time.sleep(LOOK_SECONDS)
        return False

    def status(self) -> dict[str, Any]:
        """Return the table's epoch, the proxy's address, and what each node has."""
        return self._ask("status")

    def events(self, follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield what happens, and what has happened so far.

        Args:
            follow: Whether to go on for ever, or end with the newest event.
        """
        after = 0
        while True:
            for event in self._ask("events", after):
                after = event["number"]
                yield event
            if not follow:
                return
            time.sleep(LOOK_SECONDS)

    def drain(self, node: str, seconds: float = READY_SECONDS) -> bool:
        """Move all streams away from a node, and end its server. Return whether it was in time.

        Args:
            node: Its address.
            seconds: How long to wait.

        Raises:
            ValueError: If there is no such node.
        """
        self._ask("drain", node, True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            states = {entry["node"]: entry["state"] for entry in self.status()["nodes"]}
            if states.get(node) in ("drained", None):
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def resume(self, node: str) -> None:
        """Let a node that was drained have a server again.

        Raises:
            ValueError: If there is no such node.
        """
        self._ask("drain", node, False)

    def end(self) -> None:
        """End all servers. Streams without a journal are gone then."""
        self._ask("end")
        ray.kill(self._controller)

    def _ask(self, method: str, *arguments: object) -> Any:
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            call = getattr(self._controller, method).remote(*arguments)
            try:
                return ray.get(call, timeout=max(end - time.monotonic(), 0.001))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except (ray.exceptions.RayError, TimeoutError) as error:
                # Ray starts it again. Every call may be repeated.
                restarts = isinstance(error, ray.exceptions.ActorUnavailableError)
                if not restarts or time.monotonic() > end:
                    raise ConnectionError(
                        "the service's controller does not answer. The servers go on without it, "
                        "and a new one finds them: serve the same models again. Ray says: "
                        f"{error}"
                    ) from error
            time.sleep(LOOK_SECONDS)


def service_of(
    name: str,
    files: Mapping[str, Path],
    options: list[str],
    folder: str,
    tls: Tls | None = None,
    **scale: int | None,
) -> Service:
    """Return what is to be served.

    Args:
        name: The service's name.
        files: The model files, by the models' names.
        options: Options of the server's program.
        folder: A folder on every node.
        tls: As of `Service`.
        scale: As of `Service`.
    """
    models = {model: node_server.hash_of(path) for model, path in files.items()}
    journal = any(option.split("=")[0] == "--journal" for option in options)
    return Service(name, models, tuple(options), journal, folder, tls=tls, **scale)
