"""Processes that outlive the one that started them, found again by their id."""

import os
import select
import signal
from pathlib import Path


def runs_with(pid: int, argument: Path) -> bool:
    """Return whether a process runs, and has a file as one of its arguments.

    The file tells it from another process that got the same id later.
    """
    try:
        return os.fsencode(argument) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def end(pid: int, seconds: float) -> None:
    """End a process by SIGTERM, and by SIGKILL if it runs on after that time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
            signal.pidfd_send_signal(handle, number)
            if wait_for_end(handle, wait):
                return
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def wait_for_end(handle: int, seconds: float) -> bool:
    """Wait until the process of a pidfd has ended. Return False after that time."""
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))
