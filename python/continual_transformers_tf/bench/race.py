"""The race of the layer: every rival has its own process; in each round they are timed in turn."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

from continual_transformers_tf.bench.rivals import MODULES
from continual_transformers_tf.bench.sizes import QUICK, STREAMS, TABLE, WINDOWS, Size
from continual_transformers_tf.extras import install

GROWTH_RIVALS = ("ours", "ours_bfloat16", "torch_sdpa", "onnxruntime", "read_bound")
RECOMPUTED_UP_TO = (
    1024  # Longer windows take long to recompute, and the trend is clear without them.
)


class Rival:
    """The process of a worker.

    Args:
        name: The rival's name.
        threads: How many threads it may use.
        command: The command that starts a worker, without name and threads; None: `worker.py`.
    """

    def __init__(self, name: str, threads: int, command: Sequence[str] | None = None) -> None:
        self.name = name
        if command is None:
            command = [sys.executable, "-m", "continual_transformers_tf.bench.worker"]
        self._process = subprocess.Popen(
            [*command, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
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


def races(quick: bool) -> list[tuple[str, Size, tuple[str, ...]]]:
    """Return the races to run, as a list of (part, size, names of rivals)."""
    if quick:
        return [("table", size, tuple(MODULES)) for size in QUICK]
    found = [("table", size, tuple(MODULES)) for size in TABLE]
    for size in WINDOWS:
        recomputed = ("keras_recompute",) if size.seq_len <= RECOMPUTED_UP_TO else ()
        found.append(("windows", size, GROWTH_RIVALS + recomputed))
    found += [("streams", size, ("ours", "torch_sdpa", "onnxruntime")) for size in STREAMS]
    return found


def run(
    threads: Sequence[int],
    rounds: int,
    quick: bool,
    only: Sequence[str],
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Run the whole race.

    Args:
        threads: A list of ints, how many threads each rival may use. With more than one thread,
            only the table is run.
        rounds: How many rounds.
        quick: Whether to run tiny sizes for a moment, to see that it works.
        only: The names of rivals that take part; empty: all.
        progress: A function that is called with (done, of how many, what comes now).

    Returns:
        A dict that is JSON.
    """
    plan = [
        (count, part, size, [name for name in names if (not only or name in only)
                             and (name != "ours_apart" or size.streams > 1)])
        for count in threads
        for part, size, names in races(quick)
        if count == 1 or part == "table"
    ]  # fmt: skip
    results, memory = [], []
    missing: dict[str, Any] = {}
    versions: dict[str, str] = {}
    total = sum(len(names) for *_, names in plan) * rounds
    done = 0
    processes: dict[tuple[str, int], Rival] = {}
    for count, part, size, names in plan:
        entry: dict[str, Any] = {
            "part": part,
            "threads": count,
            "size": size._asdict(),
            "rivals": {},
        }
        medians: dict[str, list[float]] = {}
        for name in names:
            progress(done, total, f"{size}, {name} gets ready")
            if (name, count) not in processes:
                processes[name, count] = Rival(name, count)
            answer = processes[name, count].ask("prepare", size=size)
            if answer:
                missing[name] = answer
                done += rounds
            else:
                medians[name] = []
        for _ in range(rounds):
            for name, found in medians.items():
                progress(done, total, f"{size}, {name}")
                burst = dict(seconds=0.01, least=2) if quick else dict(seconds=0.12, least=2)
                found.append(processes[name, count].ask("burst", **burst)["median"])
                done += 1
        for name, found in medians.items():
            figures = {"median": statistics.median(found), "least": min(found), "most": max(found)}
            entry["rivals"][name] = figures
        if "ours" in medians and count == 1:
            held = processes["ours", count].ask("memory", steps=20 if quick else 200)
            memory.append({"size": size._asdict(), "ring": size.ring_bytes, **held})
        results.append(entry)
    for process in processes.values():
        versions.update(process.ask("versions"))
        process.stop()
    progress(total, total, "done")
    return {
        "machine": machine(),
        "versions": versions,
        "rounds": rounds,
        "missing": missing,
        "results": results,
        "memory": memory,
    }


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
    from continual_transformers_tf.ops import cpu_targets

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
