"""The run of steps through a model's graph, in TensorFlow."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf.layers.call_modes import call_mode
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.models.own_calls import computes_as
from continual_transformers_tf.models.row_wise import Tensor
from continual_transformers_tf.models.step_graph import Node, StepGraph, inputs_of_model
from continual_transformers_tf.ops.step import Rows, Step


class StepRun:
    """The run of T steps through a model's graph.

    Args:
        graph: The model's `StepGraph`, without problems.
        step: The `Step` that the model's streams are taking.
        training: Whether this is training.
    """

    def __init__(self, graph: StepGraph, step: Step, training: bool | None) -> None:
        self.graph = graph
        self.step = step
        self.training = training

    def outputs(self, inputs: Sequence[tf.Tensor]) -> Any:
        """Compute the outputs of the steps.

        Args:
            inputs: Tensors `(M, T, ...)`, in the order of the model's inputs. T is a multiple of
                the graph's `block`.

        Returns:
            Tensors `(M, T / stride, ...)`, in the structure of the model's outputs.
        """
        for layer in self.graph.layers:  # Before anything is computed.
            layer._check_policy()
        return self.graph.walk(inputs, self._visit)

    def _visit(self, node: Node, values: dict[int, tf.Tensor]) -> Any:
        way: Any = self.graph.way(node)  # The graph has no problems, so it is not None.
        return _WAYS[way](self, node, values)

    # The ways of a node; see StepGraph.way.

    def _continual(self, node: Node, values: dict[int, tf.Tensor]) -> Any:
        given = [self.graph.known(x) for x in node.input_tensors if id(x) in values]
        before = self.step.rows_of_input
        self.step.rows_of_input = Rows(
            lag=max(x.lag for x in given),
            delay=max(x.delay for x in given),
            each=self.graph.rows(given[0]),
        )
        try:
            outputs = self._continual_outputs(node, values)
        finally:
            self.step.rows_of_input = before
        if self.graph.known(node.outputs[0]).kind in ("newest", "sample"):
            return keras.tree.map_structure(lambda y: self._newest_rows(y, given[0]), outputs)
        return outputs

    def _newest_rows(self, x: tf.Tensor, known: Tensor) -> tf.Tensor:
        """Return the last of the rows that a tensor has in each step."""
        rows = self.graph.rows(known)
        return x if rows == 1 else x[:, rows - 1 :: rows]

    def _continual_outputs(self, node: Node, values: dict[int, tf.Tensor]) -> Any:
        update_state = self.step.update_state
        one_row = self.step.one_row and self.step.rows_of_input.each == 1
        if not (one_row and _steps_in_one_op(node.operation)):
            return self._call(node, values, update_state=update_state)
        rows = {id(x): _without_time(values[id(x)]) for x in node.input_tensors if id(x) in values}
        with call_mode("step"):
            outputs = self._call(node, rows, update_state=update_state)
        return keras.tree.map_structure(with_time, outputs)

    def _model(self, node: Node, values: dict[int, tf.Tensor]) -> Any:
        inner = [values[id(x)] for x in inputs_of_model(node)]
        return StepRun(self.graph.inner(node), self.step, self.training).outputs(inner)

    def _row_taken(self, node: Node, values: dict[int, tf.Tensor]) -> tf.Tensor:
        x = node.input_tensors[0]
        return self._newest_rows(values[id(x)], self.graph.known(x))

    def _row_by_row(self, node: Node, values: dict[int, tf.Tensor]) -> Any:
        return self._call(node, values)

    def _reshaped(self, node: Node, values: dict[int, tf.Tensor]) -> tf.Tensor:
        x = values[id(node.input_tensors[0])]
        return tf.reshape(x, tf.concat([tf.shape(x)[:2], node.outputs[0].shape[2:]], 0))

    def _attention_to_whole(self, node: Node, values: dict[int, tf.Tensor]) -> list[tf.Tensor]:
        """Run as `_on_samples`, but let no row attend to a step that was never taken."""
        inputs = [x for x in node.input_tensors if id(x) in values]
        kept = [layer for x in inputs if (layer := self.graph.kept_window(node, x)) is not None]
        whole = [x for x in inputs if self.graph.known(x).kind == "whole"]
        n = kept[0].seq_len if kept else values[id(whole[0])].shape[2]
        steps = tf.shape(values[id(inputs[0])], tf.int64)[1]
        number = self.step.position[:, tf.newaxis] + tf.range(steps)
        row = tf.range(n, dtype=tf.int64) - n + 1  # 0 is the newest step's row.
        there = tf.reshape(number[..., tf.newaxis] + row >= 0, [-1, n])
        if isinstance(node.operation, TransformerEncoderBlock):
            regular = node.operation.call_regular
            return self._on_samples(node, values, call=regular, key_mask=there)
        return self._on_samples(node, values, value_mask=there)

    def _on_samples(self, node: Node, values: dict[int, tf.Tensor], **more: Any) -> list[tf.Tensor]:
        """Run a node with steps as samples: (M, T, ...) becomes (M * T, ...), and back."""
        inputs = [x for x in node.input_tensors if id(x) in values]
        lead = tf.shape(values[id(inputs[0])])[:2]
        samples = {}
        for x in inputs:
            layer = self.graph.kept_window(node, x)
            kind, y = self.graph.known(x).kind, values[id(x)]
            if layer is not None:
                if id(layer) not in values:  # Another node may have called it already.
                    values[id(layer)] = layer.call_steps(y, update_state=self.step.update_state)
                kind, y = "whole", values[id(layer)]
            samples[id(x)] = _to_samples(kind, y)
        with call_mode("regular"):
            outputs = keras.tree.flatten(self._call(node, samples, **more))
        return [
            _to_steps(self.graph.known(x).kind, y, lead)
            for x, y in zip(node.outputs, outputs, strict=True)
        ]

    def _queries(self, node: Node, values: dict[int, tf.Tensor]) -> tf.Tensor:
        """Return the same queries for every step: `(M, T, Q, E)`."""
        given = node.input_tensors[0]
        lead = tf.shape(values[id(given)])[:2] // [1, self.graph.rows(given)]
        queries = self._call(node, values)
        return tf.broadcast_to(queries[:, tf.newaxis], tf.concat([lead, tf.shape(queries)[1:]], 0))

    def _call(
        self,
        node: Node,
        values: dict[int, tf.Tensor],
        call: Callable[..., Any] | None = None,
        **more: Any,
    ) -> Any:
        """Call a node's operation, or a function in place of it, with these values."""
        args, kwargs = node.arguments.fill_in(values)
        if getattr(node.operation, "_call_has_training_arg", False):
            kwargs = {"training": self.training, **kwargs}
        return (call or node.operation)(*args, **kwargs, **more)


_WAYS = {
    "queries": StepRun._queries,
    "continual": StepRun._continual,
    "model": StepRun._model,
    "row taken": StepRun._row_taken,
    "row by row": StepRun._row_by_row,
    "reshaped": StepRun._reshaped,
    "on samples": StepRun._on_samples,
    "attention to whole": StepRun._attention_to_whole,
}


def _steps_in_one_op(layer: keras.layers.Layer) -> bool:
    """Return whether a layer's `call_step` can be one op, where its `call_steps` is many.

    A subclass that computes something else is called with several steps, as its graph says.
    """
    kinds = (CoSiMultiHeadAttention, CoSiTransformerEncoder, TransformerEncoder)
    return any(isinstance(layer, kind) and computes_as(layer, kind) for kind in kinds)


def _without_time(x: tf.Tensor) -> tf.Tensor:
    """Turn one step (M, 1, ...) into (M, ...), with its mask."""
    mask = getattr(x, "_keras_mask", None)
    return with_mask(tf.squeeze(x, 1), None if mask is None else tf.squeeze(mask, 1))


def with_time(x: tf.Tensor) -> tf.Tensor:
    """Turn one step (M, ...) into (M, 1, ...), with its mask."""
    mask = getattr(x, "_keras_mask", None)
    return with_mask(tf.expand_dims(x, 1), None if mask is None else tf.expand_dims(mask, 1))


def with_mask(x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Put Keras' mask on a tensor, and return the tensor; None: leave it as it is."""
    if mask is not None:
        x._keras_mask = mask
    return x


def _to_samples(kind: str, x: tf.Tensor) -> tf.Tensor:
    axis_of_time = [1] if kind == "newest" else []
    return tf.reshape(x, tf.concat([[-1], axis_of_time, tf.shape(x)[2:]], 0))


def _to_steps(kind: str, x: tf.Tensor, lead: tf.Tensor) -> tf.Tensor:
    first = 2 if kind == "newest" else 1
    return tf.reshape(x, tf.concat([lead, tf.shape(x)[first:]], 0))
