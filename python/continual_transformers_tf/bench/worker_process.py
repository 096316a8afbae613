"""The processes of a race's contestants, and the machine that they run on."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from continual_transformers_tf.extras import install

TARGET_VARIABLE = "CONTINUAL_TRANSFORMERS_TARGET"
BUILD = "python tools/build_benchmarks.py"


class Rival:
    """The process of a worker.

    Args:
        name: The rival's name.
        threads: How many threads it may use.
        command: The command that starts a worker, without name and threads; None: `worker.py`.
        target: The instruction set of our kernels; None: the fastest.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        command: Sequence[str] | None = None,
        target: str | None = None,
    ) -> None:
        self.name = name
        if command is None:
            command = [sys.executable, "-m", "continual_transformers_tf.bench.worker"]
        self._process = subprocess.Popen(
            [*command, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, TARGET_VARIABLE: target} if target else None,
        )
        # Both are pipes. Popen's types allow None, for a process without them.
        self._requests = cast("IO[str]", self._process.stdin)
        self._answers = cast("IO[str]", self._process.stdout)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Return the worker's answer, a dict. If something is wrong it has "missing" or "error"."""
        try:
            self._requests.write(json.dumps([what, arguments]) + "\n")
            self._requests.flush()
            answer: dict[str, Any] = json.loads(self._answers.readline())
            return answer
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"its process ended with status {self._process.wait()}"}

    def stop(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait()


def missing_program(path: Path) -> dict[str, str]:
    """Return {} if a C++ program was built, otherwise what to do."""
    if path.exists():
        return {}
    return {"missing": f"{path}, which `{BUILD} {path.parent}` builds in a checkout"}


def reason(why: dict[str, str]) -> str:
    """Return why a rival did not take part, given the answer of `Rival.ask`."""
    if "missing" not in why:
        return why["error"]
    if "`" in why["missing"]:  # The text contains the command to run.
        return f"there is no {why['missing']}"
    return f"there is no {why['missing']}: {install('bench')}"


def missing_lines(found: dict[str, Any]) -> list[str]:
    """Return a sentence for the docs for every rival that did not take part."""
    return [f"{name} did not take part: {reason(why)}." for name, why in found["missing"].items()]


def machine() -> dict[str, Any]:
    """Return a dict that describes this machine."""
    from continual_transformers_tf.native import cpu_targets

    found = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
    }
    found["instructions"] = cpu_targets()[1]
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return found
    wanted = ("Model name", "L1d cache", "L2 cache", "L3 cache")
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found[key.strip()] = value.strip()
    return found
