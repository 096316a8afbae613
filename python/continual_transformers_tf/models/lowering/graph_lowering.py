"""Lowering of a Keras model's graph, planned for steps, to the nodes of a plan."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.models.lowering import (
    logic_ops,  # noqa: F401  They register how operations are lowered.
    order_ops,  # noqa: F401
)
from continual_transformers_tf.models.lowering.chunked import co_chunked  # noqa: F401
from continual_transformers_tf.models.lowering.continual_layers import (
    State,
    attend_whole,
    encoder_on_whole,
    lower_continual,
)
from continual_transformers_tf.models.lowering.keras_layers import (
    attention_arguments,
    lower_layer,
    mask_after,
    refuse_masks,
)
from continual_transformers_tf.models.lowering.keras_ops import Call, lower_op
from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder, Symbol
from continual_transformers_tf.models.lowering.recurrent import co_recurrent  # noqa: F401
from continual_transformers_tf.models.lowering.temporal import mask_of_sequence
from continual_transformers_tf.models.problem import Problem
from continual_transformers_tf.models.row_wise import Tensor
from continual_transformers_tf.models.step_graph import Node, StepGraph, inputs_of_model
from continual_transformers_tf.ops.step import Rows


class GraphLowering:
    """The lowering of one model's graph.

    Args:
        b: The `PlanBuilder`.
        graph: A `StepGraph`.
        scope: The beginning of the nodes' names.

    Attributes:
        problems: `Problem`s: those of the graph, and those of nodes that a plan cannot have.
        state: A dict from the id of a continual layer to its entry of keras_state.
    """

    def __init__(self, b: PlanBuilder, graph: StepGraph, scope: str = "") -> None:
        self.b = b
        self.graph = graph
        self.problems = list(graph.problems)
        self.state: dict[int, State] = {}
        self._scope = scope
        self._windows: dict[int, Symbol] = {}  # Id of a layer that keeps rows -> its output.

    def run(self, inputs: Sequence[Symbol]) -> Any:
        """Lower the model with these Symbols as inputs.

        Returns:
            The Symbols of the model's outputs, in their own structure.
        """
        return self.graph.walk(inputs, self._visit)

    def _visit(self, node: Node, values: dict[int, Symbol]) -> list[Symbol] | Symbol:
        way, op = self.graph.way(node), node.operation
        self.b.scope = f"{self._scope}/{op.name}" if self._scope else op.name
        try:
            if way is None:  # The graph's problems have the reason.
                return self._placeholders(node)
            outputs = _WAYS[way](self, node, values)
            self._check(node, outputs)
            return outputs
        except CannotLower as reason:
            self.problems.append(Problem(str(reason), op))
            return self._placeholders(node)
        finally:
            self.b.scope = self._scope

    def _placeholders(self, node: Node) -> list[Symbol]:
        """Return Symbols in place of the outputs of a node that cannot be lowered.

        With them the nodes after it can be lowered, and their problems reported too.
        """
        shapes = [[1 if n is None else n for n in shape] for shape in self._shapes(node)]
        return [self.b.add_value(shape, "float32") for shape in shapes]

    def _shapes(self, node: Node) -> list[tuple[int | None, ...]]:
        """Return the shapes of a node's outputs in a step; None stands for an unknown size."""
        shapes = []
        for x in node.outputs:
            known = self.graph.known(x)
            shapes.append(self._shape(known))
        return shapes

    def _shape(self, known: Tensor) -> tuple[int | None, ...]:
        """Return the shape of a tensor in a step; None stands for an unknown size."""
        if known.kind in ("sample", "whole"):
            return known.shape[1:]
        rows = self.graph.rows(known)
        several = (rows,) if known.kind == "window" and rows > 1 else ()
        return (*several, *known.shape[2:])

    def _check(self, node: Node, outputs: Any) -> None:
        """Raise CannotLower if a step's shape differs from that in Keras' graph."""
        for y, shape in zip(keras.tree.flatten(outputs), self._shapes(node), strict=True):
            same = len(y.shape) == len(shape) and all(
                n in (None, m) for n, m in zip(shape, y.shape, strict=True)
            )
            if not same:
                raise CannotLower(
                    f"returns {list(y.shape)} in a step, but {list(shape)} in Keras' graph"
                )

    # The ways of a node; see StepGraph.way.

    def _continual(self, node: Node, values: dict[int, Symbol]) -> Symbol:
        layer = node.operation
        if isinstance(layer, (CoTemporal, CoRecurrent, CoChunkedMultiHeadAttention)):
            return self._continual_on_rows(node, values)
        arguments = _bound(layer, *node.arguments.fill_in(values))
        check_time_axis(layer, node.input_tensors[0])
        given = [arguments.pop(k) for k in ("x", "query", "value", "key") if k in arguments]
        given = given[: 1 + max(i for i, x in enumerate(given) if x is not None)]
        masks = masks_of_call(layer, given)
        rows = self.graph.rows(node.input_tensors[0])
        lag = max(self.graph.known(x).lag for x in node.input_tensors if id(x) in values)
        if lag > 0:
            masks["value_mask"] = self.b.mask_and(
                masks.get("value_mask"), mask_of_sequence(self.b, lag, rows)
            )
        causal = {k: True for k in ("use_causal_mask",) if arguments.get(k)}
        y, self.state[id(layer)] = lower_continual(
            self.b, layer, *given, rows=rows, **masks, **causal
        )
        if rows > 1 and self.graph.known(node.outputs[0]).kind == "newest":
            y = self._newest_row(y, rows)
        return y.with_mask(continual_mask_after(layer, given[0].mask))

    def _continual_on_rows(self, node: Node, values: dict[int, Symbol]) -> Symbol:
        """Lower a layer that may be given several rows in a step, and rows of no sequence."""
        layer, known = node.operation, self.graph.known(node.input_tensors[0])
        arguments = _bound(layer, *node.arguments.fill_in(values))
        given = [x for k in ("x", "query", "value", "key") if (x := arguments.get(k)) is not None]
        masks = {}
        if isinstance(layer, CoRecurrent):
            masks["mask"] = self._mask_of_recurrence(node, arguments.get("mask"), given[0])
        y, self.state[id(layer)] = lower_continual(
            self.b,
            layer,
            *(x.with_mask(None) for x in given),
            given=Rows(known.lag, known.delay),
            rows=self.graph.rows(known),
            **masks,
        )
        return y.with_mask(masks.get("mask"))

    def _mask_of_recurrence(self, node: Node, given: Any, x: Symbol) -> Symbol | None:
        """Return the mask of a recurrent layer's rows: that of its call, or that of its input x."""
        own = node.input_tensors[0]
        if not isinstance(given, Symbol) or node.arguments.kwargs.get("mask") is _mask(own):
            return x.mask
        return self.b.reshape(given, (1,)) if given.shape == () else given

    def _model(self, node: Node, values: dict[int, Symbol]) -> Any:
        inner = GraphLowering(self.b, self.graph.inner(node), self.b.scope)
        # The inner graph's problems are among those of this graph already.
        inner.problems = []
        outputs = inner.run([values[id(x)] for x in inputs_of_model(node)])
        self.problems += inner.problems
        self.state |= inner.state
        return outputs

    def _row_taken(self, node: Node, values: dict[int, Symbol]) -> Symbol:
        (x, rows) = values[id(node.input_tensors[0])], self.graph.rows(node.input_tensors[0])
        return x if rows == 1 else self._newest_row(x, rows)

    def _newest_row(self, x: Symbol, rows: int) -> Symbol:
        """Return the last of the rows `[rows, ...]` of a step."""
        newest = self.b.slice(x, 0, rows - 1, 1)
        return self.b.reshape(newest, newest.shape[1:])

    def _row_by_row(self, node: Node, values: dict[int, Symbol]) -> list[Symbol]:
        # Several rows of a step are like a window of them.
        return self._lower(node, values, of_rows=self.graph.rows(node.outputs[0]) > 1)

    def _on_samples(self, node: Node, values: dict[int, Symbol]) -> list[Symbol]:
        outputs = self._lower(node, self._samples(node, values), of_samples=True)
        return self._steps(node, outputs)

    def _attention_to_whole(self, node: Node, values: dict[int, Symbol]) -> list[Symbol]:
        layer, samples = node.operation, self._samples(node, values)
        given = _bound(layer, *node.arguments.fill_in(samples))
        if isinstance(layer, TransformerEncoderBlock):
            y = encoder_on_whole(self.b, layer, given["x"])
        else:
            refuse_masks(given)
            y = attend_whole(self.b, layer, **attention_arguments(given))
        return self._steps(node, [y])

    def _samples(self, node: Node, values: dict[int, Symbol]) -> dict[int, Symbol]:
        """Return the values of a node's inputs as samples of a batch, without masks."""
        samples = {}
        for x in node.input_tensors:
            y = values[id(x)].with_mask(None)
            layer = self.graph.kept_window(node, x)
            if layer is not None:
                y = self._kept(layer, y)
            elif self.graph.known(x).kind == "newest":
                y = self.b.reshape(y, (1, *y.shape))
            samples[id(x)] = y
        return samples

    def _kept(self, layer: CoWindow, x: Symbol) -> Symbol:
        """Return the newest rows of a window, kept once for all nodes that use them."""
        if id(layer) not in self._windows:
            scope, self.b.scope = self.b.scope, layer.name
            self._windows[id(layer)], self.state[id(layer)] = lower_continual(self.b, layer, x)
            self.b.scope = scope
        return self._windows[id(layer)]

    def _steps(self, node: Node, outputs: Sequence[Symbol]) -> list[Symbol]:
        """Return outputs of samples as outputs of steps."""
        steps = []
        for x, y in zip(node.outputs, outputs, strict=True):
            y = y.with_mask(None)
            if self.graph.known(x).kind == "newest":
                y = self.b.reshape(y, y.shape[1:])
            steps.append(y)
        return steps

    def _lower(
        self,
        node: Node,
        values: dict[int, Symbol],
        of_rows: bool = False,
        of_samples: bool = False,
    ) -> list[Symbol]:
        args, kwargs = node.arguments.fill_in(values)
        lead = 1 if of_rows or of_samples else 2
        shapes: list[tuple[int, ...] | None] = []
        for x in node.outputs:
            known = self.graph.known(x)
            shape = self._shape(known) if known.kind == "window" else known.shape[lead:]
            sizes = tuple(n for n in shape if n is not None)
            shapes.append(sizes if len(sizes) == len(shape) else None)
        call = Call(args, kwargs, lead, node.outputs[0].dtype, shapes, of_rows)
        return lower_call(self.b, node.operation, call)

    def _queries(self, node: Node, values: dict[int, Symbol]) -> Symbol:
        return self.b.constant(np.asarray(node.operation.queries.value))


_WAYS = {
    "queries": GraphLowering._queries,
    "continual": GraphLowering._continual,
    "model": GraphLowering._model,
    "row taken": GraphLowering._row_taken,
    "row by row": GraphLowering._row_by_row,
    "reshaped": GraphLowering._row_by_row,
    "on samples": GraphLowering._on_samples,
    "attention to whole": GraphLowering._attention_to_whole,
}


def lower_call(b: PlanBuilder, op: keras.Operation, call: Call) -> list[Symbol]:
    """Lower a Keras layer or operation, and return a list of its outputs' Symbols."""
    if not isinstance(op, keras.layers.Layer):
        return lower_op(b, op, call)
    y = lower_layer(b, op, call=call)
    outputs = list(y) if isinstance(y, (list, tuple)) else [y]
    mask = mask_after(b, op, call, outputs[0])
    return [x.with_mask(mask) for x in outputs]


def trace(
    b: PlanBuilder, function: Callable[..., Any], symbols: Sequence[Symbol], lead: int
) -> Any:
    """Apply a function of tensors to Symbols: trace it with Keras, and lower the graph.

    Args:
        b: The `PlanBuilder`.
        function: A function of as many tensors as there are symbols.
        symbols: A list of Symbols.
        lead: How many axes Keras' tensors have before those of a Symbol.

    Returns:
        A Symbol, or a list of them.
    """
    given = [keras.KerasTensor((*[None] * lead, *x.shape), dtype=x.dtype) for x in symbols]
    try:
        graph = keras.Function(given, function(*given))
    except Exception as error:  # The function is the user's, and may raise anything.
        reason = str(error).strip().split("\n")[0]
        raise CannotLower(f"computes by other means than keras.ops: {reason}") from error
    values = {id(x): y for x, y in zip(given, symbols, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            args, kwargs = node.arguments.fill_in(values)
            shapes: list[tuple[int, ...] | None] = [tuple(x.shape[lead:]) for x in node.outputs]
            call = Call(args, kwargs, lead, node.outputs[0].dtype, shapes)
            try:
                outputs = lower_call(b, node.operation, call)
            except CannotLower as reason:
                kind = type(node.operation).__name__
                raise CannotLower(f"contains a {kind}, which {reason}") from reason
            values.update((id(x), y) for x, y in zip(node.outputs, outputs, strict=True))
    outputs = [values[id(x)] for x in graph.outputs]
    return outputs[0] if len(outputs) == 1 else outputs


def check_time_axis(layer: keras.layers.Layer, x: keras.KerasTensor) -> None:
    """Raise CannotLower if a layer's time axis is not the model's, axis 1."""
    while isinstance(layer, CoResidual):
        layer = layer.layer
    axis = 1
    if isinstance(layer, CoDelay):
        axis = layer.temporal_dim % len(x.shape)
    elif isinstance(layer, CircularPositionalEncoding):
        axis = layer.temporal_dim
    if axis != 1:
        raise CannotLower(f"has time on axis {axis}: expected axis 1, that of the model")


def masks_of_call(
    layer: keras.layers.Layer, given: Sequence[Symbol | None]
) -> dict[str, Symbol | None]:
    """Return the masks that Keras passes to a continual layer with its inputs."""
    while isinstance(layer, CoResidual):  # It passes the mask of its input on.
        layer = layer.layer
    if not isinstance(layer, keras.layers.MultiHeadAttention):
        return {}
    if len(given) == 1:
        given = [None, *given]  # The query is the value too.
    # Keras' mask of a step hides its key. Its query's row is like that of any other step.
    masks = zip(("value_mask", "key_mask"), given[1:], strict=False)
    return {name: None if x is None else x.mask for name, x in masks}


def continual_mask_after(layer: keras.layers.Layer, mask: Symbol | None) -> Symbol | None:
    """Return Keras' mask on a continual layer's output, given the mask on its first input."""
    if isinstance(layer, CoSiMultiHeadAttention):
        return None if layer.delay > 0 else mask
    if not isinstance(layer, CoResidual):
        return None
    while isinstance(layer, CoResidual):
        layer = layer.layer
    # An encoder passes no mask on. A delayed row's mask came with an earlier step.
    drops = hasattr(layer, "seq_len") and not layer.supports_masking
    return None if drops or layer.delay > 0 else mask


def _mask(x: keras.KerasTensor) -> Any:
    """Return the mask that a tensor of the graph carries."""
    return getattr(x, "_keras_mask", None)


def _bound(
    layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    arguments = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    if isinstance(layer, CoResidual):  # Its call hands the others on to the layer within.
        arguments |= arguments.pop("arguments", {})
    return {k: x for k, x in arguments.items() if k != "training"}
