"""`OperatorApi`: what an operator may ask of a server, over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from continual_transformers_tf.serving.shards import ShardTable

MOST_LISTED = 100_000  # Streams in one answer: the server's limit.


class OperatorError(RuntimeError):
    """A server's refusal of an operator's call.

    Attributes:
        status: HTTP's status.
        reason: The server's word, such as "not_found"; "" if it has none.
    """

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Tls(NamedTuple):
    """Files for calls of servers with TLS, as `ct.serving.Client` takes them.

    Attributes:
        ca: The certificates of the authorities that sign the servers' certificates.
        certificate, key: What is shown to the servers; None: nothing.
    """

    ca: str
    certificate: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext:
        """Read the files. It raises OSError if one cannot be read, or is no PEM file."""
        files = [file for file in self if file is not None]
        for file in files:
            Path(file).open().close()  # Python's ssl does not say which one is missing.
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except ssl.SSLError as error:
            raise OSError(
                f"got {', '.join(files)}, expected PEM files that fit each other: {error}"
            ) from error
        return context


class ServerView(NamedTuple):
    """A server's own view of the table, and whether it is ready."""

    table: ShardTable  # Epoch 0: it was given none yet.
    name: str | None  # Its own, in the table.
    ready: bool  # Its models are loaded, and it is not ending.
    # It has acted on the table. False, for example: Redis was away, and it serves only the shards
    # that it had before.
    applied: bool = True


class ListedStream(NamedTuple):
    """A stream in the list of a server."""

    name: bytes  # Any bytes, as clients choose it.
    path: str  # Of its copy.


class OperatorApi:
    """The operator's calls of one server. Several threads may use it.

    Every call raises OSError if the server cannot be reached or does not answer in time, and
    OperatorError if it refuses.

    Args:
        address: "host:port" of the server's HTTP port.
        token: The operator's bearer token; None: only what everyone may ask.
        timeout: How many seconds the server may be silent in a call.
        context: Of TLS; None: without TLS.
    """

    def __init__(
        self,
        address: str,
        token: str | None,
        timeout: float,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.address, self.token, self.timeout = address, token, timeout
        self._context = context
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def live(self) -> bool:
        """Return whether the server answers at all."""
        try:
            self._call("GET", "/v2/health/live")
        except OperatorError:
            return True
        except OSError as error:
            return _is_of_tls(error)
        return True

    def trouble(self) -> str:
        """Return why one side does not accept the other's certificate, "" if it is not known."""
        try:
            self._call("GET", "/v2/health/live")
        except OperatorError:
            pass
        except OSError as error:
            return str(error) if _is_of_tls(error) else ""
        return ""

    def view(self) -> ServerView:
        """Return the server's table, its name there, whether it is ready, and acts on the table."""
        given = json.loads(self._call("GET", "/v2/shards"))
        try:
            self._call("GET", "/v2/health/ready")
        except OperatorError:
            ready = False
        else:
            ready = True
        table = ShardTable.of_json(given)
        return ServerView(table, given.get("self"), ready, given.get("applied", True))

    def put_table(self, table: ShardTable, name: str, timeout: float) -> dict[str, int]:
        """Give the server a table. Return what changed when it acts on it.

        Args:
            table: The table.
            name: The server's own name there.
            timeout: In seconds. Streams of a journal are rebuilt before the answer.
        """
        body = json.dumps({**table.to_json(), "self": name}).encode()
        return json.loads(self._call("PUT", "/v2/shards", body, timeout))

    def models(self) -> list[str]:
        """Return the names of the models that are loaded."""
        index = json.loads(self._call("POST", "/v2/repository/index", b'{"ready": true}'))
        return [entry["name"] for entry in index]

    def open_streams(self) -> int:
        """Return how many streams are open, of all models."""
        text = self._call("GET", "/metrics").decode()
        counts = re.findall(r"^continual_transformers_open_streams\{.*\} (\S+)", text, re.MULTILINE)
        return round(sum(map(float, counts)))

    def foreign_streams(self, model: str) -> list[ListedStream]:
        """Return streams of shards that are another server's, at most MOST_LISTED."""
        path = f"/v2/models/{urllib.parse.quote(model, safe='')}/streams"
        answer = json.loads(self._call("GET", f"{path}?foreign=true&limit={MOST_LISTED}"))
        return [
            ListedStream(urllib.parse.unquote_to_bytes(entry["path"].split("/")[-1]), entry["path"])
            for entry in answer["streams"]
        ]

    def copy_out(self, path: str) -> bytes:
        """Return a copy of a stream."""
        return self._call("GET", path)

    def copy_in(self, path: str, copy: bytes) -> None:
        """Put a copy of a stream in. It replaces a stream of that name."""
        self._call("PUT", path, copy)

    def end_moved(self, path: str) -> None:
        """End a stream that another server has now. It is no error if it has gone."""
        try:
            self._call("DELETE", f"{path}?reason=moved")
        except OperatorError as error:
            if error.status != 404:
                raise

    def abandon(self) -> None:
        """End the calls in progress: they raise OSError."""
        with self._lock:
            for connection in self._busy:
                if connection.sock is not None:
                    # close() would not wake the thread that waits. With TLS, the socket's own
                    # method takes away what that thread reads with.
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections that no call uses."""
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _new_connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self.address)
        return http.client.HTTPSConnection(self.address, context=self._context)

    def _call(
        self, method: str, path: str, body: bytes | None = None, timeout: float | None = None
    ) -> bytes:
        while True:
            with self._lock:
                used = self._idle.pop() if self._idle else None
                connection = used or self._new_connection()
                connection.timeout = timeout or self.timeout
                if connection.sock is not None:
                    connection.sock.settimeout(connection.timeout)
                self._busy.add(connection)
            try:
                headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                content = response.read()
            except (http.client.HTTPException, OSError) as error:
                connection.close()
                # The server may have closed a connection that was idle. All calls may be repeated.
                if used is None or isinstance(error, TimeoutError):
                    raise OSError(
                        f"{method} {path.split('?')[0]} of the server at {self.address} was not "
                        f"answered: {error or type(error).__name__}"
                    ) from error
                continue
            finally:
                with self._lock:
                    self._busy.discard(connection)
            with self._lock:
                self._idle.append(connection)
            if response.status >= 400:
                raise _error(f"{method} {path.split('?')[0]}", response.status, content)
            return content


def _is_of_tls(error: OSError) -> bool:
    """Return whether a call failed because a certificate was not accepted. So something answers."""
    # A connection that breaks has other types.
    return type(error.__cause__) in (ssl.SSLError, ssl.SSLCertVerificationError)


def _error(what: str, status: int, content: bytes) -> OperatorError:
    try:
        said: Any = json.loads(content)
    except ValueError:
        said = None
    given = said if isinstance(said, Mapping) else {}
    sentence = given.get("error", content[:200].decode(errors="replace"))
    return OperatorError(f"{what}: {sentence} ({status})", status, given.get("reason", ""))
