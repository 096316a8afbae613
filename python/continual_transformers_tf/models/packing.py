"""Packing a Keras model into a model file, and checking it: what `pack` and `check` do."""

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from continual_transformers_tf.model_file import described_field
from continual_transformers_tf.models.cost import cost
from continual_transformers_tf.models.lowering import continual_model
from continual_transformers_tf.models.step_graph import StepGraph
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.models.windows import windows_of_graph
from continual_transformers_tf.session import Session

WINDOWS_AT_ONCE = 64
OPERATIONS = ("multiplications", "additions", "exponentials")
STEPS_AT_ONCE = 256  # Of a comparison. Keras holds the intermediate results of all of them.


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """Read a Keras model from a `.keras` file, or from another file that Keras reads.

    Raises:
        ValueError: If it is none.
    """
    if str(path).endswith(".safetensors"):
        raise ValueError(f"Expected a Keras model, but {path} is already a model file")
    try:
        return keras.saving.load_model(path, compile=False)
    except (KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and "`Lambda`" in str(error):
            raise ValueError(
                f"{path} holds a keras.layers.Lambda, whose Python code Keras reads only from a "
                "file that you trust: load the model in Python with safe_mode=False, and call "
                "ct.Session(model).save(...)"
            ) from error
        unknown = re.search(r"Could not locate (?:class|function) '(\w+)'", str(error))
        if unknown:
            raise ValueError(
                f"{path} needs {unknown[1]}, which is not of Keras or of this package: load the "
                "model in Python, where it is registered, and call ct.Session(model).save(...)"
            ) from error
        raise ValueError(
            f"Expected a Keras model, as model.save('model.keras') writes it, but Keras cannot "
            f"read {path}"
        ) from error


def streaming_twin(model: keras.Model, seq_len: int | None = None) -> StreamingModel:
    """Return the `StreamingModel` of a model, with outputs from the first step on, as in a session.

    Args:
        model, seq_len: As in `ct.Session`.
    """
    return StreamingModel(continual_model(model, seq_len), warm_up="partial")


def costs(model: keras.Model, session: Session, seq_len: int | None = None) -> dict[str, Any]:
    """Return what a step costs, and how large a stream's state is, as plain data.

    Args:
        model, seq_len: As in `ct.Session`.
        session: A `Session` of the model.
    """
    operations, reason = None, None
    try:
        of_step = cost(continual_model(model, seq_len))
        operations = {name: getattr(of_step, name) for name in OPERATIONS}
    except ValueError as error:  # A session may run a layer that ct.cost does not know.
        reason = str(error)
    return {
        "operations": operations,
        "operations_not_counted": reason,
        "state_bytes": session.state_bytes,
        "receptive_field": session.receptive_field,
        "delay": session.delay,
    }


def describe_costs(found: dict[str, Any], goes_on: bool | None) -> str:
    """Return the result of `costs` as two lines of text.

    Args:
        found: The result.
        goes_on: That of `ct.explain`: whether an output depends on all earlier steps.
    """
    field = described_field(found["receptive_field"], goes_on)
    operations = f"its operations are not counted. {found['operations_not_counted']}"
    if found["operations"]:
        operations = ", ".join(f"{n:,} {name}" for name, n in found["operations"].items())
    return (
        f"a step: {operations}\n"
        f"a stream: {found['state_bytes']:,} bytes; receptive field {field}, "
        f"delay {found['delay']}"
    )


class Comparison(NamedTuple):
    """The result of streaming the same recordings through a Keras model and a session.

    Attributes:
        streams, steps: How many streams, and steps of the input, were taken.
        difference: The largest difference of two outputs; NaN if only one of the two is NaN.
        largest: The largest absolute output of the Keras model.
    """

    streams: int
    steps: int
    difference: float
    largest: float

    def __str__(self) -> str:
        return (
            f"checked: {self.streams} streams of {self.steps} steps, taken by Keras and by the "
            f"session: largest difference {self.difference:.3g} where outputs go up to "
            f"{self.largest:.3g}"
        )


def compare(
    model: keras.Model,
    session: Session,
    recordings: list[npt.NDArray[Any]],
    seq_len: int | None = None,
    on_step: Callable[[int], None] = lambda taken: None,
) -> Comparison:
    """Stream recordings through a Keras model and through a session of it, and compare.

    Args:
        model, seq_len: As in `ct.Session`.
        session: A `Session` of the model.
        recordings: The result of `recordings.read_recordings`.
        on_step: A function that is called with the number of steps that have been taken.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: If the session is of another model, with other inputs or outputs.
    """
    twin = streaming_twin(model, seq_len)
    inputs, block = twin._graph.model.inputs, getattr(twin, "block", 1)
    rows = (block,) if block > 1 else ()
    expected = sorted((*rows, *x.shape[2:]) for x in inputs)
    given = sorted(spec.shape for spec in session.inputs)
    if expected != given:
        raise ValueError(
            f"Expected a model file of {model.name}, whose steps have shapes {expected}, but got "
            f"one whose steps have shapes {given}"
        )
    structure = _structure(twin._graph)
    streams, steps = recordings[0].shape[:2]
    twin.clean_state()  # Its layers may be those of the model, and have streams.
    ids = session.open(streams)
    differences, sizes = [0.0], [0.0]
    for first in range(0, steps, STEPS_AT_ONCE):
        part = [x[:, first : first + STEPS_AT_ONCE] for x in recordings]
        joined = [x.reshape(streams, -1, *x.shape[3:]) if rows else x for x in part]
        by_keras = twin.call_steps(keras.tree.pack_sequence_as(structure, joined))
        taken = []
        for t in range(part[0].shape[1]):
            step = [np.ascontiguousarray(x[:, t]) for x in part]
            outputs = session.step(keras.tree.pack_sequence_as(structure, step), ids)
            taken.append(keras.tree.flatten(outputs))
            on_step(first + t + 1)
        by_session = [np.stack(outputs, axis=1) for outputs in zip(*taken, strict=True)]
        for y, got in zip(keras.tree.flatten(by_keras), by_session, strict=True):
            if y is None:
                continue  # If the model has a delay, Keras gives no outputs for the first steps.
            y = np.asarray(y).astype(np.float64)
            if rows:  # Before the last of the strides, a step gives several rows.
                y = y.reshape(streams, -1, *got.shape[2:])
            got = got[:, got.shape[1] - y.shape[1] :]
            if got.shape != y.shape:
                raise ValueError(
                    f"Expected a model file of {model.name}, whose steps return {y.shape[2:]}, but "
                    f"got one whose steps return {got.shape[2:]}"
                )
            differences.append(np.max(np.abs(got - y), initial=0, where=got != y))
            sizes.append(np.max(np.abs(y), initial=0))
    session.close(ids)
    return Comparison(streams, steps * block, float(np.max(differences)), float(np.max(sizes)))


class WindowComparison(NamedTuple):
    """The result of comparing the steps of a session with the Keras model on windows.

    Attributes:
        windows, steps: How many windows, and the length of each.
        difference, largest: As in `Comparison`.
    """

    windows: int
    steps: int
    difference: float
    largest: float

    def __str__(self) -> str:
        return (
            f"on windows: {self.windows:,} windows of {self.steps:,} steps, given to the Keras "
            f"model, and the session's steps at their ends: largest difference "
            f"{self.difference:.3g} where outputs go up to {self.largest:.3g}"
        )


def compare_windows(
    model: keras.Model,
    session: Session,
    recordings: list[npt.NDArray[Any]],
    seq_len: int | None = None,
) -> WindowComparison:
    """Compare each step of a session with the Keras model on the window that ends with the step.

    If the model has positions that move with the stream, or a recurrent state that goes on, only
    the first window of each stream is compared.

    Args:
        model, session, recordings, seq_len: As in `compare`, whose errors come first.

    Raises:
        ValueError: If the recordings are shorter than a window.
    """
    graph = streaming_twin(model, seq_len)._graph
    if session.block > 1:
        raise ValueError(
            f"Expected a model without strides to compare on windows, but a step of {model.name} "
            f"takes {session.block} steps of its input: compare it on its recordings"
        )
    length = graph.model.inputs[0].shape[1] or session.receptive_field
    streams, steps = recordings[0].shape[:2]
    if steps < length:
        raise ValueError(
            f"Expected recordings of at least {length} steps, the length of a window, but got "
            f"{steps}"
        )
    windows_of_model = windows_of_graph(graph)
    first_only = windows_of_model.placed or windows_of_model.goes_on
    ends = [length] if first_only else list(range(length, steps + 1))
    structure = _structure(graph)
    ids = session.open(streams)
    differences, sizes = [], []
    taken = 0
    for first in range(0, len(ends), WINDOWS_AT_ONCE // streams or 1):
        part = ends[first : first + (WINDOWS_AT_ONCE // streams or 1)]
        windows = [np.concatenate([x[:, end - length : end] for end in part]) for x in recordings]
        by_keras = model(keras.tree.pack_sequence_as(structure, windows), training=False)
        by_session = []
        while taken < part[-1]:
            step = [np.ascontiguousarray(x[:, taken]) for x in recordings]
            outputs = session.step(keras.tree.pack_sequence_as(structure, step), ids)
            taken += 1
            if taken >= part[0]:
                by_session.append(keras.tree.flatten(outputs))
        of_outputs = [np.concatenate(steps) for steps in zip(*by_session, strict=True)]
        for y, got in zip(keras.tree.flatten(by_keras), of_outputs, strict=True):
            y = np.asarray(y).astype(np.float64)
            y = y[:, -1] if y.ndim == got.ndim + 1 else y  # A row for each step of the window.
            differences.append(np.max(np.abs(got - y), where=got != y, initial=0))
            sizes.append(np.max(np.abs(y)))
    session.close(ids)
    count = len(ends) * streams
    return WindowComparison(count, length, float(np.max(differences)), float(np.max(sizes)))


def _structure(graph: StepGraph) -> Any:
    """Return the structure in which a model takes its inputs."""
    structure = graph.model._inputs_struct
    if isinstance(structure, (list, tuple)) and len(structure) == 1:
        return structure[0]
    return structure
