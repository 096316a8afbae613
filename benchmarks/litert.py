"""Compare the steps of LiteRT files with those of a session: time, file size and error.

PYTHONPATH=python python benchmarks/litert.py
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import click
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.options import CpuOptions, Options

import continual_transformers_tf as ct
from continual_transformers_tf.bench.worker_process import machine
from continual_transformers_tf.demo.model import trained_model

MODELS = {"the demo's": trained_model, "co_audio_transformer": ct.co_audio_transformer}
WEIGHTS = ("float32", "float16", "int8")
LITERT = ("Interpreter", "CompiledModel")
STEPS = 300  # For the error.


class InSession:
    """Steps of a session."""

    def __init__(self, session):
        self._session = session
        self._stream = session.open()

    def step(self, x):
        return self._session.step(x, self._stream)


class InInterpreter:
    """Steps of a LiteRT file, with the state in NumPy arrays, as in the docs."""

    NAME = "Interpreter"

    def __init__(self, path, name):
        self._name = name
        self._interpreter = Interpreter(str(path), num_threads=1)
        self._step = self._interpreter.get_signature_runner("step")
        self._state = {
            key: np.zeros(part["shape"], part["dtype"])
            for key, part in self._step.get_input_details().items()
            if key.startswith("state_")
        }

    def step(self, x):
        outputs = self._step(**{self._name: x}, **self._state)
        self._state = {key: outputs[key] for key in self._state}
        return outputs["y"]


class InCompiledModel:
    """Steps of a LiteRT file, whose state stays in LiteRT's buffers: nothing is copied."""

    NAME = "CompiledModel"

    def __init__(self, path, name):
        options = Options(cpu_options=CpuOptions(num_threads=1))
        self._model = CompiledModel.from_file(str(path), options=options)
        of_input = self._model.create_input_buffer_by_name
        details = self._model.get_input_tensor_details("step")
        state = {key: part for key, part in details.items() if key.startswith("state_")}
        # The state before a step, and after it. Then they change places.
        self._states = [{key: of_input("step", key) for key in state} for _ in range(2)]
        for key, part in state.items():
            self._states[0][key].write(np.zeros(part["shape"], part["dtype"]))
        self._inputs = {name: of_input("step", name)}
        self._x = self._inputs[name]
        self._outputs = {
            key: self._model.create_output_buffer_by_name("step", key) for key in ("y", "ready")
        }
        self._shape = self._model.get_output_tensor_details("step")["y"]["shape"]

    def step(self, x):
        before, after = self._states
        self._x.write(x)
        self._model.run_by_name("step", {**self._inputs, **before}, {**self._outputs, **after})
        self._states.reverse()
        y = self._outputs["y"].read(int(np.prod(self._shape)), np.float32)
        return y.reshape(self._shape)


def burst(way, samples, seconds):
    """Return the median of a step's microseconds, from steps for so many seconds."""
    times = []
    while len(times) < 20 or sum(times) < seconds * 1e6:
        x = next(samples)
        start = time.perf_counter_ns()
        way.step(x)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def measure(model, folder, rounds, seconds):
    """Yield for each kind of weights (name, bytes of the file, error, microseconds by way).

    The error is the largest difference from the session's outputs, over the largest output.
    """
    session = ct.Session(model)
    (spec,) = session.inputs
    random = np.random.default_rng(1)
    recording = random.standard_normal((STEPS, 1, *spec.shape)).astype("float32")
    samples = itertools.cycle(recording)
    in_session = InSession(session)
    expected = np.stack([in_session.step(x) for x in recording])
    files = {weights: folder / f"{weights}.tflite" for weights in WEIGHTS}
    ways, errors = {("Session", None): in_session}, {}
    for weights, path in files.items():
        ct.export_litert(model, path, weights=weights)
        for way in (InInterpreter, InCompiledModel):
            made = ways[way.NAME, weights] = way(path, spec.name)
            outputs = np.stack([made.step(x) for x in recording])
            error = np.abs(outputs - expected).max() / np.abs(expected).max()
            assert errors.setdefault(weights, error) == error
    # The fastest round counts: during the others, other work may have slowed down the machine.
    times = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for key, way in ways.items():
            times[key] = min(times[key], burst(way, samples, seconds))
    for weights, path in files.items():
        of_ways = [times["Session", None], *(times[way, weights] for way in LITERT)]
        yield weights, path.stat().st_size, errors[weights], of_ways


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--seconds", default=0.2, show_default=True, help="Time for each way in a round.")
def main(rounds, seconds):
    """Measure both models, and print the table of docs/how-to/phone.md."""
    about = machine()
    print(f"{about.get('Model name', 'unknown')}, {about['instructions']}, one thread\n")
    print(f"| model | weights | file | error | Session | {' | '.join(LITERT)} |")
    print("| --- " * 7 + "|")
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(make(), Path(folder), rounds, seconds):
                weights, size, error, times = row
                cells = [name, weights, f"{size / 1e3:,.0f} kB", f"{error:.1g}"]
                print(f"| {' | '.join([*cells, *(f'{t:.1f} µs' for t in times)])} |", flush=True)


if __name__ == "__main__":
    main()
