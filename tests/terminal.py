"""A terminal, for tests of what is shown on one."""

import contextlib
import os
import select
from collections.abc import Iterator
from typing import NamedTuple, TextIO


class Terminal(NamedTuple):
    """A terminal: what is written to `screen` can be read."""

    screen: TextIO
    reads: int

    def said(self, awaited: str) -> str:
        """Return what was written since the last call. The kernel passes it on a little later.

        Args:
            awaited: A part of it. The rest of what was written before it comes with it.
        """
        text = ""
        while awaited not in text:
            ready, _, _ = select.select([self.reads], [], [], 30)
            assert ready, f"expected {awaited!r} on the terminal, got {text!r}"
            text += os.read(self.reads, 10_000).decode()
        return text


@contextlib.contextmanager
def open_terminal() -> Iterator[Terminal]:
    """Open a terminal for a `with` block."""
    reads, writes = os.openpty()
    with os.fdopen(reads, "rb"), os.fdopen(writes, "w") as screen:
        yield Terminal(screen, reads)
