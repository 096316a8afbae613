"""Folders and files that only this user may change or read.

The folders are below one like /var/tmp, where every user may make some. Another one may make ours
first, with files in it, for example a token that he knows.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path


def make_folder(folder: Path, base: Path | None = None) -> None:
    """Make a folder, with the folders above it, or check the one that is there.

    Args:
        folder: The folder.
        base: A folder above it, from which on all folders are checked; None: only `folder` is.

    Raises:
        PermissionError: If one of these is a link, or another user owns it or may write to it.
        OSError: If it cannot be made.
    """
    base = folder if base is None else base
    above = [parent for parent in reversed(base.parents) if not parent.exists()]
    below = [base]
    for part in folder.relative_to(base).parts:
        below.append(below[-1] / part)
    for one in [*above, *below]:
        # Path.mkdir(parents=True) would make those above with the default mode.
        with contextlib.suppress(FileExistsError):
            one.mkdir(mode=0o700)
        _check(one)


def write(path: Path, text: str) -> None:
    """Write a file that only this user may read. Readers see the old one or the new one."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    # Never a file that is there, nor one that a link leads to.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(made, flags, 0o600), "w") as file:
            file.write(text)
        made.replace(path)
    except OSError:
        made.unlink(missing_ok=True)
        raise


def read_secret(path: Path) -> str | None:
    """Return what a file has; None: it is not there, or others may have written or read it."""
    try:
        # Not blocked by a pipe of this name.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(handle) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return None
        return file.read() or None


def _check(folder: Path) -> None:
    found = folder.lstat()
    problem = ""
    if stat.S_ISLNK(found.st_mode):
        problem = "is a link"
    elif not stat.S_ISDIR(found.st_mode):
        problem = "is no folder"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to the user with the id {found.st_uid}"
    elif found.st_mode & 0o022:
        problem = f"may be written by others (mode {stat.S_IMODE(found.st_mode):o})"
    if problem:
        raise PermissionError(
            f"{folder} {problem}, expected a folder that only the user with the id {os.geteuid()} "
            "may write to: remove it, or use another folder"
        )
