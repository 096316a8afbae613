"""Keras' activation functions as nodes of a plan."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras

from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder, Symbol

# Element-wise functions, with the node's numbers and Keras' defaults for them.
NUMBERS: dict[str, dict[str, float | None]] = {
    "celu": {"alpha": 1.0},
    "elu": {"alpha": 1.0},
    "exponential": {},
    "hard_shrink": {"threshold": 0.5},
    "hard_sigmoid": {},
    "hard_silu": {},
    "hard_tanh": {},
    "leaky_relu": {"negative_slope": 0.2},
    "linear": {},
    "log_sigmoid": {},
    "mish": {},
    "relu": {"negative_slope": 0.0, "max_value": None, "threshold": 0.0},
    "relu6": {},
    "selu": {},
    "sigmoid": {},
    "silu": {},
    "soft_shrink": {"threshold": 0.5},
    "softplus": {},
    "softsign": {},
    "sparse_plus": {},
    "sparse_sigmoid": {},
    "squareplus": {"b": 4},
    "tanh": {},
    "tanh_shrink": {},
}
ALONG_AN_AXIS = ("softmax", "log_softmax", "sparsemax")
_FUNCTIONS = {
    getattr(keras.activations, name): name
    for name in (*NUMBERS, *ALONG_AN_AXIS, "gelu", "glu", "threshold")
}


def activate(
    b: PlanBuilder,
    x: Symbol,
    function: Callable[..., Any] | keras.layers.Layer | None,
    lead: int = 1,
) -> Symbol:
    """Apply an activation function to a Symbol.

    Args:
        b: The `PlanBuilder`.
        x: A Symbol.
        function: A function of `keras.activations`, perhaps in a `functools.partial`; an activation
            layer; None; or the user's own function, which is traced.
        lead: How many axes Keras' tensor has before those of the Symbol.
    """
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise CannotLower(f"has the activation {function}: give its numbers by name")
        options = {**function.keywords, **options}
        function = function.func
    if function is None:
        return x
    if isinstance(function, keras.layers.Layer):
        from continual_transformers_tf.models.lowering.keras_layers import lower_layer

        return lower_layer(b, function, x, lead=lead)
    name = _FUNCTIONS.get(function)
    if name is None:
        from continual_transformers_tf.models.lowering.graph_lowering import trace

        return trace(b, functools.partial(function, **options), [x], lead)
    return named(b, x, name, lead, options)


def named(
    b: PlanBuilder, x: Symbol, name: str, lead: int = 1, options: Mapping[str, Any] | None = None
) -> Symbol:
    """Apply an activation by the name of its function in `keras.activations`, with its numbers."""
    options = options or {}
    if name == "gelu":
        return b.activation(x, "gelu_tanh" if options.get("approximate", False) else "gelu")
    if name == "threshold":
        numbers = {"threshold": options["threshold"], "value": options["default_value"]}
        return b.activation(x, "threshold", **{k: float(v) for k, v in numbers.items()})
    if name == "glu":
        return glu(b, x, axis_of_step(options.get("axis", -1), x, lead))
    if name in ALONG_AN_AXIS:
        return softmax(b, x, name, axis_of_step(options.get("axis", -1), x, lead))
    numbers = {**NUMBERS[name], **options}
    numbers = {k: None if v is None else float(v) for k, v in numbers.items()}
    return b.activation(x, name, **numbers)


def softmax(b: PlanBuilder, x: Symbol, function: str, axis: int) -> Symbol:
    """Apply a softmax, log_softmax or sparsemax along one axis."""
    x = b.cast(x, b.dtype)
    return b.node("softmax", [x], x.shape, name=function, function=function, axis=axis)


def glu(b: PlanBuilder, x: Symbol, axis: int) -> Symbol:
    """Apply a gated linear unit: the first half of an axis times the sigmoid of the second."""
    half = x.shape[axis] // 2
    if 2 * half != x.shape[axis]:
        raise CannotLower(f"halves an axis of {x.shape[axis]}: expected an even number")
    first, second = (b.slice(x, axis, i * half, half) for i in (0, 1))
    return b.binary("multiply", first, b.activation(second, "sigmoid"))


def axis_of_step(axis: int, x: Symbol, lead: int) -> int:
    """Return the axis of a Symbol that is this axis of Keras' tensor."""
    rank = len(x.shape) + lead
    if not -rank <= axis < rank:
        raise CannotLower(f"works along axis {axis}, but its input has {rank} axes")
    axis = axis % rank - lead
    if axis < 0:
        raise CannotLower("works along the axis of samples, or of time")
    return axis
