"""Tests of whether a subclass computes what its parent computes."""

import keras

from continual_transformers_tf.models.problem import CannotStream, Problem

_PACKAGE = "continual_transformers_tf."

# The methods that compute a layer's outputs. A subclass may override them.
COMPUTATION = (
    "__call__",
    "call",
    "call_regular",
    "call_step",
    "call_steps",
    "convolution_op",
    "_compute_attention",
    "_compute_attention_mask",
    "_compute_causal_mask",
    "_compute_sliding_window_mask",
    "_masked_softmax",
    "_merge_function",
)


def computes_as(layer: keras.layers.Layer, kind: type[keras.layers.Layer]) -> bool:
    """Return whether a layer computes exactly as a class does that it is an instance of."""
    return all(getattr(type(layer), n, None) is getattr(kind, n, None) for n in COMPUTATION)


def computes_as_ours(layer: keras.layers.Layer) -> bool:
    """Return whether a continual layer computes exactly as its class in this package does."""
    ours = next(c for c in type(layer).__mro__ if c.__module__.startswith(_PACKAGE))
    return computes_as(layer, ours)


def has_own_call(model: keras.Model) -> bool:
    """Return whether a functional or sequential model has a `call` that is not Keras'.

    The graph of such a model is only a part of what it computes.
    """
    methods = (type(model).call, type(model).__call__)
    return not all(method.__module__.startswith("keras.") for method in methods)


def own_calls_within(model: keras.Model) -> list[keras.Model]:
    """Return the functional and sequential models with own calls in a model, itself included."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.Sequential) or hasattr(layer, "_nodes_by_depth")
        if has_own_call(layer)
    ]


OWN_CALL = (
    "has a call of its own. Steps would leave it out, because they run the layers of the graph one "
    "by one. Put what it computes into the graph: as a layer, or as a keras.layers.Lambda of "
    "keras.ops"
)


def check_streaming_model(model: keras.Model) -> None:
    """Raise CannotStream if a StreamingModel's subclass computes more than the model inside."""
    if not computes_as_ours(model):
        raise CannotStream([Problem(OWN_CALL, model)])
