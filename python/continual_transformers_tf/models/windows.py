"""Whether the steps of a model give the numbers of the model on windows.

`Windows` describes a tensor of a model's graph: on which windows the model computes the row that a
step computes.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Self

import keras

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.models.step_graph import Node, StepGraph, inputs_of_model


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows on which a model computes the row of a tensor that a step computes.

    Attributes:
        lengths: The lengths that the windows must have. If there are two, no windows fit.
        least: How many steps the windows must have at least.
        deep: What reads rows that see further back than a window: "attention", "recurrent",
            "temporal" (a convolution or pooling) or "pooling" (of the whole window). Then there are
            no such windows. Empty: nothing does.
        every_row: Whether this holds for each row that is the last of `least` rows or more, and
            not only for the newest row. Attention can then attend to these rows.
        complete: Whether this holds for every row that the model has on windows of `least` steps
            or more. A layer that keeps rows of the stream then sees those of a window.
        placed: Whether a row also depends on its place: a `CircularPositionalEncoding` adds row 0
            to the first step of a window, and in a stream only to the first of all steps. A
            `RotaryEmbedding` counts from there too.
        goes_on: Whether a row depends on all earlier steps, through a recurrent layer.
    """

    lengths: frozenset[int] = frozenset()
    least: int = 1
    deep: str = ""
    every_row: bool = True
    complete: bool = True
    placed: bool = False
    goes_on: bool = False

    @property
    def rows(self) -> bool:
        """Whether each row depends only on its own step, and perhaps on its place."""
        return self == Windows(placed=self.placed)

    @property
    def length(self) -> int | None:
        """The length of the shortest windows; None: there are none."""
        lengths = self.lengths or {self.least}
        if self.deep or len(lengths) > 1 or max(lengths) < self.least:
            return None
        return max(lengths)

    def include(self, length: int | None) -> bool:
        """Return whether windows of this length are among them; None: an open axis of time."""
        if self.length is None:
            return False
        return length in (None, self.length) or (not self.lengths and length >= self.least)

    def __or__(self, other: Self) -> "Windows":
        """Return the windows for both of two tensors."""
        return Windows(
            self.lengths | other.lengths,
            max(self.least, other.least),
            self.deep or other.deep,
            self.every_row and other.every_row,
            self.complete and other.complete,
            self.placed or other.placed,
            self.goes_on or other.goes_on,
        )

    def delayed(self, steps: int) -> "Windows":
        """Return the windows for a tensor that is delayed by some steps."""
        lengths = frozenset(n + steps for n in self.lengths)
        least = self.least + steps
        return dataclasses.replace(
            self, lengths=lengths, least=least, every_row=False, complete=False
        )


def windows_of_graph(graph: StepGraph) -> Windows:
    """Return the windows on which a model computes all outputs of a step.

    Args:
        graph: The `StepGraph` of a model that streams.
    """
    return _union(_follow(graph, [Windows()] * len(graph.model.inputs)))


def windows_of_layer(layer: keras.layers.Layer) -> Windows:
    """Return the windows on which a continual layer, called by itself, computes a step's output."""
    return _through_layer(layer, Windows(), Windows(), causal=False)


def _union(windows: Iterable[Windows]) -> Windows:
    union = Windows()
    for one in windows:
        union |= one
    return union


def _follow(graph: StepGraph, inputs: Sequence[Windows]) -> list[Windows]:
    """Return the `Windows` of a model's outputs, given those of its inputs."""

    def visit(node: Node, values: dict[int, Any]) -> list[Windows]:
        way = graph.way(node)
        if way == "model":
            given = [values[id(x)] for x in inputs_of_model(node)]
            return _follow(graph.inner(node), given)
        if way == "continual":
            stride = max(graph.known(x).stride for x in node.input_tensors if id(x) in values)
            result = _through_node(node, values, stride)
        else:
            result = _union(
                _kept(graph, node, x, values[id(x)]) for x in node.input_tensors if id(x) in values
            )
        return [result] * len(node.outputs)

    return keras.tree.flatten(graph.walk(inputs, visit))


def _kept(graph: StepGraph, node: Node, x: keras.KerasTensor, windows: Windows) -> Windows:
    """Return the `Windows` of a node's input, of which the graph may keep the newest rows."""
    layer = graph.kept_window(node, x)
    return windows if layer is None else _through_layer(layer, windows, windows, causal=False)


def _through_node(node: Node, values: dict[int, Windows], stride: int) -> Windows:
    args, kwargs = node.arguments.fill_in(values)
    given = inspect.signature(node.operation.call).bind(*args, **kwargs).arguments
    inputs = _union(x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Windows))
    attended = [x for name in ("value", "key") if isinstance(x := given.get(name), Windows)]
    causal = bool(given.get("use_causal_mask"))
    of_steps = _union(attended) if attended else inputs
    return _through_layer(node.operation, inputs, of_steps, causal, stride)


def _through_layer(
    layer: keras.layers.Layer,
    inputs: Windows,
    attended: Windows,
    causal: bool,
    stride: int = 1,
) -> Windows:
    """Return the `Windows` of a continual layer's output.

    Args:
        layer: The layer.
        inputs: Those of all its inputs.
        attended: Those of the steps that it attends to.
        causal: Whether it is called with a causal mask.
        stride: How many steps of the model lie between the rows of its inputs.
    """
    if isinstance(layer, CoResidual):
        return inputs | _through_layer(layer.layer, inputs, attended, causal, stride)
    if isinstance(layer, (CircularPositionalEncoding, RotaryEmbedding)):
        return dataclasses.replace(inputs, placed=True)
    if isinstance(layer, CoDelay):
        return inputs.delayed(layer.delay * stride)
    if isinstance(layer, CoTemporal):
        least = inputs.least + (layer.receptive_field - 1) * stride
        if layer.gives_one_row:
            if not inputs.complete:
                return _deep(inputs, "pooling")
            return inputs | Windows(frozenset({least}), every_row=False, complete=False)
        if inputs.lengths and not inputs.every_row and layer.receptive_field > 1:
            return _deep(inputs, "temporal")
        late = inputs.delayed(layer.delay * stride)
        # Other padding adds rows that a stream does not have.
        valid = getattr(layer.layer, "padding", None) == "valid" and layer.delay == 0
        return dataclasses.replace(
            inputs | late | Windows(least=least),
            every_row=inputs.every_row,
            complete=inputs.complete and valid,
        )
    if isinstance(layer, CoChunkedMultiHeadAttention):
        least = attended.least + (layer.receptive_field - 1) * stride
        return dataclasses.replace(inputs | attended, least=least, complete=False)
    if isinstance(layer, CoRecurrent) and layer.window is None:
        return dataclasses.replace(inputs, goes_on=True, complete=False)
    rows = layer.receptive_field
    n = (rows - 1) * stride + 1
    # In longer windows these see no more steps.
    slides = isinstance(layer, CoSiMultiHeadAttention) and rows >= (
        layer._sliding_window or rows + 1
    )
    if slides and layer.delay == 0 and attended.every_row:
        least = attended.least + (layer._sliding_window - 1) * stride
        every_row = causal and not layer._single_output
        return inputs | Windows(least=least, every_row=every_row, complete=False)
    if not attended.complete:
        return _deep(inputs, "recurrent" if isinstance(layer, CoRecurrent) else "attention")
    n += attended.least - 1
    if slides or (isinstance(layer, TransformerEncoder) and layer.kind == "single_output"):
        return inputs | Windows(least=n, every_row=False, complete=False)
    return inputs | Windows(frozenset({n}), every_row=False, complete=False)


def _deep(inputs: Windows, layer: str) -> Windows:
    """Return the windows of a layer that keeps rows which see further back than a window."""
    return dataclasses.replace(inputs, deep=layer, every_row=False, complete=False)
