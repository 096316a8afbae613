"""`ct.row_wise`: the user's word that a layer or function works row by row, and its check."""

import functools
import inspect
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.models.own_calls import computes_as

Marked = TypeVar("Marked")

_MARK = "_continual_row_wise"
_LONGEST = 16  # Windows of more steps than this are not needed to see that rows depend on others.
_BOUNDS = {"float64": 1e-9, "float32": 1e-4}  # Of the largest output; otherwise that of 16 bits.
_BOUND_OF_16_BITS = 3e-2


def row_wise(layer_or_function: Marked) -> Marked:
    """Say that a layer or function computes each row of a window only from that row: a decorator.

    A layer of your own is not read, and a function is trusted only if it is made of `keras.ops`
    along features. With this mark they stream below attention:

    ```python
    @keras.saving.register_keras_serializable()
    @ct.row_wise
    class Gate(keras.layers.Layer):
        def call(self, x):
            return x * tf.nn.sigmoid(x[..., ::-1])
    ```

    The mark is checked on random data whenever a model is converted or streamed: each row of a
    window must stay the same if only other rows change, and if the row comes alone. A session takes
    what is made of `keras.ops`; a `ct.StreamingModel` takes any.

    The mark belongs to the class or function, so it survives saving if that is registered with
    Keras. A subclass with a `call` of its own needs its own mark.

    Args:
        layer_or_function: A class of `keras.layers.Layer`, or a function of windows for an
            activation or a `keras.layers.Lambda`.

    Returns:
        The same class or function.

    Raises:
        TypeError: If it is neither, or a function that can have no mark.
    """
    marked: Any = layer_or_function
    is_class = inspect.isclass(marked) and issubclass(marked, keras.layers.Layer)
    if not is_class and not inspect.isroutine(marked):
        raise TypeError(
            "Expected a class of keras.layers.Layer, or a function of windows, but got "
            f"{layer_or_function!r}. For a layer, mark its class"
        )
    try:
        setattr(marked, _MARK, marked)
    except AttributeError as error:
        raise TypeError(
            f"Expected a function that can have a mark, but got {layer_or_function!r}: write a "
            "function that calls it, and mark that"
        ) from error
    return layer_or_function


def is_marked(layer_or_function: Any) -> bool:
    """Return whether a layer, or a function, was marked, with the computation that it has now."""
    if isinstance(layer_or_function, keras.layers.Layer):
        marked = getattr(type(layer_or_function), _MARK, None)
        return marked is not None and computes_as(layer_or_function, marked)
    while isinstance(layer_or_function, functools.partial):
        layer_or_function = layer_or_function.func
    return getattr(layer_or_function, _MARK, None) is layer_or_function is not None


def relies_on_mark(layer: Any) -> bool:
    """Return whether a layer was marked, or calls a marked function or layer."""
    parts = [layer, *(getattr(layer, name, None) for name in ("activation", "function"))]
    within = getattr(layer, "layer", None)  # Of a wrapper.
    return any(is_marked(part) for part in parts if part is not None) or (
        isinstance(within, keras.layers.Layer) and relies_on_mark(within)
    )


def difference_from_mark(node: Any) -> str | None:
    """Return in words how a marked node of Keras' graph is not row-wise on random data, or None."""
    lengths = {x.shape[1] for x in node.input_tensors} - {None}
    length = min([*lengths, _LONGEST]) if lengths else 5
    with tf.init_scope():
        random = np.random.default_rng(0)
        given = [_random(random, x, length) for x in node.input_tensors]
        other = [_random(random, x, length) for x in node.input_tensors]
        try:
            return _difference(node, given, other, length)
        except Exception as error:  # Whatever a user's layer raises.
            reason = str(error).strip().split("\n")[0]
            return f"it cannot be called on windows of any length: {reason}"


def _difference(
    node: Any, given: list[np.ndarray], other: list[np.ndarray], length: int
) -> str | None:
    for windows in ([x[:, :1] for x in given], given):
        whole = _call(node, windows)
        for x, y in ((windows[0], y) for y in whole):
            if y.shape[:2] != x.shape[:2]:
                return f"it returns {y.shape} for windows {x.shape}: expected a row for each row"
    for row in range(length):
        mixed = [np.concatenate([z[:, :row], x[:, row : row + 1], z[:, row + 1 :]], 1)
                 for x, z in zip(given, other, strict=True)]  # fmt: skip
        for what, windows, at in (
            ("if the other rows change", mixed, row),
            ("if it comes alone", [x[:, row : row + 1] for x in given], 0),
        ):
            for y, z in zip(whole, _call(node, windows), strict=True):
                error = _relative(y[:, row], z[:, at])
                if error > _BOUNDS.get(y.dtype.name, _BOUND_OF_16_BITS):
                    return (
                        f"row {row} of a window of {length} steps changes {what}, by {error:.2g} "
                        "of its largest number"
                    )
    return None


def _call(node: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    values = {id(x): tf.constant(y) for x, y in zip(node.input_tensors, inputs, strict=True)}
    args, kwargs = node.arguments.fill_in(values)
    kwargs.pop("mask", None)
    if getattr(node.operation, "_call_has_training_arg", False):
        kwargs["training"] = False
    return [np.asarray(y) for y in keras.tree.flatten(node.operation(*args, **kwargs))]


def _random(random: np.random.Generator, x: keras.KerasTensor, length: int) -> np.ndarray:
    shape = (2, length, *(1 if n is None else n for n in x.shape[2:]))
    if "int" in x.dtype or x.dtype == "bool":
        return random.integers(0, 2, shape).astype(x.dtype)  # Every table has two rows.
    return random.normal(size=shape).astype(tf.as_dtype(x.dtype).as_numpy_dtype)


def _relative(y: np.ndarray, z: np.ndarray) -> float:
    """Return the largest difference, over the largest number of y; infinity if NaN differs."""
    y, z = y.astype("float64"), z.astype("float64")
    if (np.isfinite(y) != np.isfinite(z)).any():
        return np.inf
    finite = np.isfinite(y)
    largest = np.abs(y[finite]).max(initial=0.0)
    return float(np.abs(y[finite] - z[finite]).max(initial=0.0) / (largest or 1.0))
