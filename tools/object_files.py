"""Compile only the files that have changed, for setup.py, nvcc and the emulated ops."""

import hashlib
import itertools
import math
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from compiler_errors import explain

# Precompiled headers differ in every folder, so ccache must not look into them: `precompile_header`
# writes down what their contents depend on.
CCACHE_SETTINGS = {"CCACHE_PCH_EXTSUM": "1", "CCACHE_SLOPPINESS": "pch_defines,time_macros"}

T = TypeVar("T")
R = TypeVar("R")


def compile_object(
    command: Sequence[str], target: Path, heading: str = "", cached: bool = True
) -> str:
    """Compile a file, unless an earlier run of the same command is still current.

    It keeps two files beside the object: a `.log` with the heading, the command and the compiler's
    output, and a `.d` with the files that the compiler read. It sets the object's time to the start
    of its compilation, so a file that is edited meanwhile counts as changed.

    Args:
        command: A list, the compiler and its options, without those for the output.
        target: The object's path.
        heading: What else the object depends on, such as the compiler's version.
        cached: Whether ccache may keep the object.

    Returns:
        The compiler's output; "" if it was not called.
    """
    log, listed = target.with_suffix(".log"), target.with_suffix(".d")
    heading = f"{heading}{shlex.join(command)}\n"
    if is_current(target, log, listed, heading):
        return ""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, made_list = Path(folder, "made.o"), Path(folder, "made.d")
        started = time.time()
        done = subprocess.run(
            # Not -MMD: it leaves out our own headers where Highway's foreach_target.h, a system
            # header, includes them.
            [
                *(through_ccache(command) if cached else command),
                "-o",
                str(made),
                "-MD",
                "-MF",
                str(made_list),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **CCACHE_SETTINGS},
        )
        if done.returncode:
            raise SystemExit(explain(command, done.stdout))
        os.utime(made, (started, started))
        log.write_text(heading + done.stdout)
        # The compiler does not list the precompiled headers that it read.
        includes = [after for word, after in itertools.pairwise(command) if word == "-include"]
        precompiled = " ".join(f"{name}.gch" for name in includes)
        listed.write_text(f"{made_list.read_text().rstrip()} {precompiled}\n")
        made.replace(target)
    return done.stdout


def write_if_changed(path: Path, text: str) -> None:
    """Write a source, unless it is there already: its object stays current."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def through_ccache(command: Sequence[str]) -> Sequence[str]:
    """Return the command that compiles through ccache, if it is installed.

    ccache finds objects of other folders: of another checkout, or of pip's copy. `CCACHE_DISABLE=1`
    switches it off. nvcc does without: its objects depend on the checkout's path.
    """
    ccache = shutil.which("ccache")
    if ccache is None or Path(command[0]).name == "nvcc":
        return command
    return [ccache, *command]


def precompile_header(command: Sequence[str], header: Path, names: Sequence[str]) -> list[str]:
    """Precompile a header that includes others.

    Args:
        command: A list, the compiler and its options.
        header: Where to write the header. The compiler finds the precompiled one beside it.
        names: The headers that it includes.

    Returns:
        The options with which other files use it.
    """
    write_if_changed(header, "".join(f"#include <{name}>\n" for name in names))
    precompiled = header.with_suffix(".h.gch")
    # Its 400 MB would push other objects out of ccache.
    compile_object([*command, "-x", "c++-header", "-c", str(header)], precompiled, cached=False)
    # For ccache: what the precompiled header was made of, which is the same in every folder.
    digest = hashlib.sha256(shlex.join(command).encode())
    for name in listed_in(precompiled.with_suffix(".d")):
        digest.update(Path(name).read_bytes())
    write_if_changed(Path(f"{precompiled}.sum"), digest.hexdigest())
    return ["-include", str(header), "-fpch-preprocess"]


def is_current(target: Path, log: Path, listed: Path, heading: str) -> bool:
    """Return whether the same command made the object from files that have not changed since."""
    if not (target.exists() and log.exists() and listed.exists()):
        return False
    if not log.read_text().startswith(heading):
        return False
    made = target.stat().st_mtime
    return all(changed_at(name) < made for name in listed_in(listed))


def changed_at(name: str) -> float:
    """Return the time of a file's last change; for a file that is gone, infinity."""
    try:
        return os.stat(name).st_mtime
    except FileNotFoundError:
        return math.inf


def listed_in(path: Path) -> list[str]:
    """Return the files that a compiler's list of dependencies (`-MF`) names."""
    return path.read_text().replace("\\\n", " ").split(":", 1)[1].split()


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function on every item, with as many calls at once as there are processors.

    Return the results in the order of the items.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))
