"""The description of a tensor in a Keras model's graph, and the operations that work row by row.

An operation works row by row if it computes each row of a window `(B, T, ...)` only from that row,
for every T. The tables `OPS` and `LAYERS` have a predicate for each operation of `keras.ops` and
each layer: it returns whether a call leaves samples and time alone. An operation that is in no
table is refused, unless the user says with `ct.row_wise` that it works row by row.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.models.own_calls import computes_as
from continual_transformers_tf.models.row_wise_mark import is_marked


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


@dataclasses.dataclass(frozen=True)
class Call:
    """The call of an operation on windows.

    Attributes:
        op: The operation.
        args, kwargs: Its arguments, with a `Tensor` in the place of each window.
        shapes: The shapes of the windows.
        outputs: The shapes of the outputs.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: list[tuple[int | None, ...]]
    outputs: list[tuple[int | None, ...]]

    @property
    def rank(self) -> int:
        """The number of axes of the windows, which all have the same."""
        return len(self.shapes[0])

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument, by its place or by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def arrays(self) -> list[Any]:
        """The fixed arrays and numbers among the arguments."""
        return [x for x in keras.tree.flatten((self.args, self.kwargs)) if _is_array(x)]


Predicate = Callable[[Call], bool]


def _is_array(x: Any) -> bool:
    return not isinstance(x, (Tensor, str)) and (hasattr(x, "shape") or np.isscalar(x))


# Predicates.


def _features(axis: Any, rank: int) -> bool:
    """Return whether an axis, or each of several, is none of the first two: samples and time."""
    if axis is None:  # Ops take this for all axes.
        return False
    axes = [int(a) for a in np.atleast_1d(np.asarray(axis))]
    return all(-rank <= a < rank and a % rank > 1 for a in axes)


def _same_for_all_steps(call: Call) -> bool:
    """Return whether the fixed arrays, broadcast to the windows, are the same for all steps."""
    own = [getattr(call.op, name, None) for name in ("x_min", "x_max", "nan", "posinf", "neginf")]
    arrays = [*call.arrays, *(x for x in own if x is not None)]
    return all(_is_same_for_all_steps(x, call.rank) for x in arrays)


def _is_same_for_all_steps(x: Any, rank: int) -> bool:
    shape = tuple(np.shape(x) if np.isscalar(x) else x.shape)
    of_features = min(len(shape), rank - 2)
    return len(shape) <= rank and all(n == 1 for n in shape[: len(shape) - of_features])


def _along(*names: str, new_axes: bool = False) -> Predicate:
    """Return the predicate of an op that works along axes, its attributes of these names.

    Args:
        *names: The attributes.
        new_axes: Whether these axes are new ones, of its output.
    """

    def is_row_wise(call: Call) -> bool:
        axes = [getattr(call.op, name) for name in names]
        made = sum(np.size(a) for a in axes if a is not None) if new_axes else 0
        return all(_features(a, call.rank + made) for a in axes) and _same_for_all_steps(call)

    return is_row_wise


def _along_the_last(call: Call) -> bool:
    return call.rank > 2 and _same_for_all_steps(call)


def _chosen(call: Call) -> bool:
    """Return whether `where` chooses between two. With one argument it returns indices."""
    return call.argument(1, "x1") is not None and _same_for_all_steps(call)


def _summed_by_places(call: Call) -> bool:
    """Return whether the points x of the trapezoidal rule are the same for all steps."""
    return np.ndim(call.op.x) <= 1 and _features(call.op.axis, call.rank)


def _transposed(call: Call) -> bool:
    axes = call.op.axes
    return axes is not None and [a % call.rank for a in axes[:2]] == [0, 1]


def _indexed(call: Call) -> bool:
    """Return whether x[key] leaves the first two axes as they are."""
    key = call.argument(1, "key")
    key = list(key) if isinstance(key, (tuple, list)) else [key]
    if not any(k is Ellipsis for k in key):
        key.append(Ellipsis)
    at = next(i for i, k in enumerate(key) if k is Ellipsis)
    named = sum(k is not None and k is not Ellipsis for k in key)
    key[at : at + 1] = [slice(None)] * (call.rank - named)
    return all(isinstance(k, slice) and k == slice(None) for k in key[:2])


def _taken(call: Call) -> bool:
    fixed = not any(isinstance(x, Tensor) for x in keras.tree.flatten(call.argument(1, "indices")))
    return fixed and _features(call.op.axis, call.rank)


def _padded(call: Call) -> bool:
    width = call.op.pad_width
    return len(width) == call.rank and all(tuple(pair) == (0, 0) for pair in width[:2])


def _tiled(call: Call) -> bool:
    repeats = [int(n) for n in np.atleast_1d(call.op.repeats)]
    before = len(repeats) - (call.rank - 2)  # How many are of samples and time, or of new axes.
    return len(repeats) <= call.rank and all(n == 1 for n in repeats[: max(0, before)])


def _reshaped(call: Call) -> bool:
    """Return whether a reshape keeps the first two axes: then rows stay rows, in their order."""
    shape, made = call.shapes[0], call.outputs[0]
    sizes, made_sizes = ([n for n in s[2:] if n is not None] for s in (shape, made))
    if len(made) < 2 or len(sizes) != len(shape) - 2 or len(made_sizes) != len(made) - 2:
        return False
    if math.prod(sizes) != math.prod(made_sizes):
        return False
    # With an open length only a layer, which keeps the samples, is known to keep it.
    known = shape[1] is not None or isinstance(call.op, keras.layers.Layer)
    return known and made[1] == shape[1]


def _multiplied(call: Call) -> bool:
    """Return whether matmul multiplies steps by a fixed matrix, or matrices within a step."""
    x, y = call.argument(0, "x1"), call.argument(1, "x2")
    if call.rank > 3 and isinstance(x, Tensor) and isinstance(y, Tensor):
        return True
    if not isinstance(x, Tensor):
        return call.rank > 3 and len(np.shape(x)) == 2
    return call.rank > 2 and not isinstance(y, Tensor) and len(np.shape(y)) <= 2


def _dotted(call: Call) -> bool:
    x, y = call.argument(0, "x1"), call.argument(1, "x2")
    return isinstance(x, Tensor) and not isinstance(y, Tensor) and call.rank > 2


def _tensor_dotted(call: Call) -> bool:
    if not _dotted(call):
        return False
    axes = call.op.axes
    if isinstance(axes, int):
        return call.rank - axes >= 2
    return _features(axes[0], call.rank)


def _einsum(call: Call) -> bool:
    return _einsum_keeps_rows(call.op.subscripts, call.args, call.rank)


def _einsum_keeps_rows(equation: str, operands: Sequence[Any], rank: int) -> bool:
    """Return whether an einsum keeps the first two axes, and no fixed operand has one of them."""
    equation = equation.replace(" ", "")
    given, arrow, output = equation.partition("->")
    parts = given.split(",")
    if not arrow or len(parts) != len(operands):
        return False
    named = [part.replace("...", "") for part in parts]
    shapes = [x.shape if isinstance(x, Tensor) else np.shape(x) for x in operands]
    unnamed = [len(shape) - len(part) for shape, part in zip(shapes, named, strict=True)]
    rest = "0123456789"[: max(unnamed)]  # The axes that an ellipsis stands for: the last of these.
    lead = output.replace("...", rest)[:2]
    for part, count, operand in zip(parts, unnamed, operands, strict=True):
        letters = part.replace("...", rest[len(rest) - count :])
        if isinstance(operand, Tensor):
            if letters[:2] != lead or set(lead) & set(letters[2:]):
                return False
        elif set(lead) & set(letters):
            return False
    return len(set(lead)) == 2


def _normalized_op(call: Call) -> bool:
    return _features(getattr(call.op, "axis", -1), call.rank) and all(
        len(np.shape(x)) <= call.rank - 2 for x in call.arrays
    )


def _of_scalar(call: Call) -> bool:
    """Return whether q is one number, because several would make a new first axis."""
    q = call.argument(1, "q")
    return not isinstance(q, Tensor) and np.ndim(q) == 0 and _features(call.op.axis, call.rank)


OPS: dict[str, Predicate] = {}  # By the names of the ops' classes, which are not public.


def _ops(predicate: Predicate, names: str) -> None:
    OPS.update((name, predicate) for name in names.split())


_ops(
    _same_for_all_steps,
    """Abs Absolute Add Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh Cast Cbrt Ceil Celu
    Clip Conj Conjugate Copy Cos Cosh Deg2rad Divide DivideNoNan Elu Equal Erf Erfc Erfinv Exp Exp2
    Expm1 Fabs Floor FloorDivide Fmax Fmin Fmod FullLike Gelu Greater GreaterEqual HardShrink
    HardSigmoid HardSilu HardTanh Heaviside Hypot I0 Imag Isclose Isfinite Isinf Isnan Isneginf
    Isposinf Isreal LeakyRelu Less LessEqual Log Log10 Log1p Log2 LogSigmoid Logaddexp Logaddexp2
    LogicalAnd LogicalNot LogicalOr LogicalXor Maximum Minimum Mish Mod Multiply NanToNum Negative
    Nextafter NotEqual OnesLike Power Rad2deg ReLU Real Reciprocal Relu Relu6 Round Rsqrt
    SaturateCast Select Selu Sigmoid Sign Signbit Silu Sin Sinc Sinh SoftShrink Softplus Softsign
    SparsePlus SparseSigmoid Sqrt Square Squareplus StopGradient Subtract Tan Tanh TanhShrink
    Threshold TrueDivide Trunc ZerosLike BitwiseAnd BitwiseInvert BitwiseNot BitwiseOr
    BitwiseXor BitwiseLeftShift BitwiseRightShift ConvertToTensor Digitize LeftShift RightShift""",
)
_ops(
    _along("axis"),
    """All Amax Amin Any Argmax Argmin Argsort ArraySplit Average Concatenate CountNonzero Cumprod
    Cumsum Diff Flip Glu LogSoftmax Logsumexp Max Mean Median Min Nanargmax Nanargmin Nancumprod
    Nancumsum Nanmax Nanmean Nanmedian Nanmin Nanprod Nanstd Nansum Nanvar Norm Normalize Prod Ptp
    Repeat Roll Softmax Sort Sparsemax Split Squeeze Std Sum TakeAlongAxis Unstack Var""",
)
_ops(_chosen, "Where")
_ops(_summed_by_places, "Trapezoid")
_ops(_along("axis", new_axes=True), "ExpandDims OneHot Stack")
_ops(_along("axis1", "axis2"), "Swapaxes")
_ops(_along("source", "destination"), "Moveaxis")
_ops(_along_the_last, "TopK FFT RFFT")
_ops(_of_scalar, "Quantile Percentile Nanquantile Nanpercentile")
_ops(_normalized_op, "LayerNorm RMSNorm BatchNorm")
_ops(_transposed, "Transpose")
_ops(_indexed, "GetItem")
_ops(_taken, "Take")
_ops(_padded, "Pad")
_ops(_tiled, "Tile")
_ops(_reshaped, "Reshape")
_ops(_multiplied, "Matmul")
_ops(_dotted, "Dot")
_ops(_tensor_dotted, "Tensordot")
_ops(_einsum, "Einsum")


# Layers.


def _always(call: Call) -> bool:
    return True


def _of_features(call: Call) -> bool:
    """Return whether the last axis, along which the layer works, is one of features."""
    return call.rank > 2


def _along_own_axis(call: Call) -> bool:
    return _features(getattr(call.op, "axis", ()), call.rank)


def _normalized(call: Call) -> bool:
    """Return whether mean and variance, given or learned, are the same for all steps."""
    numbers = (call.op.mean, call.op.variance)
    return _along_own_axis(call) and all(_is_same_for_all_steps(x, call.rank) for x in numbers)


def _discretized(call: Call) -> bool:
    return call.op.output_mode == "int"  # Other modes sum over the last axis.


def _activated(call: Call) -> bool:
    return _function_is_row_wise(call.op.activation, call.shapes)


def _dense(call: Call) -> bool:
    return call.rank > 2 and _activation_is_row_wise(call)


def _activation_is_row_wise(call: Call) -> bool:
    """Return whether the activation of a layer of products is row-wise on its outputs."""
    return _function_is_row_wise(call.op.activation, call.outputs)


def _einsum_dense(call: Call) -> bool:
    layer = call.op
    given, weights, output = re.split(",|->", layer.equation.replace(" ", ""))
    operands = (Tensor("window", True, 1, call.shapes[0]), np.empty([1] * len(weights)))
    if not _einsum_keeps_rows(layer.equation, operands, call.rank):
        return False
    lead = output.replace("...", "0123456789"[: call.rank - len(given.replace("...", ""))])[:2]
    return not set(lead) & set(layer.bias_axes or "") and _activation_is_row_wise(call)


def _conv1d(call: Call) -> bool:
    """Return whether a convolution reads one step for each row, so is a product."""
    layer = call.op
    one = layer.kernel_size == (1,) and layer.strides == (1,)
    return one and layer.data_format == "channels_last" and _activation_is_row_wise(call)


def _prelu(call: Call) -> bool:
    return call.op.alpha.shape[0] == 1  # It may have separate slopes for each step.


def _rescaled(call: Call) -> bool:
    return all(
        _is_same_for_all_steps(np.asarray(x), call.rank) for x in (call.op.scale, call.op.offset)
    )


def _permuted(call: Call) -> bool:
    return call.op.dims[0] == 1


def _wrapped(call: Call) -> bool:
    """Return whether the layer that this one calls, with other weights, is row-wise."""
    return _layer_is_row_wise(dataclasses.replace(call, op=call.op.layer))


def _lambda(call: Call) -> bool:
    function = functools.partial(call.op.function, **call.op.arguments)
    return len(call.shapes) == 1 and _function_is_row_wise(function, call.shapes)


LAYERS: dict[type, Predicate] = {
    keras.layers.Activation: _activated,
    keras.layers.ActivityRegularization: _always,
    keras.layers.Add: _always,
    keras.layers.AlphaDropout: _always,
    keras.layers.Average: _always,
    keras.layers.BatchNormalization: _along_own_axis,
    keras.layers.Concatenate: _along_own_axis,
    keras.layers.Conv1D: _conv1d,
    keras.layers.Dense: _dense,
    keras.layers.Discretization: _discretized,
    keras.layers.Dropout: _always,
    keras.layers.ELU: _always,
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Embedding: _always,
    keras.layers.GaussianDropout: _always,
    keras.layers.GaussianNoise: _always,
    keras.layers.Identity: _always,
    keras.layers.Lambda: _lambda,
    keras.layers.LayerNormalization: _along_own_axis,
    keras.layers.LeakyReLU: _always,
    keras.layers.Masking: _of_features,
    keras.layers.Maximum: _always,
    keras.layers.Minimum: _always,
    keras.layers.Multiply: _always,
    keras.layers.Normalization: _normalized,
    keras.layers.PReLU: _prelu,
    keras.layers.Permute: _permuted,
    keras.layers.RMSNormalization: _along_own_axis,
    keras.layers.ReLU: _always,
    keras.layers.Rescaling: _rescaled,
    keras.layers.Reshape: _reshaped,
    keras.layers.Softmax: _along_own_axis,
    keras.layers.SpatialDropout1D: _always,
    keras.layers.SpectralNormalization: _wrapped,
    keras.layers.Subtract: _always,
    keras.layers.TimeDistributed: _always,
    keras.layers.UnitNormalization: _along_own_axis,
}


def is_row_wise(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a node computes each row of windows only from that row.

    Args:
        node: A node of Keras' graph.
        args, kwargs: Its arguments, with a `Tensor` in the place of each tensor of the graph.
    """
    # Keras may pass masks (B, T) to layers in a graph, beside windows.
    masks = keras.tree.flatten(node.arguments.kwargs.get("mask"))
    tensors = [x for x in node.input_tensors if not any(x is mask for mask in masks)]
    shapes = [tuple(x.shape) for x in tensors]
    ranks = {len(shape) for shape in shapes}
    name = name_of_op(node.operation)
    # Windows of other ranks would be broadcast over the time axis. An einsum names the axes.
    if min(ranks) < 2 or (len(ranks) > 1 and name != "Einsum"):
        return False
    if lengths_differ(node.input_tensors):
        return False
    call = Call(node.operation, args, kwargs, shapes, [tuple(x.shape) for x in node.outputs])
    if name is not None:
        return name in OPS and OPS[name](call)
    return _layer_is_row_wise(call)


def reshapes(op: keras.Operation) -> bool:
    """Return whether an operation has the length of windows in its shape, which steps do not."""
    return name_of_op(op) == "Reshape" or isinstance(op, keras.layers.Reshape)


def _layer_is_row_wise(call: Call) -> bool:
    if is_marked(call.op):
        return True
    for kind in type(call.op).__mro__:
        if kind in LAYERS and computes_as(call.op, kind):
            return LAYERS[kind](call)
    return False


def _activation_layer(layer: keras.layers.Layer, shape: tuple[int | None, ...]) -> bool:
    window = Tensor("window", True, 1, shape)
    return _layer_is_row_wise(Call(layer, (window,), {}, [shape], [shape]))


# Functions of keras.activations, some of which Keras cannot trace.
_ALONG_THE_LAST_AXIS = {
    getattr(keras.activations, name) for name in ("glu", "log_softmax", "softmax", "sparsemax")
}
_ELEMENT_WISE = {
    getattr(keras.activations, name)
    for name in (
        "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu",
        "hard_tanh", "leaky_relu", "linear", "log_sigmoid", "mish", "relu", "relu6", "selu",
        "sigmoid", "silu", "soft_shrink", "softplus", "softsign", "sparse_plus", "sparse_sigmoid",
        "squareplus", "tanh", "tanh_shrink", "threshold",
    )
}  # fmt: skip


def _function_is_row_wise(function: Any, shapes: Sequence[tuple[int | None, ...]]) -> bool:
    """Return whether a function of windows is row-wise. Its operations of Keras tell."""
    if function is None or is_marked(function):
        return True
    if isinstance(function, keras.layers.Layer):
        return all(_activation_layer(function, shape) for shape in shapes)
    plain, options = function, {}
    if isinstance(function, functools.partial) and not function.args:
        plain, options = function.func, function.keywords
    if plain in _ELEMENT_WISE:
        return all(np.ndim(x) == 0 for x in options.values())
    if plain in _ALONG_THE_LAST_AXIS:
        return all(_features(options.get("axis", -1), len(shape)) for shape in shapes)
    # Of unknown length: what it computes must not depend on the length.
    given = [keras.KerasTensor((shape[0], None, *shape[2:]), "float32") for shape in shapes]
    try:
        graph = keras.Function(given, function(*given))
    except Exception:  # Whatever a user's function raises if it computes by other means.
        return False
    values = {id(x): Tensor("window", True, 1, tuple(x.shape)) for x in given}
    nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
    values |= {id(y): Tensor("window", True, 1, tuple(y.shape)) for n in nodes for y in n.outputs}
    return all(
        is_row_wise(node, *node.arguments.fill_in(values)) for node in nodes if not node.is_input
    )


def lengths_differ(tensors: Iterable[keras.KerasTensor]) -> bool:
    """Return whether windows are known to have different lengths."""
    return len({x.shape[1] for x in tensors} - {None}) > 1
