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
from continual_transformers_tf.bench.race import Rival, machine
from continual_transformers_tf.bench.sizes import MODEL_QUICK, MODEL_TABLE, ModelSize

PROGRAM = "model_benchmark"
BUILD = "python tools/build_benchmarks.py"
WORKER = [sys.executable, "-m", "continual_transformers_tf.bench.model_worker"]


def contestants(only: Sequence[str], threads: int) -> list[str]:
    """Return the names of the contestants that take part."""
    return [
        name
        for name in model_rivals.MODEL_MODULES
        if (not only or name in only) and (threads == 1 or name not in model_rivals.ONE_THREAD)
    ]


def run(
    threads: Sequence[int],
    rounds: int,
    quick: bool,
    only: Sequence[str],
    programs: str | Path,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Run the whole race.

    Args:
        threads: A list of ints, how many threads each contestant may use.
        rounds: How many rounds.
        quick: Whether to run tiny sizes for a moment, to see that it works.
        only: The names of contestants that take part; empty: all.
        programs: The folder of the C++ programs, which `tools/build_benchmarks.py` builds.
        progress: A function that is called with (done, of how many, what comes now).

    Returns:
        A dict that is JSON.
    """
    sizes = MODEL_QUICK if quick else MODEL_TABLE
    plan = [(count, size, contestants(only, count)) for count in threads for size in sizes]
    total = sum(len(names) for *_, names in plan) * rounds
    race = _Race(rounds, quick, Path(programs), progress, total)
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
    ) -> None:
        self._rounds, self._programs = rounds, programs
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
        bursts: dict[str, list[dict[str, float]]] = {}
        for name in names:
            self._progress(self._done, self._total, f"{size}, {name} gets ready")
            problem = self._prepare(name, threads, size, folder)
            if problem:
                self.missing[name] = problem
                self._done += self._rounds
            else:
                bursts[name] = []
        for _ in range(self._rounds):
            for name, found in bursts.items():
                self._progress(self._done, self._total, f"{size}, {name}")
                found.append(self._processes[name, threads].ask("burst", **self._burst))
                self._done += 1
        rivals = {}
        for name, found in bursts.items():
            medians = [burst["median"] for burst in found]
            rivals[name] = {
                "median": statistics.median(medians),
                "least": min(medians),
                "most": max(medians),
            }
        entry = {"threads": threads, "size": size._asdict(), "rivals": rivals}
        if size.streams == 1 and {"session", "session_cpp"} <= {*rivals}:
            entry["python"] = self._python(threads)
        return entry

    def _python(self, threads: int) -> float:
        """Return how many microseconds a step from Python takes more than the same step in C++.

        It is the median of many differences between two consecutive bursts, because between rounds
        the machine's speed changes by more than Python takes. With many streams, noise would still
        be larger than the difference.
        """
        burst = dict(seconds=0.001 if self._burst["seconds"] < 0.1 else 0.01, least=2)
        medians = [
            [self._processes[name, threads].ask("burst", **burst)["median"] for name in names]
            for names in [("session", "session_cpp"), ("session_cpp", "session")] * 25
        ]
        return statistics.median(
            (first - second) * (1 if i % 2 == 0 else -1)
            for i, (first, second) in enumerate(medians)
        )

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
            self._processes[name, threads] = Rival(name, threads, command)
        return self._processes[name, threads]

    def versions(self) -> dict[str, Any]:
        found = {}
        for process in self._processes.values():
            found.update(process.ask("versions"))
        return found

    def stop(self) -> None:
        for process in self._processes.values():
            process.stop()


def missing_program(path: Path) -> dict[str, str]:
    """Return {} if a C++ program was built, otherwise what to do."""
    if path.exists():
        return {}
    return {"missing": f"{path}, which `{BUILD} {path.parent}` builds in a checkout"}


def compare(size: ModelSize, answer: dict[str, Any]) -> dict[str, Any]:
    """Compare a contestant's outputs with the reference. Return {} or what is wrong."""
    expected = model_rivals.reference(size, answer["steps"], answer["positions"])
    largest = np.abs(expected).max()
    error = np.abs(np.array(answer["outputs"]) - expected).max() / largest
    if error < model_rivals.TOLERANCE:  # False for NaN.
        return {}
    expected_error = f"expected at most {model_rivals.TOLERANCE:g}"
    return {"error": f"got outputs with an error of {error:.2g}, {expected_error}"}
