"""Shows how far a build by pip is.

pip keeps a build's output to itself, unless it is called with -v. So the progress goes to the
terminal, if there is one, and otherwise to the output.
"""

import contextlib
import sys
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


def terminal() -> TextIO | None:
    """Return the terminal that the build was started from, or None."""
    if sys.stderr.isatty():
        return sys.stderr
    try:
        return open("/dev/tty", "w")
    except OSError:
        return None


# No estimate of the time that is left: some files take a hundred times as long as others.
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} files, {elapsed}{postfix}"


class Progress:
    """The number of files that are compiled.

    Args:
        what: A sentence that says what is built, and why it takes a while.
        files: How many files there are to compile. Files that are found later count too.
    """

    def __init__(self, what: str, files: int) -> None:
        self._what = what
        self._files = files
        self._closing = contextlib.ExitStack()
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        print(self._what, flush=True)
        screen = terminal()
        if screen:
            if screen is not sys.stderr:
                self._closing.enter_context(screen)
            # pip's own line has no end.
            print(f"\n{self._what}", file=screen)
            self._bar = self._closing.enter_context(
                tqdm(total=self._files, bar_format=FORMAT, file=screen, leave=False, mininterval=0)
            )
        return self

    def step(self, source: str) -> None:
        """Count a file that is compiled."""
        if self._bar is not None:
            self._bar.total = max(self._files, self._bar.n + 1)
            self._bar.set_postfix_str(source.split("/")[-1], refresh=False)
            self._bar.update()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()
