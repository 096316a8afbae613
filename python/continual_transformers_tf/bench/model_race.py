"""The race of whole models: each contestant has its own process; a round times them in turn.

Before a contestant is timed, its outputs are compared with a float64 reference.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from continual_transformers_tf.bench import model_rivals
from continual_transformers_tf.bench import rounds as timing
from continual_transformers_tf.bench.sizes import (
    MODEL_QUICK,
    MODEL_TABLE,
    THREADS_GOAL_FROM,
    ModelSize,
)
from continual_transformers_tf.bench.worker_process import Rival, machine, missing_program

PROGRAM = "model_benchmark"
WORKER = [sys.executable, "-m", "continual_transformers_tf.bench.model_worker"]


def contestants(only: Sequence[str], threads: int, own: bool = False) -> list[str]:
    """Return the names of the contestants that take part, with `own` only of ours."""
    return [
        name
        for name in model_rivals.MODEL_MODULES
        if (not only or name in only)
        and (threads == 1 or name not in model_rivals.ONE_THREAD)
        and (not own or name in model_rivals.OWN)
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
        threads: A list of ints, how many threads each contestant may use.
        rounds: How many rounds.
        quick: Whether to run tiny sizes for a moment, to see that it works.
        only: The names of contestants that take part; empty: all.
        programs: The folder of the C++ programs, which `tools/build_benchmarks.py` builds.
        progress: A function that is called with (done, of how many, what comes now).
        target: An instruction set for our kernels. Then only our contestants take part; None: the
            fastest, and all take part.

    Returns:
        A dict that is JSON.
    """
    sizes = MODEL_QUICK if quick else MODEL_TABLE
    plan = [
        (count, size, contestants(only, count, own=target is not None))
        for count in threads
        for size in sizes
    ]
    total = sum(len(names) for *_, names in plan) * rounds
    race = _Race(rounds, quick, Path(programs), progress, total, target)
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = [race.of_size(Path(folder), *planned) for planned in plan]
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
        self._rounds, self._quick, self._programs = rounds, quick, programs
        self._target = target
        self._burst: dict[str, Any] = (
            dict(seconds=0.01, least=2) if quick else dict(seconds=0.15, least=3)
        )
        self._progress, self._total, self._done = progress, total, 0
        self._processes: dict[tuple[str, int], Rival] = {}
        self.missing: dict[str, dict[str, Any]] = {}

    def of_size(
        self, folder: Path, threads: int, size: ModelSize, names: Sequence[str]
    ) -> dict[str, Any]:
        """Race the contestants of a size, and return its entry in the results."""
        folder = folder / str(size).replace(" ", "_")
        self._write(folder, size)
        ready = {}
        for name in names:
            self._progress(self._done, self._total, f"{size}, {name} gets ready")
            problem = self._prepare(name, threads, size, folder)
            if problem:
                self.missing[name] = problem
                self._done += self._rounds
            else:
                ready[name] = self._processes[name, threads]

        def show(name: str) -> None:
            self._progress(self._done, self._total, f"{size}, {name}")
            self._done += 1

        entry: dict[str, Any] = {
            "threads": threads,
            "size": size._asdict(),
            "rivals": timing.take(ready, self._rounds, self._burst, show, self.missing),
        }
        raced = entry["rivals"]
        if size.streams == 1 and threads == 1 and {"session", "session_cpp"} <= {*raced}:
            entry["python"] = self._python(threads)
        many = self._quick or size.streams >= THREADS_GOAL_FROM
        if "session_cpp" in raced and threads == 2 and many:
            problem = self._prepare("session_cpp", 1, size, folder)
            if not problem:
                one, two = (self._processes["session_cpp", count] for count in (1, 2))
                entry["speedup"] = timing.speedup(one, two, self._quick)
        return entry

    def _python(self, threads: int) -> float:
        """Return how many microseconds a step from Python takes more than the same step in C++.

        It is the median of many differences between two consecutive bursts, because between rounds
        the machine's speed changes by more than Python takes. With many streams, noise would still
        be larger than the difference.
        """
        pairs = timing.alternating(
            self._processes["session", threads],
            self._processes["session_cpp", threads],
            seconds=0.001 if self._quick else 0.01,
            pairs=50,
        )
        return statistics.median(session - cpp for session, cpp in pairs)

    def _write(self, folder: Path, size: ModelSize) -> None:
        """Write weights and inputs for the contestants that read them from files."""
        if folder.exists():
            return
        folder.mkdir()
        weights = model_rivals.weights_of(size).arrays()
        np.concatenate([array.ravel() for array in weights]).tofile(folder / "weights.bin")
        model_rivals.inputs_of(size).tofile(folder / "inputs.bin")

    def _prepare(self, name: str, threads: int, size: ModelSize, folder: Path) -> dict[str, Any]:
        """Make a contestant ready to be timed. Return {} or what is wrong."""
        if name.startswith("session") and not (folder / "model.safetensors").exists():
            answer = self._process("packer", 1).ask("pack", size=size, directory=str(folder))
            if answer:
                return answer
        if model_rivals.MODEL_MODULES[name] == "native":
            problem = missing_program(self._program)
            if problem:
                return problem
        process = self._process(name, threads)
        answer = process.ask("prepare", size=size, directory=str(folder))
        if answer:
            return answer
        answer = process.ask("check")
        return compare(size, answer) if "outputs" in answer else answer

    @property
    def _program(self) -> Path:
        return self._programs / PROGRAM

    def _process(self, name: str, threads: int) -> Rival:
        if (name, threads) not in self._processes:
            native = model_rivals.MODEL_MODULES.get(name) == "native"
            command = [str(self._program)] if native else WORKER
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


def compare(size: ModelSize, answer: dict[str, Any]) -> dict[str, Any]:
    """Compare a contestant's outputs with the reference. Return {} or what is wrong."""
    expected = model_rivals.reference(size, answer["steps"], answer["positions"])
    largest = np.abs(expected).max()
    error = np.abs(np.array(answer["outputs"]) - expected).max() / largest
    if error < model_rivals.TOLERANCE:  # False for NaN.
        return {}
    expected_error = f"expected at most {model_rivals.TOLERANCE:g}"
    return {"error": f"got outputs with an error of {error:.2g}, {expected_error}"}
