"""Packing a Keras model into a model file, and checking it: `continual-transformers pack`."""

import os
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from continual_transformers_tf.models.cost import cost
from continual_transformers_tf.models.lowering import continual_model
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.session import Session


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """Read a Keras model from a `.keras` file, or from another file that Keras reads."""
    if str(path).endswith(".safetensors"):
        raise ValueError(f"Expected a Keras model, but {path} is already a model file")
    return keras.saving.load_model(path, compile=False)


def streaming_twin(model: keras.Model, seq_len: int | None = None) -> StreamingModel:
    """Return the `StreamingModel` of a model, with outputs from the first step on, as in a session.

    Args:
        model, seq_len: As in `ct.Session`.
    """
    return StreamingModel(continual_model(model, seq_len), warm_up="partial")


def describe_cost(model: keras.Model, session: Session, seq_len: int | None = None) -> str:
    """Return two lines: what a step costs, and how large a stream's state is."""
    try:
        of_step = cost(continual_model(model, seq_len))
        operations = (
            f"{of_step.multiplications:,} multiplications, {of_step.additions:,} additions, "
            f"{of_step.exponentials:,} exponentials"
        )
    except ValueError as error:  # A session may run a layer that ct.cost does not know.
        operations = f"its operations are not counted. {error}"
    return (
        f"a step: {operations}\n"
        f"a stream: {session.state_bytes:,} bytes; receptive field {session.receptive_field} "
        f"steps, delay {session.delay}"
    )


def read_recordings(path: str | os.PathLike[str], session: Session) -> list[npt.NDArray[Any]]:
    """Read recordings to stream: an array `(streams, T, ...)` for each input of a session.

    Args:
        path: A `.npy` file with the array of the only input, or an `.npz` file with an array for
            each input, by name. With one stream, the axis of streams may be left out.

    Raises:
        ValueError: If they do not fit the model's inputs.
    """
    found = np.load(path, allow_pickle=False)
    arrays = [found] if isinstance(found, np.ndarray) else found
    names = [spec.name for spec in session.inputs]
    if not isinstance(found, np.ndarray):
        if set(found.files) != set(names):
            raise ValueError(
                f"Expected {path} to have an array for each of the model's inputs, {names}, but "
                f"got {found.files}"
            )
        arrays = [found[name] for name in names]
    elif len(names) > 1:
        raise ValueError(
            f"Expected an .npz file with an array for each of the model's inputs, {names}, but got "
            f"the one array in {path}"
        )
    recordings = []
    for spec, array in zip(session.inputs, arrays, strict=True):
        given = array.shape
        if array.ndim == 1 + len(spec.shape):
            array = array[None]
        if array.ndim != 2 + len(spec.shape) or array.shape[2:] != spec.shape:
            shape = ", ".join(map(str, spec.shape))
            raise ValueError(
                f"Expected recordings of {spec.name} of shape (T, {shape}) or (streams, T, "
                f"{shape}), but got {given} in {path}"
            )
        if not (
            np.can_cast(array.dtype, spec.dtype, "same_kind") and array.size and array.dtype != "O"
        ):
            raise ValueError(
                f"Expected recordings of {spec.name} to be {spec.dtype} and not empty, but got "
                f"{array.dtype} of shape {given} in {path}"
            )
        recordings.append(np.ascontiguousarray(array, spec.dtype))
    if len({array.shape[:2] for array in recordings}) > 1:
        shapes = [array.shape for array in recordings]
        raise ValueError(
            f"Expected the same streams and steps in every input, but got shapes {shapes} in {path}"
        )
    return recordings


class Comparison(NamedTuple):
    """The result of streaming the same recordings through a Keras model and a session.

    Attributes:
        streams, steps: How many streams and steps were taken.
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
) -> Comparison:
    """Stream recordings through a Keras model and through a session of it, and compare.

    Args:
        model, seq_len: As in `ct.Session`.
        session: A `Session` of the model.
        recordings: The result of `read_recordings`.

    Returns:
        A `Comparison`.
    """
    twin = streaming_twin(model, seq_len)
    structure = twin._graph.model._inputs_struct
    if isinstance(structure, (list, tuple)) and len(structure) == 1:
        structure = structure[0]
    outputs = twin.call_steps(keras.tree.pack_sequence_as(structure, recordings))
    by_keras = [np.asarray(y) for y in keras.tree.flatten(outputs)]
    streams, steps = recordings[0].shape[:2]
    ids = session.open(streams)
    taken = []
    for t in range(steps):
        step = [np.ascontiguousarray(x[:, t]) for x in recordings]
        outputs = session.step(keras.tree.pack_sequence_as(structure, step), ids)
        taken.append(keras.tree.flatten(outputs))
    session.close(ids)
    differences, sizes = [], []
    for i, expected in enumerate(by_keras):
        # If the model has a delay, Keras gives no outputs for the first steps.
        got = np.stack([outputs[i] for outputs in taken], axis=1)[:, -expected.shape[1] :]
        expected = expected.astype(np.float64)
        differences.append(np.max(np.abs(got - expected), initial=0, where=got != expected))
        sizes.append(np.max(np.abs(expected), initial=0))
    return Comparison(streams, steps, float(np.max(differences)), float(np.max(sizes)))
