"""`NodeServer`: the server of a machine, started again when it dies or hangs.

The server is no child of this process, and runs on when this process ends. The next `NodeServer` of
the same folder adopts it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from continual_transformers_tf.serving import private_files, processes, program
from continual_transformers_tf.serving.operator_api import OperatorApi, Tls
from continual_transformers_tf.serving.shards import ServerAddress

LOOK_SECONDS = 1.0  # Between two looks at a server that runs, and for its answer.
HANGS_AFTER = 4  # Looks in a row without an answer.
PID_SECONDS = 5.0  # For the shell, which writes the server's process before it becomes it.
ENDING_SECONDS = 1.0  # The same, when the server is to end.
STOP_SECONDS = 15.0  # After SIGTERM; the program drains for 10 seconds at most.
SHORT_LIFE, LONGEST_PAUSE = 5.0, 10.0  # Seconds: a server that ends at once is started ever later.
READY_FILE = "ready.json"  # The server writes there where it listens.
LOG_BYTES = 16 << 20  # A longer log is renamed when a server is started.


class NodeState(NamedTuple):
    """The state of a `NodeServer`.

    Attributes:
        name: The server's name in the table of shards.
        address: Where it listens; None: it is not ready.
        token: The operator's token of the server.
        pid: The server's process; None: none runs.
        starts: How many servers it has started.
        problem: Why there is no server, as its log says, or what was met when it was to be started
            or watched; "": there is no problem.
    """

    name: str
    address: ServerAddress | None
    token: str
    pid: int | None
    starts: int
    problem: str


def running_server(folder: Path) -> int | None:
    """Return the process of a folder's server; None: none runs."""
    try:
        pid = int((folder / "pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if processes.runs_with(pid, folder / READY_FILE) else None


class NodeServer:
    """The server of a folder.

    Args:
        folder: Its own folder, for the operator's token, the server's log, and where it listens.
        name: The server's name in the table of shards.
        host: The address that the server listens on.
        models: Model files, by the models' names.
        options: More options of the program.
        tls: If these turn TLS on, the files to ask the server with whether it is alive.

    Raises:
        FileNotFoundError: If the program is not built.
        OSError: If a file of `tls` cannot be read.
        BlockingIOError: If another `NodeServer` has the folder.
        PermissionError: If another user may have written to the folder.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        host: str,
        models: Mapping[str, Path],
        options: Sequence[str] = (),
        tls: Tls | None = None,
    ) -> None:
        program.check()
        self._context = tls.context() if tls else None
        private_files.make_folder(folder)
        self._folder, self._name, self._host = folder, name, host
        self._models, self._options = dict(models), list(options)
        self._lock_file = (folder / "lock").open("w")
        fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._token_file = folder / "operator-token"
        token = private_files.read_secret(self._token_file)
        if token is None:
            token = secrets.token_urlsafe(32)
            private_files.write(self._token_file, token)
        self._token = token
        self._starts, self._problem = 0, ""
        self._pid: int | None = None
        self._address: ServerAddress | None = None
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def state(self) -> NodeState:
        """Return what is known now."""
        return NodeState(
            self._name, self._address, self._token, self._pid, self._starts, self._problem
        )

    def leave(self) -> None:
        """Stop watching. The server runs on, and another `NodeServer` may adopt it."""
        self._ending.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._lock_file.close()

    def stop(self) -> None:
        """End the server: it drains first."""
        self._ending.set()
        if self._watcher.is_alive():
            self._watcher.join()
        # One may have started too late for the watcher to see it.
        pid = self._pid or running_server(self._folder)
        if pid is not None:
            processes.end(pid, STOP_SECONDS)
        self._pid = self._address = None
        for file in (READY_FILE, "pid", "ports.json"):
            (self._folder / file).unlink(missing_ok=True)
        self._lock_file.close()

    def _watch(self) -> None:
        pause = 0.0
        while not self._ending.wait(pause):
            began = time.monotonic()
            try:
                self._keep()
                problem = _last_line(self._folder / "server.log")
            except Exception as error:  # For example, a disk is full. It may be free again later.
                problem = f"{type(error).__name__}: {error}"
                began = time.monotonic()  # It is tried ever later, however long the server ran.
            if self._ending.is_set():
                return
            self._problem = problem
            self._pid = self._address = None
            short = time.monotonic() - began < SHORT_LIFE
            pause = min(max(2 * pause, 0.1), LONGEST_PAUSE) if short else 0.0

    def _keep(self) -> None:
        """Adopt a server or start one. Return when it has ended."""
        pid = self._adopt()
        if pid is None:
            if self._ending.is_set():
                return
            pid = self._start()
        with _handle_of(pid) as handle:
            if handle is not None:
                self._pid = pid
                self._stay(pid, handle)

    def _adopt(self) -> int | None:
        """Return the process of a server of this folder that runs and serves the same."""
        pid = running_server(self._folder)
        if pid is None:
            return None
        served = self._served()  # If a model file cannot be read, the server is left as it is.
        with contextlib.suppress(OSError):
            if (self._folder / "served").read_text() == served:
                return pid
        processes.end(pid, STOP_SECONDS)  # It serves other models, or has other options.
        return None

    def _served(self) -> str:
        """Return a hash of what the server serves, and how."""
        files = {name: hash_of(path) for name, path in sorted(self._models.items())}
        # A server with another token would take no table.
        served = [self._name, self._host, self._options, files, self._token]
        return hashlib.sha256(json.dumps(served).encode()).hexdigest()

    def _start(self) -> int:
        """Start a server, and return its process."""
        self._ready_file.unlink(missing_ok=True)
        (self._folder / "pid").unlink(missing_ok=True)
        private_files.write(self._folder / "served", self._served())
        ports: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            # The same ports again, so that clients find it at once.
            before = json.loads((self._folder / "ports.json").read_text())
            ports = ["--grpc-port", str(before["grpc"]), "--http-port", str(before["http"])]
            (self._folder / "ports.json").unlink()  # They may have been taken meanwhile.
        command: list[str | Path] = [
            program.PATH,
            *self._options,
            *("--host", self._host, "--sharded"),
            *("--operator-token-file", self._token_file, "--ready-file", self._ready_file),
            *ports,
            *(f"{name}={path}" for name, path in sorted(self._models.items())),
        ]
        log = self._folder / "server.log"
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as said:
            # Two forks: whoever ends this process's children does not find it.
            shell = 'echo $$ >"$0" && exec "$@"'
            subprocess.run(
                ["setsid", "--fork", "sh", "-c", shell, self._folder / "pid", *command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                check=True,
            )
        self._starts += 1
        end = time.monotonic() + PID_SECONDS
        while time.monotonic() < end:  # The shell writes it at once.
            with contextlib.suppress(OSError, ValueError):
                return int((self._folder / "pid").read_text())
            if self._ending.is_set() and time.monotonic() > end - PID_SECONDS + ENDING_SECONDS:
                break  # Not before: stop() would not find the server.
            time.sleep(0.002)
        raise TimeoutError(
            f"a server was started, and {self._folder / 'pid'} was not written within "
            f"{PID_SECONDS:g} seconds: {_last_line(log)}"
        )

    def _stay(self, pid: int, handle: int) -> None:
        """Return when the server has ended, or hung and was killed."""
        api: OperatorApi | None = None
        silent = 0
        while not self._ending.is_set():
            if processes.wait_for_end(handle, LOOK_SECONDS if api else 0.02):
                return
            if api is None:
                ready = self._read_ready(pid)
                if ready is None:
                    continue
                api = OperatorApi(ready.http, None, LOOK_SECONDS, self._context)
                self._address, self._problem = ready, api.trouble()
            silent = 0 if api.live() else silent + 1
            if silent >= HANGS_AFTER:
                self._address = None
                processes.end(pid, 0)

    def _read_ready(self, pid: int) -> ServerAddress | None:
        """Return where the server listens, when it is ready."""
        try:
            ready: dict[str, Any] = json.loads(self._ready_file.read_text())
        except (OSError, ValueError):
            return None
        if ready["pid"] != pid:
            return None
        ports = {"grpc": ready["grpc_port"], "http": ready["http_port"]}
        private_files.write(self._folder / "ports.json", json.dumps(ports))
        host = f"[{self._host}]" if ":" in self._host else self._host
        return ServerAddress(f"{host}:{ports['grpc']}", f"{host}:{ports['http']}")

    @property
    def _ready_file(self) -> Path:
        return self._folder / READY_FILE


@contextlib.contextmanager
def _handle_of(pid: int) -> Iterator[int | None]:
    """Open the pidfd of a process, for as long as a `with` block; None: it has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(path: Path) -> str:
    try:
        lines = path.read_bytes()[-2000:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")
