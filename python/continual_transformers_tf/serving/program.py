"""The server's program, `continual-transformers-server`."""

import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Self

from continual_transformers_tf import native

PATH = native.PACKAGE / "continual-transformers-server"


def check() -> None:
    """Raise FileNotFoundError, with how to build it, if the program is not installed."""
    if not PATH.exists():
        raise FileNotFoundError(
            f"{PATH} does not exist. Every wheel has the server. A build from source has it only "
            "if the packages that it needs are found: `python3 tools/server_packages.py describe` "
            f"in a checkout says which are missing. Then: `{native.INSTALL}"
        )


def run(arguments: Sequence[str]) -> NoReturn:
    """Become the server. Its process has this process's id, so signals reach it."""
    check()
    os.execv(PATH, [PATH.name, *arguments])


class LocalServer:
    """A server on free ports of this machine, for as long as a `with` block.

    Args:
        model_file: The model file that it serves.
        arguments: More arguments of the program.

    Attributes:
        url: "127.0.0.1:port" of its gRPC port.
        returncode: Its exit status, when it has ended.

    Raises:
        OSError: If it cannot be started.
    """

    def __init__(self, model_file: Path, arguments: Sequence[str] = ()) -> None:
        check()
        ports = ("--grpc-port", "0", "--http-port", "0")
        self._process = subprocess.Popen(
            [PATH, *ports, "--die-with-parent", *arguments, str(model_file)],
            stderr=subprocess.PIPE,
            text=True,
            # The terminal's Ctrl-C is for this process, which ends the server when it is done.
            start_new_session=True,
        )
        self._said: list[str] = []
        self.url = f"127.0.0.1:{self._wait_until_ready()}"
        self.returncode: int | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _wait_until_ready(self) -> int:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.rstrip())
            if line.startswith("{"):
                event = json.loads(line)
                if event["event"] == "ready":
                    return int(event["grpc_port"])
        self._process.wait()
        self._process.stderr.close()
        raise OSError(f"the server did not start: {self._said[-1] if self._said else 'no reason'}")

    def _read(self) -> None:
        """Read on, so that the server never waits for a full pipe."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.rstrip())
            del self._said[:-100]
        self._process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self.returncode = self._process.returncode
