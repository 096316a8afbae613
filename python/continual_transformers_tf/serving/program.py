"""The server's program, `continual-transformers-server`."""

import os
from collections.abc import Sequence
from typing import NoReturn

from continual_transformers_tf import native

PATH = native.PACKAGE / "continual-transformers-server"


def check() -> None:
    """Raise FileNotFoundError, with how to build it, if the program is not installed."""
    if not PATH.exists():
        raise FileNotFoundError(
            f"{PATH} does not exist: the server is built only where the packages that it needs are "
            "found. `python3 tools/server_packages.py describe` in a checkout says which are "
            f"missing. Then: `{native.INSTALL}"
        )


def run(arguments: Sequence[str]) -> NoReturn:
    """Become the server. Its process has this process's id, so signals reach it."""
    check()
    os.execv(PATH, [PATH.name, *arguments])
