"""A terminal, for tests of what is shown on one."""

import os
import select
from types import TracebackType


class Terminal:
    """A terminal that keeps what is written to `screen`, a text file, in a `with` block."""

    def __enter__(self) -> "Terminal":
        self._reads, writes = os.openpty()
        self.screen = os.fdopen(writes, "w")
        return self

    def said(self, awaited: str) -> str:
        """Return what was written since the last call. The kernel passes it on a little later.

        Args:
            awaited: A part of it. The rest of what was written before it comes with it.
        """
        text = ""
        while awaited not in text:
            ready, _, _ = select.select([self._reads], [], [], 30)
            assert ready, f"expected {awaited!r} on the terminal, got {text!r}"
            text += os.read(self._reads, 10_000).decode()
        return text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.screen.close()
        os.close(self._reads)
