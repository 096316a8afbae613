"""The process of a rival. It reads requests from standard input, a line of JSON each, and answers.

The answers are lines of JSON too.
"""

import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

STEPS = 64  # This many inputs are prepared, and used in turn.
CHUNK_SECONDS = 200e-6  # Steps that are faster than this are timed several at once.
VERSIONED = (
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "torch",
    "continual-inference",
    "onnxruntime",
    "jax",
    "sequence-layers",
    "numpy",
    "continual-transformers-tf",
)


class Worker:
    """The requests that a rival answers: each method is one, by its name."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        self.step: Any = None
        self.inputs: list[Any] = []

    def prepare(self, size: Sequence[int]) -> dict[str, Any]:
        """Make the rival of a size, and fill its window."""
        from continual_transformers_tf.bench import rivals
        from continual_transformers_tf.bench.sizes import Size

        self.step, self.inputs = None, []  # Free those of the last size first.
        self.step, convert = rivals.make(self.name, Size(*size), self.threads)
        self.inputs = [convert(x) for x in rivals.inputs_of(Size(*size), STEPS)]
        self.at = 0
        for _ in range(3):
            self.take()
        return {}

    def take(self) -> Any:
        """Take the next step, and return its outputs."""
        x = self.inputs[self.at % STEPS]
        self.at += 1
        return self.step(x)

    def burst(self, seconds: float, least: int) -> dict[str, Any]:
        """Time steps, and return their median in microseconds."""
        return burst(self.step, self.inputs, seconds, least)

    def outputs(self) -> dict[str, Any]:
        """Return the outputs of the next step, as lists."""
        import numpy as np

        return {"outputs": np.asarray(self.take()).tolist()}

    def memory(self, steps: int) -> dict[str, Any]:
        """Return the bytes of a session's states, and how much the process grows over some steps.

        A copy of a stream has a header of 40 bytes beside its state.
        """
        own = self.step.__self__
        state = sum(len(copy) for copy in own.session.get_state(own.streams))
        for _ in range(20):
            self.take()
        before = _resident()
        for _ in range(steps):
            self.take()
        return {"state": state, "growth": _resident() - before}

    def versions(self) -> dict[str, str]:
        """Return the installed versions of the packages that rivals need."""
        return installed_versions()


def burst(
    step: Callable[[Any], Any], inputs: Sequence[Any], seconds: float, least: int
) -> dict[str, Any]:
    """Time steps of a worker's `burst`. Fast steps are timed several at once.

    Returns:
        A dict of the median in microseconds, and of how many steps were taken.
    """
    endless = itertools.cycle(inputs)
    start = time.perf_counter()
    step(next(endless))
    chunk = int(min(len(inputs), max(1, CHUNK_SECONDS / (time.perf_counter() - start))))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        # Make the list first, so that it is not timed.
        taken = list(itertools.islice(endless, chunk))
        start_ns = time.perf_counter_ns()
        for x in taken:
            step(x)
        times.append((time.perf_counter_ns() - start_ns) / chunk)
    return {"median": statistics.median(times) / 1e3, "steps": len(times) * chunk}


def installed_versions() -> dict[str, str]:
    """Return a dict of the installed versions of the packages that rivals need."""
    from importlib import metadata

    found = {}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def main(make_worker: Callable[[str, int], object] = Worker) -> None:
    """Answer requests until standard input ends."""
    name, threads = sys.argv[1], int(sys.argv[2])
    # Set these before anything that reads them is imported. Waiting threads must not spin, because
    # another rival is timed meanwhile.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    os.environ.update(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0", TF_CPP_MIN_LOG_LEVEL="3")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Libraries print to standard output: keep that out of the answers.
    worker = make_worker(name, threads)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = getattr(worker, what)(**arguments)
        except ModuleNotFoundError as missing:
            answer = {"missing": missing.name}
        except Exception as error:  # The race reports it with the rival's name.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
