"""Keras' layers as nodes of a plan: one function for each class.

The functions take a `PlanBuilder`, the layer, its first input (a Symbol, or a merging layer's list
of Symbols), and a `Call`.
"""

import inspect
import math
import string
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.models.lowering.activations import activate, softmax
from continual_transformers_tf.models.lowering.continual_layers import attend_whole, kernel_of
from continual_transformers_tf.models.lowering.einsum import einsum, product
from continual_transformers_tf.models.lowering.keras_ops import (
    Call,
    along_last,
    arithmetic,
    concatenate,
    fixed,
    op,
    pad,
    transpose,
    unit_norm,
)
from continual_transformers_tf.models.lowering.logic_ops import select_rows
from continual_transformers_tf.models.lowering.order_ops import digitized
from continual_transformers_tf.models.lowering.plan_builder import (
    Array,
    CannotLower,
    PlanBuilder,
    Symbol,
    broadcast_shapes,
)
from continual_transformers_tf.models.lowering.temporal import convolution, depthwise
from continual_transformers_tf.models.own_calls import computes_as

# A function of a PlanBuilder, a layer, its first input or inputs, and the Call. It returns one
# Symbol, or several in the structure of the outputs.
Lowering = Callable[[PlanBuilder, keras.layers.Layer, Any, Call], Any]

LAYERS: dict[type, Lowering] = {}


def layer(*classes: type[keras.layers.Layer]) -> Callable[[Lowering], Lowering]:
    """Register a function that lowers layers of these classes."""

    def register(function: Lowering) -> Lowering:
        LAYERS.update((kind, function) for kind in classes)
        return function

    return register


def lower_layer(
    b: PlanBuilder, layer: keras.layers.Layer, *args: Any, lead: int = 1, call: Call | None = None
) -> Any:
    """Lower a Keras layer, and return its output's Symbol. The caller handles masks.

    Args:
        b: The `PlanBuilder`.
        layer: The layer.
        *args: The arguments of its call, if `call` is None.
        lead: How many axes Keras' tensors have before those of a Symbol, if `call` is None.
        call: The `Call`; None: one with `args` and `lead`.
    """
    if call is None:
        call = Call(args, {}, lead, layer.compute_dtype, [None])
    for kind in type(layer).__mro__:
        if kind in LAYERS and computes_as(layer, kind):
            if not layer.built:
                raise CannotLower("was never called, and has no weights: call it once")
            return LAYERS[kind](b, layer, call.args[0] if call.args else call.symbols[0], call)
    if type(layer).__module__.startswith("keras.") or isinstance(layer, keras.Model):
        raise CannotLower(
            "is a layer that a plan has no node for: take the model's steps in TensorFlow, with a "
            "ct.StreamingModel"
        )
    return _own_layer(b, layer, call)


def _own_layer(b: PlanBuilder, layer: keras.layers.Layer, call: Call) -> Any:
    """Lower the user's own layer by tracing its `call` with symbolic tensors."""
    from continual_transformers_tf.models.lowering.graph_lowering import trace

    arguments = bound(layer, call)
    arguments.pop("mask", None)
    options = {name: x for name, x in arguments.items() if not _symbols_in(x)}
    if "training" in inspect.signature(layer.call).parameters:
        options["training"] = False
    given = {name: x for name, x in arguments.items() if _symbols_in(x)}
    flat = keras.tree.flatten(given)

    def function(*tensors: Any) -> Any:
        return layer.call(**keras.tree.pack_sequence_as(given, tensors), **options)

    return trace(b, function, flat, call.lead)


def _symbols_in(x: Any) -> bool:
    return any(isinstance(part, Symbol) for part in keras.tree.flatten(x))


def bound(layer: keras.layers.Layer, call: Call) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return inspect.signature(layer.call).bind(*call.args, **call.kwargs).arguments


# Products.


@layer(keras.layers.Dense)
def _dense(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    kernel = b.variable(kernel_of(layer), kernel=True, name=layer.path + "/kernel")
    bias = [] if layer.bias is None else [b.variable(layer.bias)]
    return activate(b, b.dense(b.cast(x, b.dtype), kernel, *bias), layer.activation, call.lead)


@layer(keras.layers.EinsumDense)
def _einsum_dense(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    kernel, name = kernel_of(layer), layer.path + "/kernel"
    y = einsum(b, layer.equation, x, kernel, call.lead, name, layer.bias)
    return activate(b, y, layer.activation, call.lead)


@layer(keras.layers.Conv1D, keras.layers.DepthwiseConv1D, keras.layers.SeparableConv1D)
def _conv1d(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    one_row = call.lead == 2  # A convolution of single steps: kernel size 1.
    if one_row and len(x.shape) == 1:
        x = b.reshape(x, (1, *x.shape))
    if layer.data_format != "channels_last" or len(x.shape) != 2:
        raise CannotLower("has channels first, or more axes: expected rows of channels")
    (taps,), (stride,), (dilation,) = layer.kernel_size, layer.strides, layer.dilation_rate
    reach = (taps - 1) * dilation
    if layer.padding != "valid":
        missing = reach
        if layer.padding == "same":
            rows = x.shape[0]
            missing = max(0, (math.ceil(rows / stride) - 1) * stride + reach + 1 - rows)
        before = missing if layer.padding == "causal" else missing // 2
        x = pad(b, b.cast(x, b.dtype), [(before, missing - before), (0, 0)])
    outputs = (x.shape[0] - reach - 1) // stride + 1
    lower = convolution if isinstance(layer, keras.layers.Conv1D) else depthwise
    y = lower(b, layer, b.cast(x, b.dtype), outputs)
    return b.reshape(y, y.shape[1:]) if one_row else y


@layer(CoTemporal, CoRecurrent)
def _regular(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    """Lower a call on rows that are all there: on a whole window, or on a single row."""
    return lower_layer(b, layer.layer, call=call)


@layer(keras.layers.MultiHeadAttention, CoSiMultiHeadAttention)
def _attention(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    """Lower attention among the rows of a sample, none of which is a step."""
    given = bound(layer, call)
    refuse_masks(given)
    if call.lead != 1 or len(given["value"].shape) != 2:
        raise CannotLower(
            "attends among the rows of one step: a plan only has nodes that attend to steps of time"
        )
    return attend_whole(b, layer, **attention_arguments(given), all_there=True)


def attention_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an attention layer's call that `attend_whole` takes."""
    return {k: given.get(k) for k in ("query", "value", "key", "use_causal_mask")}


def refuse_masks(given: Mapping[str, Any]) -> None:
    """Raise CannotLower if an attention layer's call has a mask or returns scores."""
    for name in ("query_mask", "value_mask", "key_mask", "attention_mask"):
        if given.get(name) is not None:
            raise CannotLower(f"is called with {name}")
    if given.get("return_attention_scores"):
        raise CannotLower("returns its scores")


# Activations.


@layer(keras.layers.Activation)
def _activation(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return activate(b, x, layer.activation, call.lead)


@layer(keras.layers.ReLU)
def _relu(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    numbers = {k: getattr(layer, k) for k in ("negative_slope", "max_value", "threshold")}
    numbers = {k: None if v is None else float(v) for k, v in numbers.items()}
    return b.activation(x, "relu", **numbers)


@layer(keras.layers.LeakyReLU)
def _leaky_relu(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return b.activation(x, "leaky_relu", negative_slope=float(layer.negative_slope))


@layer(keras.layers.ELU)
def _elu(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return b.activation(x, "elu", alpha=float(layer.alpha))


@layer(keras.layers.PReLU)
def _prelu(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if layer.alpha.shape == x.shape:
        alpha = b.variable(layer.alpha)
    else:
        shape = tuple(layer.alpha.shape)
        extra = len(shape) - len(x.shape)
        if any(n != 1 for n in shape[:extra]):
            raise CannotLower("has separate slopes for each step of time: give it shared_axes=[1]")
        array = np.broadcast_to(np.asarray(layer.alpha.value).reshape(shape[extra:]), x.shape)
        alpha = b.constant_weight(layer.alpha.path, array)
    return b.node(
        "activation", [x], x.shape, weights={"alpha": alpha}, name="prelu", function="prelu"
    )


@layer(keras.layers.Softmax)
def _softmax(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if bound(layer, call).get("mask") is not None or x.mask is not None:
        raise CannotLower("is given a mask of steps, but Keras would apply it to features")
    axes = call.axes(layer.axis, x)
    if len(axes) == 1:
        return softmax(b, x, "softmax", axes[0])
    return along_last(b, x, axes, lambda y: softmax(b, y, "softmax", len(y.shape) - 1))


# Normalization.


def _norm(
    b: PlanBuilder,
    x: Symbol,
    axes: list[int],
    function: str,
    weights: Mapping[str, keras.Variable | None],
    epsilon: float,
) -> Symbol:
    """Apply a norm over axes. Its weights are variables with the shape of those axes."""
    names = {name: b.variable(w, (-1,)) for name, w in weights.items() if w is not None}

    def norm(y: Symbol) -> Symbol:
        return b.node(
            "norm", [y], y.shape, weights=names, function=function, epsilon=float(epsilon)
        )

    return along_last(b, x, axes, norm)


@layer(keras.layers.LayerNormalization)
def _layer_norm(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    function = "rms" if getattr(layer, "rms_scaling", False) else "layer"
    weights = {"gamma": layer.gamma, "beta": layer.beta}
    return _norm(b, x, call.axes(layer.axis, x), function, weights, layer.epsilon)


@layer(keras.layers.RMSNormalization)
def _rms_norm(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return _norm(b, x, call.axes(layer.axis, x), "rms", {"gamma": layer.scale}, layer.epsilon)


@layer(keras.layers.UnitNormalization)
def _unit_norm(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return unit_norm(b, x, call.axes(layer.axis, x), 1e-12)


@layer(keras.layers.BatchNormalization)
def _batch_norm(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    weights = {
        "mean": layer.moving_mean,
        "variance": layer.moving_variance,
        "gamma": layer.gamma if layer.scale else None,
        "beta": layer.beta if layer.center else None,
    }
    weights = {name: b.variable(w) for name, w in weights.items() if w is not None}
    return along_last(
        b, x, call.axes(layer.axis, x),
        lambda y: b.node("batch_norm", [y], y.shape, weights=weights, epsilon=float(layer.epsilon)),
    )  # fmt: skip


@layer(keras.layers.GroupNormalization)
def _group_norm(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    axis = call.axis(layer.axis, x)
    if call.lead != 1:
        raise CannotLower("normalizes over the steps of a window, which a step does not have")
    channels, groups = x.shape[axis], layer.groups
    groups = channels if groups == -1 else groups
    others = [a for a in range(len(x.shape)) if a != axis]
    # Bring it to [groups, channels of a group, others], and normalize over all axes but the first.
    y = b.transpose(b.cast(x, b.dtype), [axis, *others])
    moved = y.shape
    y = b.reshape(y, (groups, -(-x.size // groups)))
    y = b.node("norm", [y], y.shape, function="layer", epsilon=float(layer.epsilon))
    y = b.transpose(b.reshape(y, moved), np.argsort([axis, *others]).tolist())
    shape = [channels if a == axis else 1 for a in range(len(x.shape))]
    scale = np.asarray(layer.gamma.value).reshape(shape) if layer.scale else 1
    offset = np.asarray(layer.beta.value).reshape(shape) if layer.center else 0
    return b.affine(y, scale, offset) if layer.scale or layer.center else y


@op("LayerNorm", "RMSNorm")
def _norm_op(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, rms = call.symbols[0], type(op).__name__ == "RMSNorm" or op.rms_scaling
    weights = {"gamma": call.argument(1, "scale" if type(op).__name__ == "RMSNorm" else "gamma")}
    if type(op).__name__ == "LayerNorm":
        weights["beta"] = call.argument(2, "beta")
    if any(isinstance(w, Symbol) for w in weights.values()):
        raise CannotLower("has a scale or offset that a step computes: expected constant ones")
    epsilon = keras.config.epsilon() if op.epsilon is None else op.epsilon
    return _norm(b, x, call.axes(op.axis, x), "rms" if rms else "layer", weights, epsilon)


@layer(keras.layers.Normalization)
def _normalization(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    mean, variance = (
        np.broadcast_to(_without_lead(np.asarray(a).astype("float64"), x), x.shape)
        for a in (layer.mean, layer.variance)
    )
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return b.affine(x, deviation, mean)
    # In two parts, as Keras computes it. x * scale - mean * scale would lose digits if the mean is
    # many deviations away from 0, for example with air pressures.
    centred = b.affine(b.cast(x, b.dtype), np.ones_like(mean), -mean)
    return b.affine(centred, 1 / deviation, np.zeros_like(mean))


@layer(keras.layers.Rescaling)
def _rescaling(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    scale, offset = (_without_lead(fixed(a, "float64"), x) for a in (layer.scale, layer.offset))
    x = b.cast(x, b.dtype)
    shape = broadcast_shapes(x.shape, scale.shape, offset.shape)
    return b.affine(b.broadcast(x, shape), scale, offset)


def _without_lead(array: Array, x: Symbol) -> Array:
    """Turn an array that broadcasts to Keras' tensor into one that broadcasts to the Symbol."""
    extra = array.ndim - len(x.shape)
    if extra <= 0:
        return array
    if any(n != 1 for n in array.shape[:extra]):
        raise CannotLower(
            f"has separate numbers for each step or sample, of shape {list(array.shape)}"
        )
    return array.reshape(array.shape[extra:])


# Several inputs.

_MERGE = {
    keras.layers.Add: "add",
    keras.layers.Average: "add",
    keras.layers.Maximum: "maximum",
    keras.layers.Minimum: "minimum",
    keras.layers.Multiply: "multiply",
    keras.layers.Subtract: "subtract",
}


@layer(*_MERGE)
def _merge(b: PlanBuilder, layer: keras.layers.Layer, xs: list[Symbol], call: Call) -> Symbol:
    function = next(f for kind, f in _MERGE.items() if isinstance(layer, kind))
    ranks = {len(x.shape) for x in xs}
    if len(ranks) != 1:
        raise CannotLower(f"is given tensors of different ranks: {sorted(ranks)} axes in a step")
    y = xs[0]
    if function in ("maximum", "minimum"):
        return _extreme(b, function, xs)
    if function == "multiply":
        return _multiplied(b, xs)
    for x in xs[1:]:
        y = b.binary(function, y, x)
    if isinstance(layer, keras.layers.Average):
        y = arithmetic(b, "divide", y, np.asarray(float(len(xs))))
    return y


def _extreme(b: PlanBuilder, function: str, xs: list[Symbol]) -> Symbol:
    """Return the largest or smallest of the inputs that are not masked, as Keras does."""
    y, mask = xs[0], xs[0].mask
    for x in xs[1:]:
        own = x.mask
        if own is not None:
            x = select_rows(b, own, x, y)
        if mask is not None:
            y = select_rows(b, mask, y, x)
        mask = None if mask is None or own is None else b.mask_or(mask, own)
        y = b.binary(function, y, x)
    return y


def _multiplied(b: PlanBuilder, xs: list[Symbol]) -> Symbol:
    """Return the product of the inputs that are not masked, and 0 if all are, as Keras does."""
    one = np.ones(())
    factors = [x if x.mask is None else select_rows(b, x.mask, x, one) for x in xs]
    y = factors[0]
    for x in factors[1:]:
        y = b.binary("multiply", y, x)
    masks = [x.mask for x in xs if x.mask is not None]
    if len(masks) < len(xs):
        return y
    return select_rows(b, _any_of(b, masks), y, np.zeros(()))


@layer(keras.layers.Dot)
def _dot(b: PlanBuilder, layer: keras.layers.Layer, xs: list[Symbol], call: Call) -> Symbol:
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else layer.axes
    # Keras knows only axis 0 as that of samples, so `lead` is 1: in a window it would mix steps.
    places = [call.axis(axis, x) for axis, x in zip(axes, xs, strict=True)]
    if layer.normalize:
        epsilon = keras.config.epsilon()
        xs = [unit_norm(b, x, [i], epsilon) for x, i in zip(xs, places, strict=True)]
    letters = string.ascii_letters
    first, second = list(letters[: len(xs[0].shape)]), list(letters[-len(xs[1].shape) :])
    second[places[1]] = first[places[0]]
    output = [a for a in (*first, *second) if a != first[places[0]]]
    y = product(b, xs[0], first, xs[1], second, output)
    return y if y.shape else b.reshape(y, (1,))


@layer(keras.layers.Concatenate)
def _concatenate(b: PlanBuilder, layer: keras.layers.Layer, xs: list[Symbol], call: Call) -> Symbol:
    return concatenate(b, xs, layer.axis, call)


# Indices and masks.


@layer(keras.layers.Discretization)
def _discretization(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if layer.output_mode != "int":
        raise CannotLower(f"has output_mode={layer.output_mode!r}: expected 'int'")
    return digitized(b, x, np.asarray(layer.bin_boundaries, b.dtype), call.dtype)


@layer(keras.layers.Embedding)
def _embedding(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if layer.quantization_mode is not None:
        raise CannotLower(
            f"is quantized to {layer.quantization_mode}: make the session before quantize()"
        )
    if x.dtype not in ("int32", "int64"):
        raise CannotLower(f"is given {x.dtype}: expected an input of the model of integers")
    if not b.is_of_input(x):
        raise CannotLower(
            "is given integers that a step computes: expected those of an input of the model"
        )
    table = layer.embeddings if layer.lora_enabled else layer._embeddings
    weights = {"table": b.variable(table, name=layer.path + "/embeddings")}
    return b.node("embedding", [x], (*x.shape, layer.output_dim), weights=weights)


@layer(keras.layers.Masking)
def _masking(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    x, value = b.cast(x, b.dtype), float(np.asarray(layer.mask_value))
    if len(x.shape) == 1:
        return b.node("masked", [x, mask_of(b, layer, x)], x.shape, name="masked")
    # A step of several rows masks each of them: multiply by 0 or 1. Keras does the same. NaN * 0
    # cannot occur: a NaN differs from any number, so its row is kept.
    kept = b.reduce(_differs(b, x, value), "max", [len(x.shape) - 1], keepdims=True)
    return b.binary("multiply", x, kept)


def _differs(b: PlanBuilder, x: Symbol, value: float) -> Symbol:
    """Return 1 for each number that differs from a value, and 0 for each that does not."""
    equal = b.activation(b.activation(b.affine(x, 1, -value), "sign"), "absolute")
    # -0 stays, and both -1 and NaN become 1.
    return b.activation(b.activation(equal, "negative"), "threshold", threshold=-0.5, value=1.0)


def mask_of(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, of_rows: bool = False) -> Symbol:
    """Return the mask that a `Masking` or `Embedding` layer computes from its input.

    The mask is `[1]`, or with several rows a step, `[rows]`.
    """
    masking = isinstance(layer, keras.layers.Masking)
    value = float(np.asarray(layer.mask_value)) if masking else 0
    if not of_rows:
        return b.not_equal(x if x.shape else b.reshape(x, (1,)), value)
    differs = _differs(b, b.cast(x, b.dtype), value)
    return b.cast(b.reduce(differs, "max", [1]) if masking else differs, "bool")


# Layers that do nothing outside training.


@layer(
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)
def _nothing(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return x


# Shapes.


@layer(keras.layers.Reshape, keras.layers.Flatten)
def _reshape(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if isinstance(layer, keras.layers.Reshape) and call.lead == 2 and call.shapes[0] is not None:
        return b.reshape(x, call.shapes[0])  # Only its first axis is that of time.
    if call.lead != 1:
        raise CannotLower("changes the axes of time or of samples")
    if isinstance(layer, keras.layers.Flatten):
        if layer.data_format == "channels_first" and len(x.shape) > 1:
            x = b.transpose(x, [*range(1, len(x.shape)), 0])
        return b.reshape(x, (x.size,))
    return b.reshape(x, layer.compute_output_shape((1, *x.shape))[1:])


@layer(keras.layers.Permute)
def _permute(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return transpose(b, x, [0, *layer.dims], call.lead)


@layer(keras.layers.RepeatVector)
def _repeat_vector(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return b.broadcast(b.reshape(x, (1, *x.shape)), (layer.n, *x.shape))


@layer(keras.layers.Cropping1D)
def _cropping(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    first, last = layer.cropping
    return b.slice(x, 0, first, x.shape[0] - first - last)


@layer(keras.layers.ZeroPadding1D)
def _zero_padding(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    return pad(b, x, [layer.padding, (0, 0)])


@layer(keras.layers.UpSampling1D)
def _up_sampling(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    rows, features = x.shape
    y = b.strided(x, (rows, layer.size, features), (features, 0, 1), name="repeat")
    return b.reshape(y, (rows * layer.size, features))


# Pooling of windows and samples.


@layer(keras.layers.GlobalAveragePooling1D, keras.layers.GlobalMaxPooling1D)
def _global_pooling(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if call.lead != 1:
        raise CannotLower("reduces the axis of time, which a step does not have")
    function = "mean" if isinstance(layer, keras.layers.GlobalAveragePooling1D) else "max"
    axis = 0 if layer.data_format == "channels_last" else 1
    return b.reduce(x, function, [axis], layer.keepdims)


@layer(keras.layers.AveragePooling1D, keras.layers.MaxPooling1D)
def _pooling(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Symbol:
    if layer.padding != "valid" or layer.data_format != "channels_last":
        raise CannotLower("pools with padding, or with channels first: expected neither")
    (size,), (stride,) = layer.pool_size, layer.strides
    rows, features = x.shape
    taken = (rows - size) // stride + 1
    function = "mean" if isinstance(layer, keras.layers.AveragePooling1D) else "max"
    patches = b.strided(
        x, (taken, size, features), (stride * features, features, 1), name="patches"
    )
    return b.reduce(patches, function, [1])


# Layers around others.


@layer(keras.layers.TimeDistributed)
def _time_distributed(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Any:
    # In a window the distributed rows are the steps; in a sample they are an axis of the Symbol.
    inner, lead = layer.layer, call.lead - 1
    if isinstance(inner, (ContinualLayer, keras.Model)):
        raise CannotLower(
            "distributes a model or a continual layer over time: use it without TimeDistributed"
        )
    y = lower_layer(b, inner, x, lead=lead)
    kept = 1 if lead == 0 else 0
    if y.shape[:kept] != x.shape[:kept]:
        raise CannotLower("distributes a layer that changes the axes of samples")
    return y


@layer(keras.layers.SpectralNormalization)
def _spectral(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Any:
    # Outside training it leaves the kernel as training has made it.
    return lower_layer(b, layer.layer, x, lead=call.lead)


@layer(keras.layers.Lambda)
def _lambda(b: PlanBuilder, layer: keras.layers.Layer, x: Symbol, call: Call) -> Any:
    from continual_transformers_tf.models.lowering.graph_lowering import trace

    known = inspect.signature(layer.function).parameters
    options = {k: v for k, v in (("mask", None), ("training", False)) if k in known}

    def function(x: Any) -> Any:
        return layer.function(x, **{**layer.arguments, **options})

    return trace(b, function, [x], call.lead)


# Masks of outputs.


def mask_after(b: PlanBuilder, layer: keras.layers.Layer, call: Call, y: Symbol) -> Symbol | None:
    """Return Keras' mask on a layer's output; None if there is none."""
    given = call.args[0] if call.args else call.symbols[0]
    if isinstance(layer, (keras.layers.Masking, keras.layers.Embedding)):
        if isinstance(layer, keras.layers.Embedding) and not layer.mask_zero:
            return None
        axes_of_row = 1 if isinstance(layer, keras.layers.Masking) else 0
        if len(given.shape) > axes_of_row + call.of_rows:
            return None  # Keras' mask is of more than time. No layer in a plan uses one.
        return mask_of(b, layer, given, call.of_rows)
    flat = keras.tree.flatten(given)
    masks: list[Symbol] = [x.mask for x in flat if getattr(x, "mask", None) is not None]
    if not masks or not layer.supports_masking:
        return None
    if isinstance(layer, keras.layers.Concatenate) or isinstance(given, (list, tuple)):
        # In an input without a mask, no step is masked.
        return _any_of(b, masks) if len(masks) == len(flat) else None
    if not type(layer).compute_mask.__module__.startswith("keras."):
        raise CannotLower("computes a mask in its own way, and a plan has no node for that")
    return masks[0]


def _any_of(b: PlanBuilder, masks: list[Symbol]) -> Symbol:
    mask = masks[0]
    for other in masks[1:]:
        mask = b.mask_or(mask, other)
    return mask
