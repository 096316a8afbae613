"""`ct.cost`, which counts what a step or a regular call of a layer or a model costs."""

import math
from typing import Any

import keras

from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.models.cost_formulas import Cost, activation_cost
from continual_transformers_tf.models.cost_layers import Rows, cost_of, largest, with_register
from continual_transformers_tf.models.own_calls import check_streaming_model
from continual_transformers_tf.models.problem import CannotStream
from continual_transformers_tf.models.step_graph import StepGraph
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.ops.stream_state import check_integer

MODES = ("step", "regular")


@with_register
def cost(
    layer_or_model: keras.layers.Layer, mode: str = "step", seq_len: int | None = None
) -> Cost:
    """Count what a layer or model costs: operations, bytes of a stream, bytes a step reads.

    This counts what the mathematics needs in inference, by the rules of `cost_formulas`. It does
    not count extra work that a kernel does. A matrix product has as many multiplications as
    multiply-adds, so `multiplications` is what tables of "FLOPs" often mean, including the paper's.

    To count other types of layers, register a function of the layer and a `Rows` with
    `ct.cost.register`. It works as the `register` of `functools.singledispatch` does.

    Args:
        layer_or_model: A built layer of this package or of Keras, a functional or built sequential
            model of them, or a `StreamingModel`.
        mode: "step": one step of one stream whose window is full. "regular": a regular call on one
            window.
        seq_len: With mode="regular", the steps of the window. It is needed unless the layer or the
            model's input has it.

    Returns:
        A `Cost`.

    Raises:
        ValueError: If the mode is another, something is not built, the length of the window is not
            known, a model cannot be run on steps, or the cost of a layer is not known.
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


def _check_built(layer: keras.layers.Layer) -> None:
    if not layer.built:
        raise ValueError(
            f"Expected a built layer, but {layer.name} has never been called: call it once"
        )


# Whole models.

# keras.ops, by the names of their classes: (multiplications, additions) for each element.
_OPS = {"Add": (0, 1), "Subtract": (0, 1), "Multiply": (1, 0), "Divide": (1, 0), "GetItem": (0, 0)}
_OPS |= {"TrueDivide": (1, 0), "Negative": (0, 0), "Cast": (0, 0), "Reshape": (0, 0)}
_OPS |= {"Maximum": (0, 0), "Minimum": (0, 0), "Square": (1, 0), "Sqrt": (1, 0), "Glu": (1, 1)}
_OPS |= dict.fromkeys(("Concatenate", "ExpandDims", "Squeeze", "Transpose", "Split"), (0, 0))


def _cost_of_model(model: keras.Model, mode: str, seq_len: int | None) -> Cost:
    if isinstance(model, StreamingModel):
        check_streaming_model(model)
        graph = model._graph
    else:
        graph = StepGraph(model)
    if graph.model is None or (mode == "step" and graph.problems):
        raise CannotStream(graph.problems, f"{model.name} cannot be run on the steps of a stream")
    return _cost_of_graph(graph, mode, seq_len)


def _cost_of_graph(graph: StepGraph, mode: str, seq_len: int | None) -> Cost:
    total = Cost()
    for nodes in graph.model._nodes_by_depth.values():
        for node in nodes:
            if not node.is_input:
                total += _cost_of_node(graph, node, mode, seq_len)
    for layer in graph.kept_windows:
        total += cost_of(layer, Rows(mode, 1))
    return total


def _cost_of_node(graph: StepGraph, node: Any, mode: str, seq_len: int | None) -> Cost:
    op = node.operation
    if isinstance(op, keras.Model):
        inner = graph._inner.get(id(node))
        if inner is not None:
            return _cost_of_graph(inner, mode, seq_len)
    shapes = [_shape_of_one(graph, x, mode, seq_len) for x in node.input_tensors]
    if any(_kind(graph, x) == "whole" for x in node.input_tensors):
        mode = "regular"  # The layer is run on the whole window at every step.
    shape = largest(shapes)
    # Token ids have no feature axis.
    given = shape if isinstance(op, keras.layers.Embedding) else shape[:-1]
    known = [n for n in given if n is not None]
    rows = Rows(mode, math.prod(known) if len(known) == len(given) else None, shapes)
    if isinstance(op, keras.layers.Layer):
        return cost_of(op, rows)
    kind = type(op).__name__
    # Logarithms and exponentials count alike.
    name = {"Exp": "exponential", "Log": "exponential"}.get(kind, kind.lower())
    activation = activation_cost(name, 1)
    if activation is not None:
        return activation * rows.numbers(op)
    counts = _OPS.get(kind)
    if counts is None:
        raise ValueError(
            f"Expected layers and operations whose cost is known, but got {type(op).__name__}"
        )
    numbers = rows.numbers(op) if any(counts) else 0
    return Cost(counts[0] * numbers, counts[1] * numbers)


def _shape_of_one(
    graph: StepGraph, x: keras.KerasTensor, mode: str, seq_len: int | None
) -> list[int | None]:
    """Return the shape of one window or step of a tensor of the graph, without the batch axis."""
    kind = _kind(graph, x)
    if kind == "whole":
        return list(graph._known[id(x)].shape[1:])
    shape = list(x.shape[1:])
    if kind in (None, "sample"):
        return shape
    if mode == "step":
        return [graph.rows(x), *shape[1:]]
    if shape[0] is None:
        shape[0] = 1 if kind == "newest" else seq_len
    return shape


def _kind(graph: StepGraph, x: keras.KerasTensor) -> str | None:
    """Return the kind of a tensor of the graph; None if it is not in the graph."""
    known = graph._known.get(id(x))
    return None if known is None else known.kind
