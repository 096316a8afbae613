"""`RayNode`: the actor that keeps a server on a node of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from continual_transformers_tf.serving import node_server, private_files
from continual_transformers_tf.serving.node_server import NodeServer, NodeState
from continual_transformers_tf.serving.operator_api import Tls


class RayNodeState(NamedTuple):
    """The state of a node's server, and of its actor.

    Attributes:
        name: The name that the node's server had, also before this actor; None: it had none.
        draining: Whether the operator wants no server here.
        runs: Whether the process of a server runs here.
        server: The server that this actor watches; None: there is none.
    """

    name: str | None
    draining: bool
    runs: bool
    server: NodeState | None


class RayNode:
    """The actor of a node. It starts nothing by itself: a `RayController` tells it to.

    Args:
        base: The folder of all services.
        folder: The node's own folder, in it.
        host: The node's address.

    Raises:
        PermissionError: If another user may have written to a folder.
    """

    def __init__(self, base: str, folder: str, host: str) -> None:
        self._folder, self._host = Path(folder), host
        self._models = self._folder / "models"
        private_files.make_folder(self._models, Path(base))
        self._server: NodeServer | None = None

    def state(self) -> RayNodeState:
        """Return what is known now."""
        name_file = self._folder / "name"
        name = name_file.read_text() if name_file.exists() else None
        return RayNodeState(
            name,
            draining=(self._folder / "draining").exists(),
            runs=node_server.running_server(self._folder) is not None,
            server=self._server.state() if self._server else None,
        )

    def missing(self, hashes: Sequence[str]) -> list[str]:
        """Return which of these model files are not here. They are named by their SHA-256."""
        return [hash_ for hash_ in hashes if not self._file_of(hash_).exists()]

    def put_model(self, data: bytes) -> None:
        """Keep a model file."""
        made = self._models / "incoming"
        made.write_bytes(data)
        made.replace(self._file_of(node_server.hash_of(made)))

    def get_model(self, hash_: str) -> bytes | None:
        """Return a model file; None: it is not here."""
        path = self._file_of(hash_)
        return path.read_bytes() if path.exists() else None

    def start(
        self, name: str, models: Mapping[str, str], options: Sequence[str], tls: Tls | None
    ) -> None:
        """Start a server, or adopt the one that runs.

        Args:
            name: The server's name in the table of shards.
            models: The SHA-256 of each model's file, by the models' names.
            options: More options of the program.
            tls: As of `NodeServer`.

        Raises:
            BlockingIOError: If another actor still has this node's server.
            FileNotFoundError: If the program is not built here.
            OSError: If a file of `tls` cannot be read here.
        """
        if self._server is None:
            private_files.write(self._folder / "name", name)
            files = {model: self._file_of(hash_) for model, hash_ in models.items()}
            self._server = NodeServer(self._folder, name, self._host, files, options, tls)

    def stop(self) -> None:
        """End the server: it drains first."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def set_draining(self, draining: bool) -> None:
        """Remember whether the operator wants no server here. It changes nothing else."""
        if draining:
            private_files.write(self._folder / "draining", "")
        else:
            (self._folder / "draining").unlink(missing_ok=True)

    def _file_of(self, hash_: str) -> Path:
        return self._models / f"{hash_}.safetensors"
