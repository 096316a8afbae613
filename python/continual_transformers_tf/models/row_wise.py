"""The description of a tensor in a Keras model's graph, and the operations that work row by row."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.models.own_calls import computes_as


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The known facts about a tensor of the graph before the graph runs; see `StepGraph`."""

    kind: str  # "window", "newest", "sample" or "whole".
    # Whether no row of a window depends on a later one. Only such rows never change afterwards.
    causal: bool
    receptive_field: int
    # The shape for each window. The length of a "newest" is 1 here, also if Keras does not know it.
    shape: tuple[int | None, ...]
    # How many steps late a step's row comes: it is row -1 - delay of the window.
    delay: int = 0
    delayed_by: str = ""  # The layer that last delayed it.
    # How many steps of the model's input lie between its rows.
    stride: int = 1
    # Row 0 comes after so many other rows, which have no meaning; see `Rows`.
    lag: int = 0


# Layers that compute each row of a window from that row alone.
ROW_WISE = (
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.AlphaDropout,
    keras.layers.Average,
    keras.layers.BatchNormalization,
    keras.layers.Dense,
    keras.layers.Dropout,
    keras.layers.ELU,
    keras.layers.Embedding,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.LayerNormalization,
    keras.layers.LeakyReLU,
    keras.layers.Masking,
    keras.layers.Maximum,
    keras.layers.Minimum,
    keras.layers.Multiply,
    keras.layers.Normalization,
    keras.layers.Permute,
    keras.layers.PReLU,
    keras.layers.ReLU,
    keras.layers.Rescaling,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.Subtract,
    keras.layers.TimeDistributed,
    keras.layers.UnitNormalization,
)
# Element-wise keras.ops, by the names of their classes, which are not public.
ELEMENT_WISE_OPS = {
    "Abs", "Absolute", "Add", "Cast", "Celu", "Clip", "Cos", "Divide", "Elu", "Exp", "Gelu",
    "HardShrink", "HardSigmoid", "HardSilu", "HardTanh", "LeakyRelu", "Log", "Log1p", "LogSigmoid",
    "Maximum", "Minimum", "Mish", "Multiply", "Negative", "Power", "ReLU", "Reciprocal", "Relu",
    "Relu6", "Rsqrt", "Selu", "Sigmoid", "Sign", "Silu", "Sin", "SoftShrink", "Softplus",
    "Softsign", "SparsePlus", "SparseSigmoid", "Sqrt", "Square", "Squareplus", "Subtract", "Tanh",
    "TanhShrink", "Threshold", "TrueDivide",
}  # fmt: skip
# The ops that Keras computes masks with.
MASK_OPS = {"LogicalAnd", "LogicalNot", "LogicalOr", "NotEqual"}
# Ops that work along the axis that they are given.
OPS_ALONG_AN_AXIS = {"Concatenate", "Glu", "LogSoftmax", "Softmax", "Sparsemax"}


def row_taken(
    op: keras.Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, int] | None:
    """Return (kind of the result, row) of an op that takes one row of a window, otherwise None.

    x[:, -3:-2] gives ("newest", -3), x[:, -3] gives ("sample", -3).
    """
    if name_of_op(op) != "GetItem":
        return None
    key = args[1] if len(args) > 1 else kwargs.get("key")
    if not isinstance(key, (tuple, list)) or len(key) < 2 or key[0] != slice(None):
        return None
    if not all(k is Ellipsis or k == slice(None) for k in key[2:]):
        return None
    row = key[1].start if isinstance(key[1], slice) else key[1]
    if not isinstance(row, int) or row >= 0:
        return None
    if key[1] == slice(row, row + 1 or None):
        return "newest", row
    return ("sample", row) if key[1] == row else None


def name_of_op(op: keras.Operation) -> str | None:
    """Return the name of the class of one of keras.ops; None for any other op."""
    module = type(op).__module__
    ours = module.startswith(("keras.src.ops.", "keras.src.activations."))
    return type(op).__name__ if ours else None


def is_row_wise(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a node computes each row of windows only from that row."""
    op, name = node.operation, name_of_op(node.operation)
    # Keras may pass masks (B, T) to layers in a graph, beside windows.
    masks = keras.tree.flatten(node.arguments.kwargs.get("mask"))
    tensors = [x for x in node.input_tensors if not any(x is mask for mask in masks)]
    rank = len(tensors[0].shape)
    if any(len(x.shape) != rank for x in tensors) or lengths_differ(node.input_tensors):
        return False  # One would be broadcast over the time axis of the other.
    if rank == 2:  # Token ids or masks, (B, T): their last axis is time.
        return type(op) in (keras.layers.Embedding, keras.layers.Identity) or (
            name in MASK_OPS and _same_for_all_steps(op, args, kwargs, rank)
        )
    if name == "Any":  # Over the features, this computes a mask.
        axes = [] if op.axis is None else list(np.atleast_1d(op.axis) % rank)
        return axes == [rank - 1] and not op.keepdims
    if isinstance(op, keras.layers.EinsumDense) and computes_as(op, keras.layers.EinsumDense):
        return _einsum_is_row_wise(op, rank)
    if type(op) is keras.layers.PReLU:  # It may have separate weights for each step.
        return op.alpha.shape[0] == 1
    if type(op) is keras.layers.Permute:
        return op.dims[0] == 1
    if type(op) is keras.layers.Lambda:
        return _function_is_row_wise(op, tensors)
    if type(op) in ROW_WISE or type(op) is keras.layers.Concatenate:
        return _along_features(getattr(op, "axis", ()), rank)
    if name in OPS_ALONG_AN_AXIS:
        return _along_features(op.axis, rank)
    if name == "GetItem":
        return _takes_features(args[1] if len(args) > 1 else kwargs.get("key"))
    if name == "Transpose":
        return op.axes is not None and [a % rank for a in op.axes[:2]] == [0, 1]
    if name == "Swapaxes":
        return _along_features((op.axis1, op.axis2), rank)
    element_wise = name in ELEMENT_WISE_OPS or name in MASK_OPS
    return element_wise and _same_for_all_steps(op, args, kwargs, rank)


def _function_is_row_wise(layer: keras.layers.Lambda, tensors: list[keras.KerasTensor]) -> bool:
    """Return whether a Lambda's function of windows is row-wise. Its operations of Keras tell."""
    if len(tensors) > 1:
        return False
    x = keras.KerasTensor(tensors[0].shape, tensors[0].dtype)
    try:
        graph = keras.Function(x, layer.function(x, **layer.arguments))
    except Exception:  # Whatever a user's function raises if it computes by other means.
        return False
    window = Tensor("window", True, 1, tuple(x.shape))
    nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
    values = {id(y): window for y in (x, *(y for node in nodes for y in node.outputs))}
    return all(
        is_row_wise(node, *node.arguments.fill_in(values)) for node in nodes if not node.is_input
    )


def _same_for_all_steps(
    op: keras.Operation, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int
) -> bool:
    """Return whether an operation's fixed arrays are the same for all steps of a window."""
    arrays = [x for x in keras.tree.flatten((args, kwargs)) if not isinstance(x, Tensor)]
    arrays += [getattr(op, limit) for limit in ("x_min", "x_max") if hasattr(op, limit)]
    return all(np.ndim(x) <= rank - 2 for x in arrays)


def _along_features(axis: int | Sequence[int], rank: int) -> bool:
    """Return whether none of the axes is samples or time, the first two."""
    axes = [axis] if isinstance(axis, int) else axis
    return all(a % rank > 1 for a in axes)


def _takes_features(key: Any) -> bool:
    """Return whether x[key] leaves the first two axes as they are."""
    if not isinstance(key, (tuple, list)):
        return key is Ellipsis
    for k in key[:2]:
        if k is Ellipsis:
            return True
        if not isinstance(k, slice) or k != slice(None):
            return False
    return True


def _einsum_is_row_wise(layer: keras.layers.EinsumDense, rank: int) -> bool:
    """Return whether an EinsumDense keeps the first two axes, and no weight depends on time."""
    given, kernel, output = re.split(",|->", layer.equation)
    rest = "0123456789"[: rank - len(given.replace("...", ""))]  # The axes that are not named.
    given, output = (x.replace("...", rest) for x in (given, output))
    weights = kernel + (layer.bias_axes or "")
    return given[:2] == output[:2] and given[1] not in weights


def lengths_differ(tensors: Iterable[keras.KerasTensor]) -> bool:
    """Return whether windows are known to have different lengths."""
    return len({x.shape[1] for x in tensors} - {None}) > 1
