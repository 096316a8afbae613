"""What a step of a layer or a model costs, and a regular call."""

import functools
import math
import re

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.models.cost_formulas import (
    Cost,
    activation_cost,
    attention_cost,
    bytes_of,
    dense_cost,
    layer_norm_cost,
    single_output_attention_cost,
    softmax_cost,
)
from continual_transformers_tf.models.step_graph import StepGraph
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.ops.stream_state import check_integer

MODES = ("step", "regular")


def cost(layer_or_model, mode="step", seq_len=None):
    """What a layer or model costs: operations, the bytes of a stream, the bytes a step reads.

    What is counted is what the mathematics needs, by the rules of `cost_formulas`, in inference;
    not what a kernel does beside it. A product of matrices is as many multiplications as it is
    multiply-adds: `multiplications` is what tables of "FLOPs" often mean, the paper's among them.

    Args:
        layer_or_model: a built layer of this package or of Keras, a functional or built sequential
            model of them, or a `StreamingModel`.
        mode: "step": one step of one stream whose window is full. "regular": a regular call on one
            window.
        seq_len: with mode="regular", the steps of the window: needed unless the layer or the
            model's input has it.

    Returns:
        A `Cost`. A layer of another type is made known by `ct.cost.register`, as
        `functools.singledispatch` has it, with a function of the layer and a `Rows`.

    Raises:
        ValueError: if the mode is neither, something is not built, the length of the window is not
            known, a model cannot be run on steps, or nothing is known of a layer's cost.
    """
    if mode not in MODES:
        raise ValueError(f"Expected mode to be one of {MODES}, but got {mode!r}")
    if seq_len is not None:
        check_integer("seq_len", seq_len, at_least=1)
    if not isinstance(layer_or_model, keras.layers.Layer):
        raise ValueError(f"Expected a layer or model, but got {layer_or_model!r}")
    _check_built(layer_or_model)
    if isinstance(layer_or_model, keras.Model):
        return _cost_of_model(layer_or_model, mode, seq_len)
    layer = layer_or_model
    while isinstance(layer, CoResidual):
        layer = layer.layer
    seq_len = seq_len or getattr(layer, "seq_len", None)
    return cost_of(layer_or_model, Rows(mode, 1 if mode == "step" else seq_len))


class Rows:
    """What a layer is run on.

    Args:
        mode: "step" or "regular".
        count: how many rows of features; None where that is not known.
        shapes: those of a window or step of each input, without its batch; none for a layer alone.
    """

    def __init__(self, mode, count, shapes=()):
        self.mode, self.shapes = mode, shapes
        self._count = count

    @property
    def count(self):
        """How many rows of features."""
        return _known(self._count)

    def numbers(self, layer):
        """How many numbers its largest input has, for a layer that knows no features itself."""
        if not self.shapes:
            raise ValueError(
                f"Expected a model that {layer.name} ({type(layer).__name__}) is a part of: by "
                "itself it knows no features"
            )
        return self.count * _largest(self.shapes)[-1]


def _known(count):
    if count is None:
        raise ValueError(
            'Expected seq_len, the steps of the window, with mode="regular", but got None'
        )
    return count


def _largest(shapes):
    return max(shapes, key=len)


@functools.singledispatch
def cost_of(layer, rows):
    """What a layer costs, a `Cost`, on rows, a `Rows`."""
    raise ValueError(
        f"Expected a layer whose cost is known, but got {layer.name} ({type(layer).__name__}): "
        "make it known by ct.cost.register"
    )


cost.register = cost_of.register


# Of Keras.


@cost_of.register
def _(layer: keras.layers.Dense, rows):
    outputs = layer.units
    given = dense_cost(rows.count, layer.kernel.shape[0], outputs, layer.use_bias)
    return given + _activation(layer, rows.count * outputs, outputs) + _weights(layer)


@cost_of.register
def _(layer: keras.layers.EinsumDense, rows):
    kernel, output = re.fullmatch(r".*,(.*)->(.*)", layer.equation).groups()
    sizes = zip(kernel, layer.kernel.shape, strict=True)
    outputs = math.prod(size for letter, size in sizes if letter in output)
    count = rows.count
    if rows.shapes:  # More than the last axis may be summed over.
        count = rows.numbers(layer) * outputs // math.prod(layer.kernel.shape)
    activation = _activation(layer, count * outputs, outputs)
    return projection(layer, count, outputs) + activation + _weights(layer)


@cost_of.register
def _(layer: keras.layers.LayerNormalization, rows):
    features = math.prod(layer.gamma.shape)
    return layer_norm_cost(rows.count, features) + _weights(layer)


@cost_of.register
def _(layer: keras.layers.Activation, rows):
    numbers = rows.numbers(layer)
    return _activation(layer, numbers, numbers // rows.count)


@cost_of.register
def _(layer: keras.layers.ReLU, rows):
    return Cost()


@cost_of.register
def _(layer: keras.layers.Softmax, rows):
    return softmax_cost(rows.count, rows.numbers(layer) // rows.count)


@cost_of.register
def _(layer: keras.layers.Add, rows):
    return Cost(additions=rows.numbers(layer) * (len(rows.shapes) - 1))


@cost_of.register
def _(layer: keras.layers.Embedding, rows):
    width = layer.output_dim * _itemsize(layer.variable_dtype)
    return Cost(read_bytes=rows.count * width)


@cost_of.register(keras.layers.Dropout)
@cost_of.register(keras.layers.Flatten)
@cost_of.register(keras.layers.Identity)
@cost_of.register(keras.layers.InputLayer)
@cost_of.register(keras.layers.Masking)
@cost_of.register(keras.layers.Reshape)
def _(layer, rows):
    return Cost()


@cost_of.register
def _(layer: keras.layers.MultiHeadAttention, rows):
    if rows.mode == "step":
        raise ValueError(
            f"Expected a layer that takes steps, but {layer.name} is a "
            'keras.layers.MultiHeadAttention: convert it, or ask for mode="regular"'
        )
    return attention_of_windows(layer, rows)


# Of this package.


@cost_of.register
def _(layer: CoSiMultiHeadAttention, rows):
    if rows.mode == "regular":
        return attention_of_windows(layer, rows, single_output=layer._single_output)
    cache = layer._stream_state
    attended = single_output_attention_cost(layer.seq_len, layer._key_dim, layer._value_dim)
    projected = _projections(layer, 1, 1)
    itemsize = cache.dtype.size
    ring = bytes_of((layer._num_heads, layer.seq_len, layer._key_dim + layer._value_dim), itemsize)
    waited = bytes_of_state(cache, ("query", "query_mask", "gate")) // max(1, layer.delay)
    read = ring + layer.seq_len + waited + bytes_of_weights(layer, layer.weights_dtype)
    return (
        projected
        + attended * layer._num_heads
        + Cost(state_bytes=bytes_of_state(cache), read_bytes=read)
    )


@cost_of.register
def _(layer: CoSiTransformerEncoder, rows):
    """The newest row alone goes beyond the attention, in a step and in a regular call."""
    newest = Rows(rows.mode, 1)
    total = cost_of(layer.attention, rows) + Cost(additions=2 * layer.input_features["x"])
    total += cost_of(layer.attention_norm, rows if layer.norm_first else newest)
    for part in (layer.feed_forward, layer.feed_forward_output, layer.output_norm):
        total += cost_of(part, newest)
    return total


@cost_of.register
def _(layer: CircularPositionalEncoding, rows):
    (features,) = layer.input_features.values()
    added = Cost(additions=rows.count * features)
    read = rows.count * features * _itemsize(layer.variable_dtype)
    if rows.mode == "regular":
        return added + Cost(read_bytes=read)
    state = bytes_of_state(layer._stream_state)
    return added + Cost(state_bytes=state, read_bytes=read + state)


@cost_of.register
def _(layer: CoDelay, rows):
    if rows.mode == "regular":
        return Cost()
    state = bytes_of_state(layer._stream_state)
    kept = bytes_of_state(layer._stream_state, ("steps",))
    return Cost(state_bytes=state, read_bytes=kept // max(1, layer.delay) + state - kept)


@cost_of.register
def _(layer: CoResidual, rows):
    total = cost_of(layer.layer, rows)
    if layer._skip is not None:
        total += cost_of(layer._skip, rows)
    (features,) = layer.input_features.values()
    added = 1 if rows.mode == "step" or _gives_one_row(layer.layer) else rows.count
    return total + Cost(additions=added * int(np.prod(features)))


# What they share.


def _gives_one_row(layer):
    """Whether a regular call gives the row of one step alone."""
    if isinstance(layer, CoResidual):
        return _gives_one_row(layer.layer)
    return isinstance(layer, CoSiTransformerEncoder) or getattr(layer, "_single_output", False)


def attention_of_windows(layer, rows, single_output=False):
    """A regular call of attention."""
    queries = keys = rows.count
    if rows.shapes:
        queries, *_, keys = (_known(shape[0]) for shape in (rows.shapes * 2)[:2])
    if single_output:
        queries = 1
    attended = attention_cost(queries, keys, layer._key_dim, layer._value_dim)
    weights = Cost(read_bytes=bytes_of_weights(layer))
    return _projections(layer, queries, keys) + attended * layer._num_heads + weights


def _projections(layer, queries, keys):
    """Into heads and back; of a gate, too, and what it multiplies."""
    heads = layer._num_heads
    total = projection(layer._query_dense, queries, heads * layer._key_dim)
    total += projection(layer._key_dense, keys, heads * layer._key_dim)
    total += projection(layer._value_dense, keys, heads * layer._value_dim)
    outputs = math.prod(layer._output_dense.kernel.shape[2:])
    total += projection(layer._output_dense, queries, outputs)
    if getattr(layer, "_use_gate", False):
        gated = heads * layer._value_dim
        total += projection(layer._gate_dense, queries, gated) + Cost(queries * gated)
        total += activation_cost("sigmoid", queries * gated)
    return total


def projection(dense, rows, outputs):
    inputs = math.prod(dense.kernel.shape) // outputs
    return dense_cost(rows, inputs, outputs, dense.bias is not None)


def _activation(layer, numbers, features):
    if layer.activation is None:
        return Cost()
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    if name == "softmax":
        return softmax_cost(numbers // features, features)
    given = activation_cost(name, numbers)
    if given is None:
        raise ValueError(
            f"Expected an activation whose cost is known, but {layer.name} has {name!r}"
        )
    return given


def _itemsize(dtype):
    return tf.as_dtype(dtype).size


def _weights(layer):
    return Cost(read_bytes=bytes_of_weights(layer))


def bytes_of_weights(layer, kernels=None):
    """The bytes of a layer's weights, with its kernels in another dtype where one is given."""
    return sum(
        bytes_of(w.shape, _itemsize(kernels if kernels and w.name == "kernel" else w.dtype))
        for w in layer.weights
    )


def bytes_of_state(state, names=None):
    """The bytes of a stream's row of the variables of a `StreamState`."""
    return sum(
        bytes_of(variable.shape[1:], variable.dtype.size)
        for name, variable in state._variables.items()
        if names is None or name in names
    )


def _check_built(layer):
    if not layer.built:
        raise ValueError(f"Expected a built layer, but {layer.name} has never been called")


# Whole models.

# keras.ops, by the names of their classes: multiplications and additions of each number.
_OPS = {"Add": (0, 1), "Subtract": (0, 1), "Multiply": (1, 0), "Divide": (1, 0), "GetItem": (0, 0)}
_OPS |= {"TrueDivide": (1, 0), "Negative": (0, 0), "Cast": (0, 0), "Reshape": (0, 0)}


def _cost_of_model(model, mode, seq_len):
    graph = model._graph if isinstance(model, StreamingModel) else StepGraph(model)
    if graph.model is None or (mode == "step" and graph.problems):
        raise ValueError(
            f"{model.name} cannot be run on the steps of a stream:\n"
            + "\n".join(f"- {problem}" for problem in dict.fromkeys(graph.problems))
        )
    return _cost_of_graph(graph, mode, seq_len)


def _cost_of_graph(graph, mode, seq_len):
    total = Cost()
    for nodes in graph.model._nodes_by_depth.values():
        for node in nodes:
            if not node.is_input:
                total += _cost_of_node(graph, node, mode, seq_len)
    return total


def _cost_of_node(graph, node, mode, seq_len):
    op = node.operation
    if isinstance(op, keras.Model):
        inner = graph._inner.get(id(node))
        if inner is not None:
            return _cost_of_graph(inner, mode, seq_len)
    shapes = [_shape_of_one(graph, x, mode, seq_len) for x in node.input_tensors]
    largest = _largest(shapes)
    # Numbers of tokens have no axis of features.
    given = largest if isinstance(op, keras.layers.Embedding) else largest[:-1]
    rows = Rows(mode, None if None in given else math.prod(given), shapes)
    if isinstance(op, keras.layers.Layer):
        return cost_of(op, rows)
    known = _OPS.get(type(op).__name__)
    if known is None:
        raise ValueError(
            f"Expected layers and operations whose cost is known, but got {type(op).__name__}"
        )
    numbers = rows.numbers(op) if any(known) else 0
    return Cost(known[0] * numbers, known[1] * numbers)


def _shape_of_one(graph, x, mode, seq_len):
    """The shape of one window or step of a tensor of the graph, without its batch."""
    known = graph._known.get(id(x))
    shape = list(x.shape[1:])
    if known is None or known.kind == "sample":
        return shape
    if mode == "step":
        return [1, *shape[1:]]
    if shape[0] is None:
        shape[0] = 1 if known.kind == "newest" else seq_len
    return shape
