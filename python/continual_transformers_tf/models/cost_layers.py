"""The costs of layers: one function for each type of layer, by `functools.singledispatch`.

`cost_of.register`, or `ct.cost.register` for users, adds another type.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, Protocol, cast

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.learned_queries import LearnedQueries
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.models.cost_formulas import (
    Cost,
    activation_cost,
    attention_cost,
    bytes_of,
    dense_cost,
    layer_norm_cost,
    sigmoid_cost,
    single_output_attention_cost,
    softmax_cost,
)
from continual_transformers_tf.models.own_calls import computes_as
from continual_transformers_tf.ops.stream_state import StreamState

Shape = Sequence[int | None]
P = ParamSpec("P")


class Rows:
    """The rows that a layer runs on.

    Args:
        mode: "step" or "regular".
        count: How many rows of features; None if that is not known.
        shapes: The shape of a window or step of each input, without the batch axis; empty for a
            layer that is not part of a model.
    """

    def __init__(self, mode: str, count: int | None, shapes: Sequence[Shape] = ()) -> None:
        self.mode, self.shapes = mode, shapes
        self._count = count

    @property
    def count(self) -> int:
        """How many rows of features."""
        return known_length(self._count)

    def numbers(self, layer: keras.layers.Layer) -> int:
        """Return how many elements the largest input has, for a layer without weights."""
        if not self.shapes:
            raise ValueError(
                f"Expected a model, but got only {layer.name} ({type(layer).__name__}), which does "
                "not know how many features its input has: ask for the cost of a model around it"
            )
        return self.count * known_length(largest(self.shapes)[-1])


def known_length(count: int | None) -> int:
    """Return the number of steps or rows. Raise ValueError if it is None."""
    if count is None:
        raise ValueError(
            'Expected seq_len, the steps of the window, with mode="regular", but got None'
        )
    return count


def largest(shapes: Sequence[Shape]) -> Shape:
    """Return the first of the shapes with the most axes."""
    return max(shapes, key=len)


class Registering(Protocol[P]):
    """A function that returns a `Cost`, and registers functions for other types of layers."""

    @property
    def register(self) -> Callable[..., Any]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Cost: ...


def with_register(function: Callable[P, Cost]) -> Registering[P]:
    """Return the function, with an attribute `register`: that of `functools.singledispatch`."""
    function.register = _function_of.register  # type: ignore[attr-defined]
    return cast("Registering[P]", function)


@functools.singledispatch
def _function_of(layer: keras.layers.Layer, rows: Rows) -> Cost:
    raise ValueError(
        f"Expected a layer whose cost is known, but got {layer.name} ({type(layer).__name__}): "
        "register a function for it with ct.cost.register"
    )


@with_register
def cost_of(layer: keras.layers.Layer, rows: Rows) -> Cost:
    """Return the `Cost` of a layer on a `Rows`."""
    known = next(c for c in type(layer).__mro__ if c in _function_of.registry)
    if known is not object and not computes_as(layer, known):
        raise ValueError(
            f"Expected a layer whose cost is known, but {layer.name} ({type(layer).__name__}) does "
            f"not compute as {known.__name__} does: register a function for it with "
            "ct.cost.register"
        )
    return _function_of(layer, rows)


# Keras' layers.


@cost_of.register
def _(layer: keras.layers.Dense, rows: Rows) -> Cost:
    outputs = layer.units
    given = dense_cost(rows.count, layer.kernel.shape[0], outputs, layer.use_bias)
    return given + _activation(layer, rows.count * outputs, outputs) + _weights(layer)


@cost_of.register
def _(layer: keras.layers.EinsumDense, rows: Rows) -> Cost:
    _, kernel, output = re.split(",|->", layer.equation)
    sizes = zip(kernel, layer.kernel.shape, strict=True)
    outputs = math.prod(size for letter, size in sizes if letter in output)
    count = rows.count
    if rows.shapes:  # The equation may sum over more than the last axis.
        count = rows.numbers(layer) * outputs // math.prod(layer.kernel.shape)
    activation = _activation(layer, count * outputs, outputs)
    return projection(layer, count, outputs) + activation + _weights(layer)


@cost_of.register
def _(layer: keras.layers.LayerNormalization, rows: Rows) -> Cost:
    features = math.prod(layer.gamma.shape)
    return layer_norm_cost(rows.count, features) + _weights(layer)


@cost_of.register
def _(layer: keras.layers.RMSNormalization, rows: Rows) -> Cost:
    (features,) = layer.scale.shape
    # A square, a sum, the scale and the division by the root of the mean.
    each = Cost(3 * features + 1, features)
    return each * rows.count + _weights(layer)


@cost_of.register
def _(layer: LearnedQueries, rows: Rows) -> Cost:
    return _weights(layer)


@cost_of.register
def _(layer: keras.layers.Activation, rows: Rows) -> Cost:
    numbers = rows.numbers(layer)
    return _activation(layer, numbers, numbers // rows.count)


@cost_of.register
def _(layer: keras.layers.ReLU, rows: Rows) -> Cost:
    return Cost()


@cost_of.register
def _(layer: keras.layers.Softmax, rows: Rows) -> Cost:
    return softmax_cost(rows.count, rows.numbers(layer) // rows.count)


@cost_of.register
def _(layer: keras.layers.Add, rows: Rows) -> Cost:
    return Cost(additions=rows.numbers(layer) * (len(rows.shapes) - 1))


@cost_of.register
def _(layer: keras.layers.Embedding, rows: Rows) -> Cost:
    width = layer.output_dim * _itemsize(layer.variable_dtype)
    return Cost(read_bytes=rows.count * width)


@cost_of.register(keras.layers.Concatenate)
@cost_of.register(keras.layers.Dropout)
@cost_of.register(keras.layers.Flatten)
@cost_of.register(keras.layers.Identity)
@cost_of.register(keras.layers.InputLayer)
@cost_of.register(keras.layers.Masking)
@cost_of.register(keras.layers.Reshape)
def _(layer: keras.layers.Layer, rows: Rows) -> Cost:
    return Cost()


@cost_of.register
def _(layer: keras.layers.MultiHeadAttention, rows: Rows) -> Cost:
    if rows.mode == "step":
        raise ValueError(
            f"Expected a layer that takes steps, but {layer.name} is a "
            'keras.layers.MultiHeadAttention: convert it, or ask for mode="regular"'
        )
    return attention_of_windows(layer, rows)


# This package's layers.


@cost_of.register
def _(layer: CoSiMultiHeadAttention, rows: Rows) -> Cost:
    if rows.mode == "regular":
        return attention_of_windows(layer, rows, single_output=layer._single_output)
    cache, new = layer._stream_state, rows.count
    attended = single_output_attention_cost(layer.seq_len, layer._key_dim, layer._value_dim)
    projected = _projections(layer, new, new)
    itemsize = cache.dtype.size
    ring = bytes_of((layer._key_heads, layer.seq_len, layer._key_dim + layer._value_dim), itemsize)
    waited = bytes_of_state(cache, ("query", "query_mask", "gate")) // max(1, layer.delay)
    read = new * (ring + layer.seq_len + waited) + bytes_of_weights(layer, layer.weights_dtype)
    return (
        projected
        + attended * (new * layer._num_heads)
        + _beside_keras(layer, new, new, layer.seq_len)
        + Cost(state_bytes=bytes_of_state(cache), read_bytes=read)
    )


@cost_of.register
def _(layer: CoSiTransformerEncoder, rows: Rows) -> Cost:
    """Return the cost. Only the newest row goes on after the attention, also in a regular call."""
    newest = rows if rows.mode == "step" else Rows(rows.mode, 1)
    total = cost_of(layer.attention, rows) + Cost(additions=2 * layer.input_features["x"])
    total += cost_of(layer.attention_norm, rows if layer.norm_first else newest)
    for part in (layer.feed_forward, layer.feed_forward_output, layer.output_norm):
        total += cost_of(part, newest)
    return total


@cost_of.register
def _(layer: CircularPositionalEncoding, rows: Rows) -> Cost:
    (features,) = layer.input_features.values()
    added = Cost(additions=rows.count * features)
    read = rows.count * features * _itemsize(layer.variable_dtype)
    if rows.mode == "regular":
        return added + Cost(read_bytes=read)
    state = bytes_of_state(layer._stream_state)
    return added + Cost(state_bytes=state, read_bytes=read + state)


@cost_of.register
def _(layer: RotaryEmbedding, rows: Rows) -> Cost:
    (features,) = layer.input_features.values()
    turned = rows.count * math.prod(features[:-1]) * (layer.rotary.size or features[-1])
    state = 0 if rows.mode == "regular" else bytes_of_state(layer._stream_state)
    return Cost(2 * turned, turned, state_bytes=state, read_bytes=state)


@cost_of.register
def _(layer: CoDelay, rows: Rows) -> Cost:
    if rows.mode == "regular":
        return Cost()
    state = bytes_of_state(layer._stream_state)
    kept = bytes_of_state(layer._stream_state, ("steps",))
    read = rows.count * (kept // max(1, layer.delay)) + state - kept
    return Cost(state_bytes=state, read_bytes=read)


@cost_of.register
def _(layer: CoTemporal, rows: Rows) -> Cost:
    inner: Any = layer.layer
    (features,) = layer._features or (1,)
    outputs = rows.count // layer.block
    total = Cost()
    if isinstance(inner, keras.layers.Conv1D):
        inputs = inner.kernel_size[0] * features // inner.groups
        total += dense_cost(outputs, inputs, inner.filters, inner.use_bias)
        total += _activation(inner, outputs * inner.filters, inner.filters)
    elif isinstance(inner, (keras.layers.DepthwiseConv1D, keras.layers.SeparableConv1D)):
        channels, size = features * inner.depth_multiplier, inner.kernel_size[0]
        total += Cost(outputs * channels * size, outputs * channels * (size - 1))
        filters = channels
        if isinstance(inner, keras.layers.SeparableConv1D):
            filters = inner.filters
            total += dense_cost(outputs, channels, filters, inner.use_bias)
        elif inner.use_bias:
            total += Cost(additions=outputs * filters)
        total += _activation(inner, outputs * filters, filters)
    elif isinstance(inner, keras.layers.STFTSpectrogram):
        kernels = [w.shape[-1] for w in inner.weights]
        total += dense_cost(outputs * features, inner.frame_length, sum(kernels), False)
    else:
        total += Cost(additions=outputs * features * (layer.span - 1))
    total += _weights(inner)
    if rows.mode == "regular":
        return total
    state = bytes_of_state(layer._stream_state)
    return total + Cost(state_bytes=state, read_bytes=state)


@cost_of.register
def _(layer: CoChunkedMultiHeadAttention, rows: Rows) -> Cost:
    size, count = layer.chunk, rows.count
    attended = size * (1 + layer.left_chunks)
    chunk = attention_cost(size, attended, layer._key_dim, layer._value_dim) * layer._num_heads
    total = _projections(layer, count, count) + chunk * -(-count // size)
    total += Cost(read_bytes=bytes_of_weights(layer))
    if rows.mode == "regular":
        return total
    state = bytes_of_state(layer._stream_state)
    return total + Cost(state_bytes=state, read_bytes=state)


@cost_of.register
def _(layer: CoRecurrent, rows: Rows) -> Cost:
    count = rows.count * (layer.window or 1 if rows.mode == "step" else 1)
    features, total = layer._features or 0, Cost()
    for cell in getattr(layer.layer.cell, "cells", [layer.layer.cell]):
        outputs = cell.kernel.shape[1]
        total += dense_cost(count, features, outputs, cell.use_bias)
        total += dense_cost(count, cell.units, outputs, False)
        # The gates are sums and products of each unit.
        total += Cost(count * outputs, count * outputs)
        features = cell.units
    total += _weights(layer.layer)
    if rows.mode == "regular":
        return total
    state = bytes_of_state(layer._stream_state)
    return total + Cost(state_bytes=state, read_bytes=state)


@cost_of.register
def _(layer: CoWindow, rows: Rows) -> Cost:
    if rows.mode == "regular":
        return Cost()
    state = bytes_of_state(layer._stream_state)
    return Cost(state_bytes=state, read_bytes=state)


@cost_of.register
def _(layer: CoResidual, rows: Rows) -> Cost:
    total = cost_of(layer.layer, rows)
    if layer._skip is not None:
        total += cost_of(layer._skip, rows)
    (features,) = layer.input_features.values()
    added = 1 if rows.mode == "regular" and _gives_one_row(layer.layer) else rows.count
    return total + Cost(additions=added * int(np.prod(features)))


# Shared by the functions above.


def _gives_one_row(layer: keras.layers.Layer) -> bool:
    """Return whether a regular call gives only one row."""
    if isinstance(layer, CoResidual):
        return _gives_one_row(layer.layer)
    return isinstance(layer, CoSiTransformerEncoder) or getattr(layer, "_single_output", False)


def attention_of_windows(
    layer: keras.layers.Layer, rows: Rows, single_output: bool = False
) -> Cost:
    """Return the cost of a regular call of attention."""
    queries = keys = rows.count
    if rows.shapes:
        queries = known_length(rows.shapes[0][0])
        keys = known_length(rows.shapes[min(1, len(rows.shapes) - 1)][0])
    if single_output:
        queries = 1
    attended = attention_cost(queries, keys, layer._key_dim, layer._value_dim)
    total = _projections(layer, queries, keys) + attended * layer._num_heads
    if isinstance(layer, CoSiMultiHeadAttention):
        total += _beside_keras(layer, queries, keys, keys)
    return total + Cost(read_bytes=bytes_of_weights(layer))


def _beside_keras(layer: CoSiMultiHeadAttention, queries: int, keys: int, attended: int) -> Cost:
    """Return the cost of what Keras' attention does not have.

    Args:
        layer: The layer.
        queries, keys: How many rows of each are new.
        attended: How many keys a query attends to.
    """
    heads, total = queries * layer._num_heads + keys * layer._key_heads, Cost()
    if layer._query_key_norm:  # The squares, their mean, epsilon, the root, dividing, the scale.
        total += Cost(heads * (3 * layer._key_dim + 1), heads * layer._key_dim)
    if layer._rotary is not None:  # Not the angles, which all layers of a session share.
        turned = layer._rotary.size or layer._key_dim
        total += Cost(2 * heads * turned, heads * turned)
    rows = queries * layer._num_heads
    if layer._logit_soft_cap is not None:
        total += (Cost(2) + Cost(exponentials=1)) * (rows * attended)
    if layer.position_bias is not None:
        total += Cost(additions=rows * attended)
    if layer._use_sinks:
        total += Cost(additions=rows, exponentials=rows)
    return total


def _projections(layer: keras.layers.Layer, queries: int, keys: int) -> Cost:
    """Return the cost of the projections into heads and back, and of the gate."""
    heads = layer._num_heads
    total = projection(layer._query_dense, queries, heads * layer._key_dim)
    key_heads = getattr(layer, "_key_heads", heads)
    total += projection(layer._key_dense, keys, key_heads * layer._key_dim)
    total += projection(layer._value_dense, keys, key_heads * layer._value_dim)
    outputs = math.prod(layer._output_dense.kernel.shape[2:])
    total += projection(layer._output_dense, queries, outputs)
    if getattr(layer, "_use_gate", False):
        gated = heads * layer._value_dim
        total += projection(layer._gate_dense, queries, gated) + Cost(queries * gated)
        total += sigmoid_cost(queries * gated)
    return total


def projection(dense: keras.layers.Layer, rows: int, outputs: int) -> Cost:
    """Return the cost of one projection of an attention layer."""
    inputs = math.prod(dense.kernel.shape) // outputs
    return dense_cost(rows, inputs, outputs, dense.bias is not None)


def _activation(layer: keras.layers.Layer, numbers: int, features: int) -> Cost:
    if layer.activation is None:
        return Cost()
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    if name == "softmax":
        return softmax_cost(numbers // features, features)
    given = activation_cost(name, numbers)
    if given is None:
        raise ValueError(
            f"Expected an activation whose cost is known, but {layer.name} has {name!r}: register "
            "a function for the layer with ct.cost.register"
        )
    return given


def _itemsize(dtype: str) -> int:
    return tf.as_dtype(dtype).size


def _weights(layer: keras.layers.Layer) -> Cost:
    return Cost(read_bytes=bytes_of_weights(layer))


def bytes_of_weights(layer: keras.layers.Layer, kernels: str | None = None) -> int:
    """Return the bytes of a layer's weights, with the kernels in another dtype if it is given."""
    return sum(
        bytes_of(w.shape, _itemsize(kernels if kernels and w.name == "kernel" else w.dtype))
        for w in layer.weights
    )


def bytes_of_state(state: StreamState, names: Iterable[str] | None = None) -> int:
    """Return the bytes of one stream in the variables of a `StreamState`."""
    return sum(
        bytes_of(variable.shape[1:], variable.dtype.size)
        for name, variable in state.variables_by_name.items()
        if names is None or name in names
    )
