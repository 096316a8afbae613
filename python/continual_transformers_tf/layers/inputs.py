"""What every continual layer asks of its inputs and options."""

import keras
import tensorflow as tf

WARM_UPS = ("none", "partial")
HALF_DTYPES = ("bfloat16", "float16")
_AXES = {
    "regular": "(B, T, E), windows of T steps",
    "step": "(M, E), one step of M streams",
    "steps": "(M, T, E), T steps of M streams",
}


def expect_given(name, x):
    """Raises ValueError if an input is None."""
    if x is None:
        raise ValueError(
            f"Expected {name}, but got None. (A step of a continual layer gives None while its "
            'window fills, but with warm_up="partial".)'
        )


def step_input(name, x, mode, dtype):
    """An input of a call, as a tensor of the layer's compute dtype.

    Args:
        name: of the argument, for the message.
        x: what the user gave.
        mode: that of the call: "regular", "step" or "steps".
        dtype: the layer's compute dtype; other floating dtypes are cast to it, as Keras does.

    Raises:
        ValueError: if there is none, the rank is another, or the dtype not floating.
    """
    expect_given(f"{name} of shape {_AXES[mode]}", x)
    x = tf.convert_to_tensor(x)
    if x.shape.rank != (2 if mode == "step" else 3):
        raise ValueError(f"Expected {name} of shape {_AXES[mode]}, but got {tuple(x.shape)}")
    if not x.dtype.is_floating:
        raise ValueError(f"Expected {name} of a floating dtype, but got {x.dtype.name}")
    return tf.cast(x, dtype)


def without_keras_mask(x):
    """Return a tensor that carries no mask of Keras, as another tensor if it carries one.

    `keras.layers.MultiHeadAttention.call` reads the mask of its query from the tensor.
    """
    return x if getattr(x, "_keras_mask", None) is None else tf.identity(x)


def check_same_rows(**inputs):
    """Raises ValueError unless tensors `(M, E)` or `(M, T, E)` agree in M and T, which is not 0."""
    first = next(iter(inputs.values()))
    for name, x in inputs.items():
        if not x.shape[:-1].is_compatible_with(first.shape[:-1]):
            expected = (*first.shape[:-1], x.shape[-1])
            raise ValueError(f"Expected {name} of shape {expected}, but got {tuple(x.shape)}")
    if first.shape.rank == 3 and first.shape[1] == 0:
        raise ValueError(f"Expected at least one step, but got {tuple(first.shape)}")


def rows_and_steps(x):
    """M and T of a tensor (M, T, ...): ints where they are known, otherwise int32 scalars."""
    return tuple(tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis] for axis in range(2))


def check_features(name, x, features):
    """Raises ValueError unless the last axis of a tensor is what the layer was built for."""
    if x.shape[-1] != features:
        raise ValueError(
            f"Expected {name} of shape {(*x.shape[:-1], features)}, but got {tuple(x.shape)}"
        )


def checked_cache_dtype(dtype, compute_dtype):
    """The name of what keys and values are kept in; None, for the compute dtype, is itself.

    Raises:
        ValueError: if it is neither the compute dtype, nor a half of float32.
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


def checked_weights_dtype(dtype, compute_dtype):
    """The name of what a step's kernels are kept in; None for the layer's own variables.

    Raises:
        ValueError: if it is neither the compute dtype, nor bfloat16 under float32.
    """
    if dtype is None or keras.backend.standardize_dtype(dtype) == compute_dtype:
        return None
    if keras.backend.standardize_dtype(dtype) == "bfloat16" and compute_dtype == "float32":
        return "bfloat16"
    raise ValueError(
        f"Expected weights_dtype to be None or the compute dtype, {compute_dtype}, or under "
        f'float32 "bfloat16", but got {dtype!r}'
    )
