"""keras.ops as nodes of a plan: one function for each, by the name of its class.

The functions take a `PlanBuilder`, the operation, and a `Call`.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.models.lowering import activations
from continual_transformers_tf.models.lowering.einsum import einsum_of_several
from continual_transformers_tf.models.lowering.plan_builder import (
    Array,
    CannotLower,
    PlanBuilder,
    Symbol,
    broadcast_shapes,
    contiguous_strides,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The call of an operation, for one step of one stream.

    Attributes:
        args, kwargs: The arguments in the graph, with Symbols instead of tensors.
        lead: How many axes Keras' tensors have before those of a Symbol.
        dtype: The dtype of Keras' first output.
        shapes: The shapes of the outputs in a step; None if they are not known.
        of_rows: Whether the Symbols are several rows of a step, `[rows, ...]`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lead: int
    dtype: str
    shapes: list[tuple[int, ...] | None]
    of_rows: bool = False

    def axis(self, axis: int, x: Symbol) -> int:
        """Return the axis of a Symbol that is this axis of Keras' tensor."""
        return activations.axis_of_step(axis, x, self.lead)

    def axes(self, axis: int | Sequence[int] | None, x: Symbol) -> list[int]:
        """Return the axes of a Symbol for an axis or axes of Keras' tensor. None: all axes."""
        axes = range(len(x.shape) + self.lead) if axis is None else np.atleast_1d(axis)
        return sorted(self.axis(int(a), x) for a in axes)

    @property
    def symbols(self) -> list[Symbol]:
        """All Symbols among the arguments."""
        return [x for x in keras.tree.flatten((self.args, self.kwargs)) if isinstance(x, Symbol)]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument, by its place or by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def operand(self, place: int, name: str, b: PlanBuilder) -> "Symbol | Array":
        """Return an operand: a Symbol, or a NumPy array for a constant of the graph."""
        x = self.argument(place, name)
        rank = max(len(y.shape) for y in self.symbols) + self.lead
        if isinstance(x, Symbol):
            if len(x.shape) + self.lead != rank and x.shape:
                raise CannotLower(
                    "combines tensors of different ranks, which would mix samples: expected one "
                    "rank"
                )
            return x
        x = fixed(x, b.dtype)
        # Drop the axes of streams and steps, which a Symbol does not have.
        extra = x.ndim - (rank - self.lead)
        if extra > 0:
            if any(n != 1 for n in x.shape[:extra]):
                raise CannotLower(
                    f"is given an array of shape {list(x.shape)}, with a row for each sample"
                )
            x = x.reshape(x.shape[extra:])
        return x


def fixed(x: Any, dtype: str) -> Array:
    """Return a constant of a graph as an array."""
    if hasattr(x, "path"):  # A variable.
        x = x.value
    return np.asarray(x).astype(dtype)


def lower_op(b: PlanBuilder, op: keras.Operation, call: Call) -> list[Symbol]:
    """Lower an operation, and return a list of its outputs' Symbols."""
    lower = OPS.get(type(op).__name__)
    if lower is None:
        raise CannotLower(
            "is an operation that a plan has no node for: take the model's steps in TensorFlow, "
            "with a ct.StreamingModel"
        )
    outputs = lower(b, op, call)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


# A function of a PlanBuilder, an operation and its Call. It returns one Symbol, or a list.
Lowering = Callable[[PlanBuilder, keras.Operation, Call], Symbol | list[Symbol]]

OPS: dict[str, Lowering] = {}


def op(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function that lowers operations of these class names."""

    def register(function: Lowering) -> Lowering:
        OPS.update((name, function) for name in names)
        return function

    return register


def floats(call: Call) -> None:
    """Raise CannotLower if the output is not of floats."""
    if not keras.backend.is_float_dtype(call.dtype):
        raise CannotLower(f"computes in {call.dtype}: a plan computes only in floats")


# Element-wise.

_UNARY = {
    "Absolute": "absolute", "Abs": "absolute", "Arccos": "arccos", "Arccosh": "arccosh",
    "Arcsin": "arcsin", "Arcsinh": "arcsinh", "Arctan": "arctan", "Arctanh": "arctanh",
    "Cbrt": "cbrt", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Erf": "erf", "Erfc": "erfc",
    "Exp": "exponential", "Expm1": "expm1", "Fabs": "absolute", "Floor": "floor", "Log": "log",
    "Log1p": "log1p", "Negative": "negative", "Reciprocal": "reciprocal", "Rsqrt": "rsqrt",
    "Sign": "sign", "Sin": "sin", "Sinc": "sinc", "Sinh": "sinh", "Sqrt": "sqrt",
    "Square": "square", "Tan": "tan", "Tanh": "tanh", "Trunc": "trunc",
}  # fmt: skip


@op(*_UNARY)
def _unary(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    return b.activation(call.symbols[0], _UNARY[type(op).__name__])


# Functions that are another one times a number, before or after it.
_SCALED: dict[str, tuple[float, str, float]] = {
    "Deg2rad": (1, "linear", math.pi / 180),
    "Exp2": (math.log(2), "exponential", 1),
    "Log10": (1, "log", 1 / math.log(10)),
    "Log2": (1, "log", 1 / math.log(2)),
    "Rad2deg": (1, "linear", 180 / math.pi),
}


@op(*_SCALED)
def _scaled(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    before, function, after = _SCALED[type(op).__name__]
    x = call.symbols[0] if before == 1 else b.affine(call.symbols[0], before, 0)
    y = b.activation(x, function)
    return y if after == 1 else b.affine(y, after, 0)


@op("Round")
def _round(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = call.symbols[0]
    if op.decimals == 0:
        return b.activation(x, "round")
    factor = np.asarray(10.0**op.decimals)
    rounded = b.activation(b.affine(x, factor, 0), "round")
    return arithmetic(b, "divide", rounded, factor)


@op("OnesLike", "ZerosLike", "FullLike", "Imag")
def _constant(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, name = call.symbols[0], type(op).__name__
    value = call.operand(1, "fill_value", b) if name == "FullLike" else float(name == "OnesLike")
    if isinstance(value, Symbol):
        return cast(b, b.broadcast(value, x.shape), call.dtype)
    return cast(b, b.constant(np.broadcast_to(value, x.shape)), call.dtype)


# The numbers of an activation are attributes of its operation.
_ACTIVATIONS = {
    "Celu": "celu", "Elu": "elu", "Gelu": "gelu", "Glu": "glu", "HardShrink": "hard_shrink",
    "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu", "HardTanh": "hard_tanh",
    "LeakyRelu": "leaky_relu", "LogSigmoid": "log_sigmoid", "LogSoftmax": "log_softmax",
    "Mish": "mish", "ReLU": "relu", "Relu": "relu", "Relu6": "relu6", "Selu": "selu",
    "Sigmoid": "sigmoid", "Silu": "silu", "SoftShrink": "soft_shrink", "Softmax": "softmax",
    "Softplus": "softplus", "Softsign": "softsign", "SparsePlus": "sparse_plus",
    "SparseSigmoid": "sparse_sigmoid", "Sparsemax": "sparsemax", "Squareplus": "squareplus",
    "TanhShrink": "tanh_shrink", "Threshold": "threshold",
}  # fmt: skip


@op(*_ACTIVATIONS)
def _activation(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    name = _ACTIVATIONS[type(op).__name__]
    numbers = activations.NUMBERS.get(name, {})
    options = {key: getattr(op, key) for key in numbers if hasattr(op, key)}
    for key in ("axis", "approximate", "default_value"):
        if hasattr(op, key):
            options[key] = getattr(op, key)
    if name == "threshold":
        options["threshold"] = op.threshold
    return activations.named(b, call.symbols[0], name, call.lead, options)


_BINARY = {
    "Add": "add", "Subtract": "subtract", "Multiply": "multiply", "Divide": "divide",
    "TrueDivide": "divide", "Maximum": "maximum", "Minimum": "minimum", "Power": "power",
    "Arctan2": "arctan2", "Fmod": "fmod", "Hypot": "hypot", "Logaddexp": "logaddexp", "Mod": "mod",
}  # fmt: skip


@op(*_BINARY)
def _binary(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x, y = call.operand(0, "x1", b), call.operand(1, "x2", b)
    return arithmetic(b, _BINARY[type(op).__name__], x, y)


@op("FloorDivide")
def _floor_divide(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x, y = call.operand(0, "x1", b), call.operand(1, "x2", b)
    return b.activation(arithmetic(b, "divide", x, y), "floor")


@op("Logaddexp2")
def _logaddexp2(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    factor = np.asarray(math.log(2))
    x, y = (
        b.affine(z, factor, 0) if isinstance(z, Symbol) else z * factor
        for z in (call.operand(0, "x1", b), call.operand(1, "x2", b))
    )
    return b.affine(arithmetic(b, "logaddexp", x, y), 1 / factor, 0)


def arithmetic(b: PlanBuilder, function: str, x: Symbol | Array, y: Symbol | Array) -> Symbol:
    """Apply an element-wise function to Symbols and arrays, at least one of them a Symbol."""
    if isinstance(x, Symbol) and isinstance(y, Symbol):
        return b.binary(function, x, y)
    first = isinstance(x, Symbol)  # Whether the Symbol is the first of the two.
    symbol, array = typing.cast("tuple[Symbol, Array]", (x, y) if first else (y, x))
    shape = broadcast_shapes(symbol.shape, array.shape)
    if shape == symbol.shape:
        if function == "add":
            return b.affine(symbol, 1, array)
        if function == "multiply":
            return b.affine(symbol, array, 0)
        if function == "subtract":
            return b.affine(symbol, 1, -array) if first else b.affine(symbol, -1, array)
        if function == "divide" and first and _exactly_inverted(array):
            return b.affine(symbol, 1 / array, 0)
        if function == "power" and first and array.size == 1 and array == 2:
            return b.activation(symbol, "square")
    constant = b.constant(np.broadcast_to(array, shape))
    operands = (symbol, constant) if first else (constant, symbol)
    return b.binary(function, *operands)


def _exactly_inverted(array: Array) -> bool:
    """Return whether all elements are powers of two. Only then 1 / array is exact."""
    mantissa, _ = np.frexp(array)
    return bool((np.abs(mantissa) == 0.5).all())


@op("Clip")
def _clip(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = arithmetic(b, "maximum", call.symbols[0], fixed(op.x_min, b.dtype))
    return arithmetic(b, "minimum", x, fixed(op.x_max, b.dtype))


@op("Cast")
def _cast(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    return cast(b, call.symbols[0], op.dtype)


def cast(b: PlanBuilder, x: Symbol, dtype: str) -> Symbol:
    """Cast a Symbol to a dtype of Keras. Every float dtype becomes the plan's."""
    if keras.backend.is_float_dtype(dtype):
        return b.cast(x, b.dtype)
    if dtype in ("int32", "int64", "bool"):
        return b.cast(x, dtype)
    raise CannotLower(f"casts to {dtype}: expected floats, int32, int64 or bool")


@op("StopGradient", "Copy", "ConvertToTensor", "Conj", "Conjugate", "Real")
def _identity(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    return call.symbols[0].with_mask(None)


# Along axes.


@op("Sum", "Mean", "Max", "Amax", "Min", "Amin", "Prod")
def _reduce(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    if getattr(op, "initial", None) is not None:
        raise CannotLower("has an initial value: leave it out, and combine the result with it")
    x = call.symbols[0]
    function = {"Prod": "product"}.get(
        type(op).__name__, type(op).__name__.lower().removeprefix("a")
    )
    return b.reduce(x, function, call.axes(op.axis, x), op.keepdims)


@op("Average")
def _average(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if call.argument(1, "weights") is not None:
        raise CannotLower("has weights: multiply by them, then sum")
    x = call.symbols[0]
    return b.reduce(x, "mean", call.axes(op.axis, x))


@op("Ptp")
def _range(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = call.symbols[0]
    largest, smallest = (b.reduce(x, f, call.axes(op.axis, x), op.keepdims) for f in ("max", "min"))
    return b.binary("subtract", largest, smallest)


@op("Norm")
def _vector_norm(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = b.cast(call.symbols[0], b.dtype)
    axes = call.axes(op.axis, x)
    if op.ord in (None, "fro", 2) and (len(axes) == 1 or op.ord != 2):
        return b.activation(b.reduce(b.activation(x, "square"), "sum", axes, op.keepdims), "sqrt")
    functions = {1: "sum", np.inf: "max", -np.inf: "min"}
    if len(axes) > 1 or op.ord not in functions:
        raise CannotLower(f"is the norm of ord={op.ord}: expected None, 1, 2 or infinity")
    return b.reduce(b.activation(x, "absolute"), functions[op.ord], axes, op.keepdims)


@op("Cumsum", "Cumprod")
def _cumulative(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x, function = call.symbols[0], "sum" if type(op).__name__ == "Cumsum" else "product"
    x, axis = b.cast(x, b.dtype), call.axes(op.axis, x)[0]
    return b.node("cumulative", [x], x.shape, name=function, function=function, axis=axis)


@op("Diff")
def _difference(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = call.symbols[0]
    axis = call.axis(op.axis, x)
    for _ in range(op.n):
        n = x.shape[axis]
        x = b.binary("subtract", b.slice(x, axis, 1, n - 1), b.slice(x, axis, 0, n - 1))
    return x


@op("Var", "Std")
def _variance(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = call.symbols[0]
    axes = call.axes(op.axis, x)
    centred = b.binary("subtract", x, b.reduce(x, "mean", axes, keepdims=True))
    y = b.reduce(b.activation(centred, "square"), "mean", axes, op.keepdims)
    return b.activation(y, "sqrt") if type(op).__name__ == "Std" else y


@op("Logsumexp")
def _logsumexp(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    axes = call.axes(op.axis, x)
    highest = b.reduce(x, "max", axes, keepdims=True)
    total = b.reduce(
        b.activation(b.binary("subtract", x, highest), "exponential"), "sum", axes, keepdims=True
    )
    y = b.binary("add", b.activation(total, "log"), highest)
    rest = [n for a, n in enumerate(x.shape) if a not in axes]
    return y if op.keepdims else b.reshape(y, rest)


@op("Normalize")
def _normalize(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if op.order != 2:
        raise CannotLower(f"has order={op.order}: expected 2")
    x = call.symbols[0]
    epsilon = keras.config.epsilon() if op.epsilon is None else op.epsilon
    return unit_norm(b, x, call.axes(op.axis, x), epsilon)


def unit_norm(b: PlanBuilder, x: Symbol, axes: Sequence[int], epsilon: float) -> Symbol:
    """Divide x by its length, or by epsilon if the length is smaller."""
    return along_last(
        b, x, axes, lambda y: b.node("norm", [y], y.shape, function="unit", epsilon=epsilon**2)
    )


def along_last(
    b: PlanBuilder, x: Symbol, axes: Sequence[int], function: Callable[[Symbol], Symbol]
) -> Symbol:
    """Apply a function along several axes, merged into one last axis."""
    x = b.cast(x, b.dtype)
    others = [a for a in range(len(x.shape)) if a not in axes]
    order = [*others, *axes]
    moved = b.transpose(x, order)
    lead = moved.shape[: len(others)]
    y = function(b.reshape(moved, (*lead, math.prod(moved.shape[len(others) :]))))
    return b.transpose(b.reshape(y, moved.shape), np.argsort(order).tolist())


# Shapes.


@op("Reshape", "Ravel")
def _reshape(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    shape = call.shapes[0]
    if call.lead == 0 or shape is None:
        raise CannotLower("changes the axis of samples, or of time")
    return b.reshape(x, shape)


@op("ExpandDims", "Squeeze")
def _expand(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if call.lead == 0 or call.shapes[0] is None:
        raise CannotLower("changes the axis of samples, or of time")
    axes = [] if op.axis is None else [int(a) for a in np.atleast_1d(op.axis)]
    rank = len(call.symbols[0].shape) + call.lead + (type(op).__name__ == "ExpandDims") * len(axes)
    if any(a % rank < call.lead for a in axes):
        raise CannotLower("changes the axis of samples, or of time")
    return b.reshape(call.symbols[0], call.shapes[0])


@op("Transpose")
def _transpose(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    rank = len(x.shape) + call.lead
    return transpose(b, x, op.axes or range(rank)[::-1], call.lead)


def transpose(b: PlanBuilder, x: Symbol, axes: Sequence[int], lead: int) -> Symbol:
    """Transpose by Keras' order of axes, which must not move the axes before the Symbol's."""
    rank = len(x.shape) + lead
    axes = [a % rank for a in axes]
    if axes[:lead] != list(range(lead)):
        raise CannotLower("moves the axis of samples, or of time")
    return b.transpose(x, [a - lead for a in axes[lead:]])


@op("Swapaxes")
def _swapaxes(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    order = list(range(len(x.shape)))
    i, j = call.axis(op.axis1, x), call.axis(op.axis2, x)
    order[i], order[j] = j, i
    return b.transpose(x, order)


@op("Moveaxis")
def _moveaxis(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    source = [call.axis(int(a), x) for a in np.atleast_1d(op.source)]
    target = [call.axis(int(a), x) for a in np.atleast_1d(op.destination)]
    order = [a for a in range(len(x.shape)) if a not in source]
    for to, a in sorted(zip(target, source, strict=True)):
        order.insert(to, a)
    return b.transpose(x, order)


@op("BroadcastTo")
def _broadcast_to(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    shape = call.shapes[0]
    if shape is None:
        raise CannotLower("changes the axis of samples, or of time")
    return b.broadcast(call.symbols[0], shape)


@op("Flip")
def _flip(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    strides, offset = contiguous_strides(x.shape), 0
    for a in call.axes(op.axis, x):
        offset += (x.shape[a] - 1) * strides[a]
        strides[a] = -strides[a]
    return b.strided(x, x.shape, strides, offset, name="flip")


@op("Repeat")
def _repeat(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    if op.axis is None:
        raise CannotLower("changes the axis of samples, or of time")
    a, n = call.axis(op.axis, x), op.repeats
    if not isinstance(n, int):
        return _along(b, x, a, np.repeat(np.arange(x.shape[a]), n).tolist())
    strides = contiguous_strides(x.shape)
    y = b.strided(
        x, (*x.shape[: a + 1], n, *x.shape[a + 1 :]), [*strides[: a + 1], 0, *strides[a + 1 :]]
    )
    return b.reshape(y, (*x.shape[:a], x.shape[a] * n, *x.shape[a + 1 :]))


@op("Tile")
def _tile(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    repeats = [int(n) for n in np.atleast_1d(op.repeats)]
    repeats = [1] * (len(x.shape) + call.lead - len(repeats)) + repeats
    extra = len(repeats) - len(x.shape)
    if any(n != 1 for n in repeats[:extra]):
        raise CannotLower("tiles the axis of samples, or of time")
    repeats = repeats[extra:]
    strides = contiguous_strides(x.shape)
    shape = [m for n, size in zip(repeats, x.shape, strict=True) for m in (n, size)]
    y = b.strided(x, shape, [s for stride in strides for s in (0, stride)])
    return b.reshape(y, [n * size for n, size in zip(repeats, x.shape, strict=True)])


@op("Roll")
def _roll(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0].with_mask(None)
    if op.axis is None:
        raise CannotLower("changes the axis of samples, or of time")
    shifts, axes = np.broadcast_arrays(np.atleast_1d(op.shift), np.atleast_1d(op.axis))
    for shift, axis in zip(shifts.tolist(), axes.tolist(), strict=True):
        a = call.axis(axis, x)
        n = x.shape[a]
        if shift % n:
            x = b.concat([b.slice(x, a, n - shift % n, shift % n), b.slice(x, a, 0, -shift % n)], a)
    return x


@op("Pad")
def _pad(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    value = call.argument(1, "constant_values")
    width = [tuple(pair) for pair in op.pad_width]
    if any(pair != (0, 0) for pair in width[: call.lead]):
        raise CannotLower("pads the axis of samples, or of time")
    x = call.symbols[0]
    if op.mode == "constant":
        return pad(b, x, width[call.lead :], 0 if value is None else value)
    for a, pair in enumerate(width[call.lead :]):
        if pair != (0, 0):
            x = _along(b, x, a, np.pad(np.arange(x.shape[a]), pair, mode=op.mode).tolist())
    return x


def pad(b: PlanBuilder, x: Symbol, width: Sequence[tuple[int, int]], value: float = 0) -> Symbol:
    """Pad x with (before, after) more elements along each axis."""
    for a, (before, after) in enumerate(width):
        parts = []
        for n, place in ((before, 0), (after, 1)):
            if n:
                shape = (*x.shape[:a], n, *x.shape[a + 1 :])
                parts.append((place, b.constant(np.full(shape, value), x.dtype)))
        if parts:
            x = b.concat(
                [*(p for place, p in parts if not place), x, *(p for place, p in parts if place)], a
            )
    return x


@op("Concatenate")
def _concatenate(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    return concatenate(b, call.argument(0, "xs"), op.axis, call)


def concatenate(b: PlanBuilder, xs: Sequence[Any], axis: int, call: Call) -> Symbol:
    """Concatenate Symbols and constant arrays along an axis of Keras' tensors."""
    first = next(x for x in xs if isinstance(x, Symbol))
    axis = call.axis(axis, first)
    same = {x.dtype for x in xs if isinstance(x, Symbol)}
    dtype = same.pop() if len(same) == 1 else b.dtype
    symbols = []
    for x in xs:
        if not isinstance(x, Symbol):
            x = np.asarray(fixed(x, dtype))
            if x.ndim != len(first.shape) + call.lead or any(n != 1 for n in x.shape[: call.lead]):
                raise CannotLower(
                    f"is given an array of shape {list(x.shape)}, with a row for each sample"
                )
            x = b.constant(x.reshape(x.shape[call.lead :]), dtype)
        symbols.append(b.cast(x, dtype))
    return b.concat(symbols, axis)


@op("Stack")
def _stack(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    xs = call.argument(0, "x")
    if not all(isinstance(x, Symbol) for x in xs):
        raise CannotLower("stacks constant arrays: expected only tensors")
    rank = len(xs[0].shape) + call.lead + 1
    axis = op.axis % rank - call.lead
    if axis < 0:
        raise CannotLower("stacks along the axis of samples, or of time")
    shape = (*xs[0].shape[:axis], 1, *xs[0].shape[axis:])
    return b.concat([b.reshape(x, shape) for x in xs], axis)


@op("Split", "ArraySplit")
def _split(b: PlanBuilder, op: keras.Operation, call: Call) -> list[Symbol]:
    x = call.symbols[0]
    axis = call.axis(op.axis, x)
    n, parts = x.shape[axis], op.indices_or_sections
    if isinstance(parts, int):
        size, rest = divmod(n, parts)
        sizes = [size + (i < rest) for i in range(parts)]
        ends = np.cumsum(sizes)[:-1].tolist()
    else:
        ends = [int(i) for i in parts]
    starts = [0, *ends]
    return [
        b.slice(x, axis, start, end - start) for start, end in zip(starts, [*ends, n], strict=True)
    ]


@op("Unstack")
def _unstack(b: PlanBuilder, op: keras.Operation, call: Call) -> list[Symbol]:
    x = call.symbols[0]
    axis = call.axis(op.axis, x)
    rest = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [b.reshape(b.slice(x, axis, i, 1), rest) for i in range(x.shape[axis])]


@op("Take")
def _take(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, indices = call.symbols[0], call.argument(1, "indices")
    if isinstance(indices, Symbol) or op.axis is None:
        raise CannotLower(
            "takes by indices that a step computes, or without an axis: expected constant indices"
        )
    axis = call.axis(op.axis, x)
    indices = np.asarray(indices)
    taken = _along(b, x, axis, [int(i) for i in indices.reshape(-1)])
    return b.reshape(taken, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _along(b: PlanBuilder, x: Symbol, axis: int, indices: list[int]) -> Symbol:
    """Take the elements with these indices along one axis."""
    n = x.shape[axis]
    if any(not -n <= i < n for i in indices):
        raise CannotLower(f"takes the elements {indices} of an axis of {n}")
    indices = [i % n for i in indices]
    steps = {after - i for i, after in itertools.pairwise(indices)} or {1}
    if len(steps) == 1:  # Evenly spaced: a slice.
        return b.slice(x, axis, indices[0], len(indices), steps.pop())
    return b.concat([b.slice(x, axis, i, 1) for i in indices], axis)


@op("GetItem")
def _get_item(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, key = call.symbols[0], call.argument(1, "key")
    return get_item(b, x, key, call.lead)


def get_item(b: PlanBuilder, x: Symbol, key: Any, lead: int) -> Symbol:
    """Return x[key], with a key for the axes of Keras' tensor."""
    key = list(key) if isinstance(key, (tuple, list)) else [key]
    rank = len(x.shape) + lead
    named = sum(k is not None and k is not Ellipsis for k in key)
    if not any(k is Ellipsis for k in key):
        key.append(Ellipsis)
    at = next(i for i, k in enumerate(key) if k is Ellipsis)
    key[at : at + 1] = [slice(None)] * (rank - named)
    for k in key[:lead]:
        if not (isinstance(k, slice) and k == slice(None)):
            raise CannotLower("indexes samples or steps of time: expected `:` for these axes")
    strides, sizes = contiguous_strides(x.shape), list(x.shape)
    shape, picked, offset = [], [], 0
    for k in key[lead:]:
        if k is None:
            shape.append(1)
            picked.append(0)
            continue
        n, stride = sizes.pop(0), strides.pop(0)
        if isinstance(k, slice):
            start, stop, step = k.indices(n)
            shape.append(len(range(start, stop, step)))
            picked.append(stride * step)
            offset += start * stride
        elif isinstance(k, (int, np.integer)) and -n <= k < n:
            offset += int(k) % n * stride
        else:
            raise CannotLower(
                f"is indexed by {k!r}: expected integers in range, slices, ... and None"
            )
    if math.prod(shape) == 0:
        raise CannotLower("returns no elements")
    if (
        math.prod(shape) == x.size and offset == 0 and all(s >= 0 for s in picked)
    ):  # All elements, in their order.
        return b.reshape(x, shape).with_mask(None)
    return b.strided(x, shape, picked, offset, name="slice")


# Products.


def _fixed_second(call: Call) -> tuple[Symbol, Any]:
    x, y = call.argument(0, "x1"), call.argument(1, "x2")
    if not isinstance(x, Symbol) or isinstance(y, Symbol):
        raise CannotLower(
            "multiplies two tensors, which would mix samples: use matmul or einsum, which multiply "
            "those of one sample"
        )
    return x, y


def _product(b: PlanBuilder, x: Symbol, y: Any, axes: Sequence[int]) -> Symbol:
    """Contract the last axes of x with these axes of a constant y."""
    count = len(axes)
    rest = [a for a in range(len(y.shape)) if a not in axes]
    lead = x.shape[: len(x.shape) - count]
    size = math.prod(x.shape[len(x.shape) - count :])
    kernel = b.variable(
        y,
        (size, -1),
        transform=lambda array: array.transpose([*axes, *rest]),
        kernel=True,
        name=scoped(b, "kernel"),
    )
    product = b.dense(b.reshape(b.cast(x, b.dtype), (*lead, size)), kernel)
    return b.reshape(product, (*lead, *(y.shape[a] for a in rest)))


@op("Matmul")
def _matmul(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, y = (
        z if hasattr(z, "shape") else np.asarray(z)
        for z in (call.argument(0, "x1"), call.argument(1, "x2"))
    )
    if isinstance(x, Symbol) and len(y.shape) <= 2 and not isinstance(y, Symbol):
        return _product(b, x, y, [max(len(y.shape) - 2, 0)])
    if len(call.symbols) > 1:
        floats(call)
    # How many axes Keras' operands have. Each has those of samples and time, or is fixed.
    ranks = [len(z.shape) + (call.lead if isinstance(z, Symbol) else 0) for z in (x, y)]
    if min(ranks) < 2 or any(isinstance(z, Symbol) and len(z.shape) < 2 for z in (x, y)):
        raise CannotLower(
            "multiplies matrices that have samples, or steps, as rows or columns: expected "
            "matrices within a step"
        )
    return einsum_of_several(b, "...ij,...jk->...ik", (x, y), call.lead, scoped(b, "kernel"))


@op("Dot")
def _dot(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, y = _fixed_second(call)
    y = y if hasattr(y, "shape") else np.asarray(y)
    rank = len(y.shape)
    if rank == 0:
        return arithmetic(b, "multiply", x, fixed(y, b.dtype))
    return _product(b, x, y, [max(rank - 2, 0)])


@op("Tensordot")
def _tensordot(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, y = _fixed_second(call)
    y, axes = y if hasattr(y, "shape") else np.asarray(y), op.axes
    if isinstance(axes, int):
        axes = [list(range(-axes, 0)), list(range(axes))]
    first, second = (np.atleast_1d(a).tolist() for a in axes)
    summed = [call.axis(a, x) for a in first]
    order = [a for a in range(len(x.shape)) if a not in summed] + summed
    return _product(b, b.transpose(x, order), y, [a % len(y.shape) for a in second])


@op("Einsum")
def _einsum(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if len(call.symbols) > 1:
        floats(call)
    operands = [x if hasattr(x, "shape") else np.asarray(x) for x in call.args]
    return einsum_of_several(b, op.subscripts, operands, call.lead, scoped(b, "kernel"))


def scoped(b: PlanBuilder, name: str) -> str:
    """Return a name within the scope of the layer or operation that is being lowered."""
    return f"{b.scope}/{name}" if b.scope else name
