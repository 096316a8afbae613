"""The process of a contestant in the race of `example_benchmark.py`; see bench/worker.py.

python benchmarks/examples/example_worker.py packer|session|sequence_layers THREADS
"""

import importlib
import os
import sys
from pathlib import Path

import numpy as np

import layer_stacks
import plan_bound
from continual_transformers_tf.bench import worker

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
STEPS = 128  # This many steps are prepared, and taken in turn: they fill every window.
WATCH_WINDOW = 64


class ExampleWorker:
    """The requests that a contestant answers: each method is one, by its name."""

    def __init__(self, name, threads):
        self._name, self._threads = name, threads

    def pack(self, model, directory):
        """Write the model file of an example or a stack, its steps, and a stack's weights.

        Returns:
            A dict of the shape and dtype of a step of one stream, the outputs of the last step, the
            ops of each instruction of the session, and the parts of its bound. For a stack, the
            outputs are the Keras model's.
        """
        import keras

        import continual_transformers_tf as ct

        keras.utils.set_random_seed(1)
        folder = Path(directory)
        stack = layer_stacks.STACKS.get(model)
        if stack:
            made, seq_len = stack.keras_model(), layer_stacks.WINDOW
            np.savez(folder / "weights.npz", **layer_stacks.weights_of(made))
        else:
            sys.path.insert(0, str(EXAMPLES))
            made = importlib.import_module(model).build()
            # The other examples know their windows.
            seq_len = WATCH_WINDOW if model == "watch" else None
        session = ct.Session(made, seq_len=seq_len)
        session.save(folder / "model.safetensors")
        steps = _steps_of(session)
        steps.tofile(folder / "inputs.bin")
        if stack:
            recording = steps.reshape(1, -1, steps.shape[-1])
            outputs = np.asarray(made(recording))[:, -1]
        else:
            outputs = _taken(_in(session), steps, STEPS)
        profile = session.profile(repeat=1)
        parts = plan_bound.parts_of(
            plan_bound.read_plan(folder / "model.safetensors"), [row.name for row in profile]
        )
        return {
            "shape": steps.shape[1:],
            "dtype": steps.dtype.name,
            "outputs": _flat(outputs),
            "ops": [row.op for row in profile],
            "parts": parts,
        }

    def prepare(self, model, directory, shape, dtype):
        """Make the contestant of a model that was packed."""
        folder = Path(directory)
        self._steps = np.fromfile(folder / "inputs.bin", dtype).reshape(STEPS, *shape)
        if self._name == "sequence_layers":
            if self._threads == 1:
                # Before JAX starts its threads: it has no other way to limit their number.
                os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            weights = dict(np.load(folder / "weights.npz"))
            self._step = _in_sequence_layers(model, weights, shape)
        else:
            import continual_transformers_tf as ct

            self._session = ct.Session.load(folder / "model.safetensors", threads=self._threads)
            self._step = _in(self._session)
        return {}

    def steps(self, steps):
        """Take the first steps, and return the outputs of the last one."""
        return {"outputs": _flat(_taken(self._step, self._steps, steps))}

    def burst(self, seconds, least):
        """Time steps, and return their median in microseconds."""
        return worker.burst(self._step, list(self._steps), seconds, least)

    def profile(self, times, repeat):
        """Return the microseconds of each instruction of a step of the session.

        They are the medians of several profiles: in one of them, other work on the machine may
        have taken the processor.
        """
        profiles = [
            [1e6 * row.seconds for row in self._session.profile(1, repeat)] for _ in range(times)
        ]
        return {"microseconds": np.median(profiles, axis=0).tolist()}

    def versions(self):
        """Return the installed versions of the packages that contestants need."""
        return worker.installed_versions()


def _steps_of(session):
    """Return random steps of a session's one input: [STEPS, 1, ...]."""
    (spec,) = session.inputs
    random = np.random.default_rng(13)
    shape = (STEPS, 1, *spec.shape)
    if np.issubdtype(spec.dtype, np.integer):
        return random.integers(0, 1000, shape).astype(spec.dtype)  # Tokens.
    return random.normal(size=shape).astype(spec.dtype)


def _in(session):
    streams = session.open(1)
    return lambda x: session.step(x, streams=streams)


def _in_sequence_layers(model, weights, shape):
    """Return a function that takes a step of a stack in JAX, of inputs `shape`."""
    import jax
    import jax.numpy as jnp
    import sequence_layers.jax as sl

    layers = sl.Serial.Config(layer_stacks.STACKS[model].sequence_layers(), name=model).make()
    variables = jax.tree.map(jnp.asarray, layer_stacks.parameters(weights))
    shape = shape if len(shape) == 3 else (1, *shape)  # [1, rows, features]
    mask = jnp.ones(shape[:2], bool)

    def take(x, state):
        sequence = sl.Sequence(x.reshape(shape), mask)
        y, state = layers.apply(variables, sequence, state, training=False, method=layers.step)
        return y.values[:, -1], state

    take = jax.jit(take, donate_argnums=1)
    spec = sl.ShapeDType(shape[2:], jnp.float32)
    initial = layers.get_initial_state
    state = layers.apply(variables, 1, spec, training=False, method=initial)
    # Copy the state: some of its buffers are shared, and shared buffers cannot be donated.
    state = jax.tree.map(jnp.array, state)

    def step(x):
        nonlocal state
        y, state = take(x, state)
        return jax.block_until_ready(y)

    return step


def _taken(step, inputs, steps):
    for x in inputs[:steps]:
        outputs = step(x)
    return outputs


def _flat(outputs):
    """Return all outputs of a step, one after another, as a list."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if not isinstance(outputs, list | tuple):
        outputs = [outputs]
    return np.concatenate([np.ravel(np.asarray(y)) for y in outputs]).tolist()


if __name__ == "__main__":
    worker.main(ExampleWorker)
