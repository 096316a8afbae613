"""Recordings in files: what `check`, `pack --check` and `load` stream."""

import os
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from continual_transformers_tf.session import Session


def read_recordings(path: str | os.PathLike[str], session: Session) -> list[npt.NDArray[Any]]:
    """Read recordings to stream: an array `(streams, T, ...)` for each input of a session.

    Args:
        path: A `.npy` file with the array of the only input, or an `.npz` file with an array for
            each input, by name. With one stream, the axis of streams may be left out.

    Returns:
        Arrays `(streams, steps of the session, *spec.shape)`. A model with strides takes a block of
        steps in each; a rest at the end that fills no block is left out.

    Raises:
        ValueError: If they do not fit the model's inputs.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected an .npy or .npz file of numbers, as np.save writes it, but NumPy cannot "
            f"read {path}"
        ) from error
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
        features = spec.shape[1:] if session.block > 1 else spec.shape
        if array.ndim == 1 + len(features):
            array = array[None]
        if array.ndim != 2 + len(features) or array.shape[2:] != features:
            shape = ", ".join(map(str, features))
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
        if session.block > 1:
            steps = array.shape[1] // session.block
            array = array[:, : steps * session.block].reshape(len(array), steps, *spec.shape)
            if steps == 0:
                raise ValueError(
                    f"Expected recordings of at least {session.block} steps, which the model takes "
                    f"at once, but got {given} in {path}"
                )
        recordings.append(np.ascontiguousarray(array, spec.dtype))
    if len({array.shape[:2] for array in recordings}) > 1:
        shapes = [array.shape for array in recordings]
        raise ValueError(
            f"Expected the same streams and steps in every input, but got shapes {shapes} in {path}"
        )
    return recordings
