"""Checks of the inputs and options of continual layers."""

from typing import Any

import keras
import tensorflow as tf

# A tensor, or anything that `tf.convert_to_tensor` takes.
TensorLike = Any

HALF_DTYPES = ("bfloat16", "float16")
_AXES = {
    "regular": "(B, T, E), windows of T steps",
    "step": "(M, E), one step of M streams",
    "steps": "(M, T, E), T steps of M streams",
}


def expect_given(name: str, x: Any) -> None:
    """Raise ValueError if an input is None."""
    if x is None:
        raise ValueError(
            f'Expected {name}, but got None. (Unless warm_up="partial", a step of a continual '
            "layer returns None while its window fills.)"
        )


def step_input(name: str, x: Any, mode: str, dtype: str) -> tf.Tensor:
    """Return an input of a call as a tensor of the layer's compute dtype.

    Args:
        name: The name of the argument, for the message.
        x: The input as the user gave it.
        mode: The mode of the call: "regular", "step" or "steps".
        dtype: The layer's compute dtype. Other floating dtypes are cast to it, as Keras does.

    Raises:
        ValueError: If the input is None, has another rank, or its dtype is not floating.
    """
    expect_given(f"{name} of shape {_AXES[mode]}", x)
    x = tf.convert_to_tensor(x)
    if x.shape.rank != (2 if mode == "step" else 3):
        raise ValueError(f"Expected {name} of shape {_AXES[mode]}, but got {tuple(x.shape)}")
    if not x.dtype.is_floating:
        raise ValueError(f"Expected {name} of a floating dtype, but got {x.dtype.name}")
    return tf.cast(x, dtype)


def without_keras_mask(x: tf.Tensor) -> tf.Tensor:
    """Return x without a mask of Keras: another tensor, if x carries one.

    `keras.layers.MultiHeadAttention.call` reads the mask of its query from the tensor.
    """
    return x if getattr(x, "_keras_mask", None) is None else tf.identity(x)


def check_same_rows(**inputs: tf.Tensor) -> None:
    """Raise ValueError unless tensors `(M, E)` or `(M, T, E)` agree in M and T, and T is not 0."""
    first = next(iter(inputs.values()))
    for name, x in inputs.items():
        if not x.shape[:-1].is_compatible_with(first.shape[:-1]):
            expected = (*first.shape[:-1], x.shape[-1])
            raise ValueError(f"Expected {name} of shape {expected}, but got {tuple(x.shape)}")
    if first.shape.rank == 3 and first.shape[1] == 0:
        raise ValueError(f"Expected at least one step, but got {tuple(first.shape)}")


def rows_and_steps(
    x: tf.Tensor, mode: str = "steps", time_axis: int = 1
) -> tuple[int | tf.Tensor, int | tf.Tensor]:
    """Return M and T of a call's input: ints if they are known, otherwise int32 scalar tensors.

    Args:
        x: `(M, T, ...)`; of one step `(M, ...)`.
        mode: "step", whose T is 1, or "steps".
        time_axis: The axis of T.
    """
    rows = _size(x, 0)
    return rows, 1 if mode == "step" else _size(x, time_axis)


def _size(x: tf.Tensor, axis: int) -> int | tf.Tensor:
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def in_blocks(x: tf.Tensor, block: int) -> tf.Tensor:
    """Return steps `(M, T, ...)`; if T is not known, they fail unless it is a multiple of `block`.

    Raises:
        tf.errors.InvalidArgumentError: When the graph runs, if T is no such multiple, or 0.
    """
    if block == 1 or x.shape[1] is not None:
        return x
    steps = tf.shape(x)[1]
    whole = [
        tf.debugging.assert_positive(steps, "Expected at least one step, but got 0"),
        tf.debugging.assert_equal(steps % block, 0, f"Expected a multiple of {block} steps"),
    ]
    with tf.control_dependencies(whole):
        return tf.identity(x)


def check_features(name: str, x: tf.Tensor, features: int) -> None:
    """Raise ValueError unless the last axis of a tensor is what the layer was built for."""
    if x.shape[-1] != features:
        raise ValueError(
            f"Expected {name} of shape {(*x.shape[:-1], features)}, but got {tuple(x.shape)}"
        )


def checked_cache_dtype(dtype: Any, compute_dtype: str) -> str | None:
    """Return the name of the dtype of kept keys and values, or None for the compute dtype.

    Raises:
        ValueError: If it is neither the compute dtype nor, under float32, a 16-bit dtype.
    """
    if dtype is None:
        return None
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype == compute_dtype or (dtype in HALF_DTYPES and compute_dtype == "float32"):
        return dtype
    raise ValueError(
        f"Expected cache_dtype to be None or the compute dtype, {compute_dtype}, or under float32 "
        f"one of {HALF_DTYPES}, but got {dtype!r}"
    )


def checked_weights_dtype(dtype: Any, compute_dtype: str) -> str | None:
    """Return the name of the dtype of a step's kernels, or None for the layer's own variables.

    Raises:
        ValueError: If it is neither the compute dtype nor, under float32, bfloat16.
    """
    if dtype is None or keras.backend.standardize_dtype(dtype) == compute_dtype:
        return None
    if keras.backend.standardize_dtype(dtype) == "bfloat16" and compute_dtype == "float32":
        return "bfloat16"
    raise ValueError(
        f"Expected weights_dtype to be None or the compute dtype, {compute_dtype}, or under "
        f'float32 "bfloat16", but got {dtype!r}'
    )
