"""`Channels`: connections to the servers of a table of shards. `Access`: what they want to see."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc

from continual_transformers_tf.serving import messages
from continual_transformers_tf.serving.shards import ShardTable

PathLike = str | os.PathLike[str]

TABLE_KEY = "shard-table-bin"  # Of a server's trailing metadata.
ASK_SECONDS = 1.0  # How long another server may take to answer with its table.

CHANNEL_OPTIONS = [
    # Answers may be long.
    ("grpc.max_receive_message_length", -1),
    # So may the sentence of a refusal that names many streams, and the table of shards.
    ("grpc.max_metadata_size", 256 << 10),
    ("grpc.absolute_max_metadata_size", 256 << 10),
    # A server that was restarted is found soon, not after up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Access:
    """What a client shows to a server, and what it knows the server by.

    Args:
        token, ca, certificate, key: As of `Client`.

    Attributes:
        metadata: What every call has to send.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not given that another one needs, or if the token cannot be sent.
    """

    def __init__(
        self,
        token: str | None = None,
        ca: PathLike | None = None,
        certificate: PathLike | None = None,
        key: PathLike | None = None,
    ) -> None:
        if (certificate is None) != (key is None):
            raise ValueError("a client's certificate needs both certificate and key, got only one")
        if certificate is not None and ca is None:
            raise ValueError("certificate and key need ca too, which turns TLS on")
        self._credentials = None
        if ca is not None:
            files = [path and Path(path).read_bytes() for path in (ca, key, certificate)]
            self._credentials = grpc.ssl_channel_credentials(*files)
        # As the server reads its file: without the line's end.
        token = token and token.rstrip()
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("a token is one line of printable ASCII, got other characters too")
        self.metadata = [("authorization", f"Bearer {token}")] if token else []

    def channel(self, url: str, options: Iterable[tuple[str, Any]] = ()) -> grpc.Channel:
        """Return a channel to "host:port", with more options of gRPC."""
        options = [*CHANNEL_OPTIONS, *options]
        if self._credentials is None:
            return grpc.insecure_channel(url, options)
        return grpc.secure_channel(url, self._credentials, options)


class Channels:
    """A channel to each server that calls went to, and the newest table that a server sent.

    Several threads may use it.

    Args:
        urls: "host:port" of the gRPC ports of servers that are known from the beginning.
        access: What the servers want to see.

    Attributes:
        table: The newest table; None: no server has sent one, so there is one server, or nothing
            is known yet.
    """

    def __init__(self, urls: Sequence[str], access: Access) -> None:
        self.table: ShardTable | None = None
        self._urls, self._first = list(urls), urls[0]
        self._access = access
        self._channels: dict[str, Any] = {}
        self._calls: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for channel in self._channels.values():
                channel.close()

    def url_of(self, stream: bytes) -> str:
        """Return the address of a stream's server, or of any server if none has its shard."""
        table = self.table
        owner = table and table.owner(stream)
        return table.servers[owner].grpc if table and owner else self.any_url()

    def any_url(self) -> str:
        """Return the address of a server for calls that every server answers."""
        known = self._known()
        return self._first if self._first in known else known[0]

    def go_round(self, url: str) -> None:
        """Take another server for such calls: this one does not answer."""
        known = self._known()
        if url in known:
            self._first = known[(known.index(url) + 1) % len(known)]

    def begin(self, url: str, method: str, request: Any, timeout: float) -> Any:
        """Begin a call. Return its future, whose `result()` raises grpc.RpcError."""
        return self._call(url, method, request).future(
            request, timeout=timeout, metadata=self._access.metadata
        )

    def call(self, url: str, method: str, request: Any, timeout: float) -> Any:
        """Call a method, once. It raises grpc.RpcError."""
        return self._call(url, method, request)(
            request, timeout=timeout, metadata=self._access.metadata
        )

    def learn(self, error: grpc.RpcError) -> bool:
        """Take the table of a refusal, if it is newer. Return whether it is."""
        return self._take(error.trailing_metadata())

    def ask(self, silent: str) -> bool:
        """Ask the other servers for a newer table, as one does not answer. Return whether one has.

        It takes at most ASK_SECONDS.
        """
        request = messages.ServerMetadataRequest()
        others = [url for url in self._known() if url != silent]
        calls = [self.begin(url, "ServerMetadata", request, ASK_SECONDS) for url in others]
        found = False
        for call in calls:
            try:
                found = self._take(call.trailing_metadata()) or found
            except grpc.RpcError:
                continue
        return found

    def _known(self) -> list[str]:
        table = self.table
        named = [address.grpc for address in table.servers.values()] if table else []
        return list(dict.fromkeys([*named, *self._urls]))

    def _take(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
        sent = dict(metadata or ()).get(TABLE_KEY)
        if sent is None:
            return False
        table = ShardTable.of_json(sent)
        with self._lock:
            if table.epoch <= (self.table.epoch if self.table else 0):
                return False
            # Channels of servers that have left stay: calls may be in progress there.
            self.table = table
        return True

    def _call(self, url: str, method: str, request: Any) -> Any:
        with self._lock:
            if (url, method) not in self._calls:
                if url not in self._channels:
                    self._channels[url] = self._access.channel(url)
                answer = type(request).__name__.replace("Request", "Response")
                self._calls[url, method] = self._channels[url].unary_unary(
                    f"{messages.SERVICE}/{method}",
                    type(request).SerializeToString,
                    getattr(messages, answer).FromString,
                )
            return self._calls[url, method]
