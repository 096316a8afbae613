"""A rival's own process: reads what to do from standard input, a line of JSON each, and answers."""

import contextlib
import json
import os
import resource
import statistics
import sys
import time

STEPS = 64  # Inputs that are prepared, and taken in turn.
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
    def __init__(self, name, threads):
        self.name, self.threads = name, threads

    def prepare(self, size):
        from continual_transformers_tf.bench import rivals
        from continual_transformers_tf.bench.sizes import Size

        self.step = self.inputs = None  # Those of the size before go first.
        self.step, convert = rivals.make(self.name, Size(*size), self.threads)
        self.inputs = [convert(x) for x in rivals.inputs_of(Size(*size), STEPS)]
        self.at = 0
        for _ in range(3):
            self.take()
        return {}

    def take(self):
        x = self.inputs[self.at % STEPS]
        self.at += 1
        return self.step(x)

    def burst(self, seconds, least):
        """Times steps one by one: their median, in microseconds."""
        times = []
        end = time.perf_counter() + seconds
        while len(times) < least or (time.perf_counter() < end and len(times) < 20_000):
            start = time.perf_counter_ns()
            self.take()
            times.append(time.perf_counter_ns() - start)
        return {"median": statistics.median(times) / 1e3, "steps": len(times)}

    def outputs(self):
        """Those of the next step, as lists."""
        import numpy as np

        output = self.take()
        if isinstance(output, list):
            output = [np.asarray(row)[0] for row in output]
        if hasattr(output, "numpy"):
            output = output.numpy()
        return {"outputs": np.asarray(output).tolist()}

    def memory(self, steps):
        """Bytes of the state, and what the process grows by over some steps."""
        layer = self.step.__self__
        state = sum(array.nbytes for array in layer.get_state().values())
        for _ in range(20):
            self.take()
        before = _resident()
        for _ in range(steps):
            self.take()
        return {"state": state, "growth": _resident() - before}

    def versions(self):
        return installed_versions()


def installed_versions():
    """The versions of what rivals are made of, as far as it is installed: a dict."""
    from importlib import metadata

    found = {}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def main(make_worker=Worker):
    """Answer requests until standard input ends."""
    name, threads = sys.argv[1], int(sys.argv[2])
    # Before anything is imported that would read them. Who waits must not spin: others are timed.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    os.environ.update(OMP_WAIT_POLICY="passive", KMP_BLOCKTIME="0", TF_CPP_MIN_LOG_LEVEL="3")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    worker = make_worker(name, threads)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = getattr(worker, what)(**arguments)
        except ModuleNotFoundError as missing:
            answer = {"missing": missing.name}
        except Exception as error:  # It is the race's to say whose.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
