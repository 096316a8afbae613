"""Sorting and classes of keras.ops as nodes of a plan."""

import math

import keras
import numpy as np

from continual_transformers_tf.models.lowering.keras_ops import Call, cast, fixed, floats, op
from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder, Symbol


@op("Argmax", "Argmin")
def _extreme(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    function = type(op).__name__.lower()
    y = b.reduce(x, function, call.axes(op.axis, x), op.keepdims)
    return cast(b, y, call.dtype)


def _sorted(b: PlanBuilder, x: Symbol, axis: int, function: str, descending: bool) -> Symbol:
    x = b.cast(x, b.dtype)
    return b.node(
        "sort", [x], x.shape, name="sort", function=function, axis=axis, descending=descending
    )


@op("Sort", "Argsort")
def _sort(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    if x.dtype in ("int32", "int64"):
        raise CannotLower("sorts integers: a plan sorts floats, which are not exact")
    function = "values" if type(op).__name__ == "Sort" else "indices"
    y = _sorted(b, x, call.axes(op.axis, x)[0], function, descending=False)
    return cast(b, y, call.dtype)


@op("TopK")
def _top_k(b: PlanBuilder, op: keras.Operation, call: Call) -> list[Symbol]:
    x = call.symbols[0]
    if x.dtype in ("int32", "int64"):
        raise CannotLower("sorts integers: a plan sorts floats, which are not exact")
    axis = call.axis(-1, x)
    values, places = (
        b.slice(_sorted(b, x, axis, function, descending=True), axis, 0, op.k)
        for function in ("values", "indices")
    )
    return [values, b.cast(places, "int32")]


@op("Median", "Quantile", "Percentile")
def _quantile(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    name = type(op).__name__
    if getattr(op, "method", "linear") != "linear":
        raise CannotLower(f"has method={op.method!r}: expected 'linear'")
    q = 0.5 if name == "Median" else call.argument(1, "q")
    if isinstance(q, Symbol) or np.ndim(q) > 0:
        raise CannotLower("is given several quantiles: expected one number")
    x = b.cast(call.symbols[0], b.dtype)
    axes = call.axes(op.axis, x)
    others = [a for a in range(len(x.shape)) if a not in axes]
    lead = [x.shape[a] for a in others]
    n = math.prod(x.shape[a] for a in axes)
    rows = b.reshape(b.transpose(x, [*others, *axes]), (*lead, n))
    rows = _sorted(b, rows, len(lead), "values", descending=False)
    at = float(q) * (n - 1) / (100 if name == "Percentile" else 1)
    low = min(int(at), n - 1)
    y = b.slice(rows, len(lead), low, 1)
    if at > low:
        above = b.slice(rows, len(lead), low + 1, 1)
        y = b.binary("add", b.affine(y, low + 1 - at, 0), b.affine(above, at - low, 0))
    return b.reshape(
        y, [1 if a in axes else k for a, k in enumerate(x.shape)] if op.keepdims else lead
    )


# Classes.


@op("OneHot")
def _one_hot(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if op.sparse:
        raise CannotLower("returns a sparse tensor: a plan has only dense ones")
    x, classes = call.symbols[0], op.num_classes
    axis = op.axis % (len(x.shape) + call.lead + 1) - call.lead
    if axis < 0:
        raise CannotLower("works along the axis of samples, or of time")
    expanded = b.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))
    shape = [1] * len(expanded.shape)
    shape[axis] = classes
    number = b.constant(np.arange(classes).reshape(shape))
    # Whole numbers below 2^24 are floats, and larger integers become no such number.
    return cast(b, b.binary("equal", expanded, number), call.dtype)


@op("Digitize")
def _digitize(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    bins = call.argument(1, "bins")
    if isinstance(bins, Symbol):
        raise CannotLower("is given bins that a step computes: expected constant ones")
    return digitized(b, call.symbols[0], fixed(bins, b.dtype), call.dtype)


def digitized(b: PlanBuilder, x: Symbol, bins: np.ndarray, dtype: str) -> Symbol:
    """Return how many of the bins' bounds, which increase, are not above each element."""
    expanded = b.reshape(x, (*x.shape, 1))
    reached = b.binary("greater_equal", expanded, b.constant(bins))
    return cast(b, b.reduce(reached, "sum", [len(x.shape)]), dtype)
