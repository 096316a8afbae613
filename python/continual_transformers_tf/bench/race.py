"""The race of the layers: every rival has its own process; in each round they are timed in turn."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from continual_transformers_tf.bench import rounds as timing
from continual_transformers_tf.bench.rivals import (
    FULL_WINDOWS,
    MODULES,
    OWN,
    RETROACTIVE,
    TWO_THREADS,
)
from continual_transformers_tf.bench.sizes import (
    ATTENTION,
    ATTENTION_QUICK,
    MOST_RECOMPUTED,
    QUICK,
    RETROACTIVE_QUICK,
    RETROACTIVE_TABLE,
    STREAMS,
    TABLE,
    THREADS_GOAL_FROM,
    WINDOWS,
    AttentionSize,
    Size,
)
from continual_transformers_tf.bench.worker_process import Rival, machine, missing_program

PROGRAM = "layer_benchmark"
GROWTH_RIVALS = ("session", "bound", "session_int8", "torch_sdpa", "onnxruntime")
CACHE_DTYPES = ("float32", "bfloat16", "int8")
# How often attention alone is timed: its goal is closer to its bound than all others.
ATTENTION_ROUNDS = 15


class Planned(NamedTuple):
    """A size that is raced, in a part of the report, with a number of threads."""

    part: str
    size: Size
    threads: int
    names: tuple[str, ...]


def races(quick: bool, threads: Sequence[int], only: Sequence[str]) -> list[Planned]:
    """Return what is raced, in order. With more than one thread, only the table is."""
    found = []
    for count in threads:
        names = [name for name in MODULES if count == 1 or name in TWO_THREADS]
        for size in QUICK if quick else TABLE:
            left_out = () if size.streams * size.seq_len <= MOST_RECOMPUTED else FULL_WINDOWS
            taking_part = tuple(name for name in names if name not in left_out)
            found.append(Planned("table", size, count, taking_part))
        if count > 1:
            continue
        for size in RETROACTIVE_QUICK if quick else RETROACTIVE_TABLE:
            found.append(Planned("retroactive", size, 1, tuple(RETROACTIVE)))
        if not quick:
            found += [Planned("windows", size, 1, GROWTH_RIVALS) for size in WINDOWS]
            found += [Planned("streams", size, 1, GROWTH_RIVALS) for size in STREAMS]
    return [
        planned._replace(names=tuple(n for n in planned.names if not only or n in only))
        for planned in found
    ]


def run(
    threads: Sequence[int],
    rounds: int,
    quick: bool,
    only: Sequence[str],
    programs: str | Path,
    progress: Callable[[int, int, str], None],
    target: str | None = None,
) -> dict[str, Any]:
    """Run the whole race.

    Args:
        threads: A list of ints, how many threads each rival may use. With more than one thread,
            only the table is run.
        rounds: How many rounds.
        quick: Whether to run tiny sizes for a moment, to see that it works.
        only: The names of rivals that take part; empty: all.
        programs: The folder of the C++ programs, which `tools/build_benchmarks.py` builds.
        progress: A function that is called with (done, of how many, what comes now).
        target: An instruction set for our kernels. Then only our contestants take part, in what has
            goals; None: the fastest, and all take part.

    Returns:
        A dict that is JSON.
    """
    plan = races(quick, threads, only)
    if target:
        plan = [
            planned._replace(names=tuple(name for name in planned.names if name in OWN))
            for planned in plan
            if planned.part in ("table", "retroactive")
        ]
    plan = [planned for planned in plan if planned.names]
    alone = [
        (size, dtype, far)
        for size, far in (ATTENTION_QUICK if quick else ATTENTION)
        for dtype in CACHE_DTYPES
        if not only or "attention" in only
    ]
    total = (sum(len(planned.names) for planned in plan) + len(alone)) * rounds
    race = _Race(rounds, quick, Path(programs), progress, total, target)
    try:
        results = [race.of_size(planned) for planned in plan]
        attention = [entry for planned in alone if (entry := race.attention(*planned))]
        versions = race.versions()
    finally:
        race.stop()
    progress(total, total, "done")
    return {
        "machine": machine(),
        "versions": versions,
        "rounds": rounds,
        "missing": race.missing,
        "results": results,
        "memory": race.memory,
        "attention": attention,
    }


class _Race:
    def __init__(
        self,
        rounds: int,
        quick: bool,
        programs: Path,
        progress: Callable[[int, int, str], None],
        total: int,
        target: str | None,
    ) -> None:
        self._rounds, self._quick, self._target = rounds, quick, target
        self._program = programs / PROGRAM
        self._progress, self._total, self._done = progress, total, 0
        self._processes: dict[tuple[str, int], Rival] = {}
        self.missing: dict[str, dict[str, Any]] = {}
        self.memory: list[dict[str, Any]] = []

    def of_size(self, planned: Planned) -> dict[str, Any]:
        """Race the contestants of a size, and return its entry in the results."""
        part, size, threads, names = planned
        ready = {}
        for name in names:
            self._progress(self._done, self._total, f"{size}, {name} gets ready")
            problem = self._prepare(name, threads, size)
            if problem:
                self.missing[name] = problem
                self._done += self._rounds
            else:
                ready[name] = self._processes[name, threads]

        def show(name: str) -> None:
            self._progress(self._done, self._total, f"{size}, {name}")
            self._done += 1

        burst = dict(seconds=0.01 if self._quick else 0.12, least=1)
        entry: dict[str, Any] = {
            "part": part,
            "threads": threads,
            "size": size._asdict(),
            "rivals": timing.take(ready, self._rounds, burst, show, self.missing),
        }
        raced = entry["rivals"]
        if "session" in raced and part == "table" and threads == 1 and self._target is None:
            held = ready["session"].ask("memory", steps=20 if self._quick else 200)
            self.memory.append({"size": size._asdict(), "ring": size.ring_bytes, **held})
        many = self._quick or size.streams >= THREADS_GOAL_FROM
        if "session" in raced and threads == 2 and many and ("session", 1) in self._processes:
            one = self._processes["session", 1]
            if not one.ask("prepare", size=size):
                entry["speedup"] = timing.speedup(one, ready["session"], self._quick)
        return entry

    def attention(self, size: AttentionSize, dtype: str, far: bool) -> dict[str, Any] | None:
        """Time attention alone, and return its entry; None: the program was not built."""
        self._progress(self._done, self._total, f"attention alone, {size}, {dtype}")
        self._done += self._rounds
        problem = missing_program(self._program)
        if problem:
            self.missing["attention"] = problem
            return None
        process = self._process("attention", 1)
        what = process.ask("prepare", size=size, dtype=dtype, far=far)
        found = [
            process.ask("burst", seconds=0.002 if self._quick else 0.02, least=1)
            for _ in range(3 if self._quick else ATTENTION_ROUNDS)
        ]
        for answer in (what, *found):
            if "error" in answer:
                self.missing["attention"] = answer
                return None
        return {
            "size": size._asdict(),
            "dtype": dtype,
            "far": far,
            **what,
            "median": statistics.median(burst["median"] for burst in found),
            "bound": statistics.median(burst["bound"] for burst in found),
            "ratio": statistics.median(burst["median"] / burst["bound"] for burst in found),
        }

    def _prepare(self, name: str, threads: int, size: Size) -> dict[str, Any]:
        """Make a contestant ready to be timed. Return {} or what is wrong."""
        if _is_native(name):
            problem = missing_program(self._program)
            if problem:
                return problem
        return self._process(name, threads).ask("prepare", size=size)

    def _process(self, name: str, threads: int) -> Rival:
        if (name, threads) not in self._processes:
            command = [str(self._program)] if _is_native(name) else None
            self._processes[name, threads] = Rival(name, threads, command, self._target)
        return self._processes[name, threads]

    def versions(self) -> dict[str, Any]:
        found = {}
        for process in self._processes.values():
            found.update(process.ask("versions"))
        return found

    def stop(self) -> None:
        for process in self._processes.values():
            process.stop()


def _is_native(name: str) -> bool:
    return {**MODULES, **RETROACTIVE, "attention": "native"}[name] == "native"
