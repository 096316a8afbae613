"""Whether a subclass computes what its parent does: if not, nothing may be read from the parent."""

import keras

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
    """Return whether a layer of a class, or of a subclass of it, computes exactly as the class."""
    return all(getattr(type(layer), n, None) is getattr(kind, n, None) for n in COMPUTATION)


def computes_as_ours(layer: keras.layers.Layer) -> bool:
    """Return whether a continual layer computes exactly as this package's class that it is of."""
    ours = next(c for c in type(layer).__mro__ if c.__module__.startswith(_PACKAGE))
    return computes_as(layer, ours)


def has_own_call(model: keras.Model) -> bool:
    """Return whether a functional or sequential model has a `call` that is not Keras'.

    The graph of such a model is a part of what it computes.
    """
    methods = (type(model).call, type(model).__call__)
    return not all(method.__module__.startswith("keras.") for method in methods)


def own_calls_within(model: keras.Model) -> list[keras.Model]:
    """Return the functional and sequential models in a model, itself among them, with own calls."""
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.Sequential) or hasattr(layer, "_nodes_by_depth")
        if has_own_call(layer)
    ]


OWN_CALL = (
    "has a call of its own, which steps would leave out, because they run the layers of its graph "
    "one by one. Put what it computes into the graph: as a layer, or as a keras.layers.Lambda of "
    "keras.ops"
)


def check_streaming_model(model: keras.Model) -> None:
    """Raise ValueError if a StreamingModel's subclass computes more than the model inside."""
    if not computes_as_ours(model):
        raise ValueError(f"{model.name} ({type(model).__name__}) {OWN_CALL}")
