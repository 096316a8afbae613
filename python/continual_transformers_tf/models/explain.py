"""`ct.explain`: what of a model streams and how, what does not, and why."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

import keras

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.model_file import described_field
from continual_transformers_tf.models.lowering import LoweredGraph, lower, lower_graph
from continual_transformers_tf.models.problem import CannotStream, Problem
from continual_transformers_tf.models.step_graph import Node, StepGraph
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.models.windows import Windows, windows_of_graph, windows_of_layer

WIDTH = 100
NOT_AT_ALL = "does not stream"


@dataclasses.dataclass(frozen=True)
class ExplainedLayer:
    """One layer or operation of a model, and how it streams.

    Attributes:
        name: Its name. A layer of a model within the model has both names: "encoder/dense".
        kind: The name of its class.
        how: How it streams, in words.
        streams: Whether it does, in a `ct.Session`.
        reasons: Why it does not, and what to do. Empty if it does.
    """

    name: str
    kind: str
    how: str
    streams: bool
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a model streams. It prints as a table.

    Attributes:
        name: The model's name.
        streams: Whether a `ct.Session` can take the model's steps.
        streams_in_keras: Whether a `ct.StreamingModel`, which `ct.convert` makes, can.
        rows: An `ExplainedLayer` for each layer and operation, in the order in which they run.
        reasons: Why the model does not stream, beside the reasons of its layers.
        receptive_field: How many steps an output depends on; None if the model does not stream.
        delay: How many steps an output comes later than its input; None as above.
        block: How many steps of its inputs a step takes at once; None as above.
        goes_on: Whether an output depends on all earlier steps, through a recurrent layer; None as
            above. `receptive_field` is then that of the other layers.
        equals_windows: Whether a step gives the number of the model on the newest window of the
            model's own length; None if the model does not stream.
        windows: The same in words: on which windows, and what to do.
        state_bytes: How many bytes a session keeps of each stream; None if there is no session.
    """

    name: str
    streams: bool
    streams_in_keras: bool
    rows: tuple[ExplainedLayer, ...]
    reasons: tuple[str, ...] = ()
    receptive_field: int | None = None
    delay: int | None = None
    block: int | None = None
    goes_on: bool | None = None
    equals_windows: bool | None = None
    windows: str = ""
    state_bytes: int | None = None

    @property
    def as_on_windows(self) -> str:
        """Whether a step equals the model on windows: "yes, on windows of 64 steps"."""
        return f"{'yes' if self.equals_windows else 'no'}, {self.windows}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, which `json.dumps` takes."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.streams:
            yield f"{self.name} streams."
        elif self.streams_in_keras:
            yield f"{self.name} streams in TensorFlow (ct.convert), but not in a ct.Session."
        else:
            yield f"{self.name} does not stream."
        for reason in self.reasons:
            yield from _wrapped(reason, "  ")
        if self.rows:
            yield ""
            cells = [("layer", "class", "how it streams")]
            cells += [(row.name, row.kind, row.how) for row in self.rows]
            widths = [max(len(line[i]) for line in cells) for i in range(2)]
            reasons: list[tuple[str, ...]] = [(), *(row.reasons for row in self.rows)]
            for line, why in zip(cells, reasons, strict=True):
                yield f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]}"
                for reason in why:
                    yield from _wrapped(reason, "    ")
        if self.receptive_field is not None:
            yield ""
            yield f"receptive field   {described_field(self.receptive_field, self.goes_on)}"
            yield f"delay             {_steps(self.delay or 0)}"
            if self.block and self.block > 1:
                yield f"a step takes      {_steps(self.block)} of the input"
        if self.windows:
            first, *rest = _wrapped(self.as_on_windows, " " * 18)
            yield f"as on windows     {first.lstrip()}"
            yield from rest
        if self.state_bytes is not None:
            yield f"a stream          {self.state_bytes:,} bytes"


def explain(model: keras.layers.Layer, seq_len: int | None = None) -> Explanation:
    """Explain what of a model streams and how, and what does not and why.

    ```python
    print(ct.explain(model))
    ```

    The reasons are those of the errors of `ct.convert` and `ct.Session`.

    Args:
        model: A Keras model, a `StreamingModel`, or a layer of this package. It is not changed.
        seq_len: The window, in steps, of every `keras.layers.MultiHeadAttention` inside. It is
            needed if the length of the model's time axis is None.

    Returns:
        An `Explanation`, also if the model does not stream, was never called, or has a window that
        is not known without `seq_len`.

    Raises:
        ValueError: If `model` is none of these.
    """
    if not isinstance(model, keras.Model):
        return _explain_layer(model)
    try:
        lowered = lower_graph(model, seq_len)
    except ValueError as error:  # There is no graph, or no copy of it, or no window is known.
        problems = getattr(error, "problems", [Problem(str(error))])
        rows = tuple(_rows_without_a_graph(model, problems))
        layers = model._flatten_layers(recursive=False, include_self=False)
        left = [p for p in problems if not any(p.layer is layer for layer in layers)]
        return Explanation(model.name, False, False, rows, tuple(map(str, left)))
    graph = lowered.graph
    table = _Rows(model, lowered)
    reasons = table.reasons_of_the_model
    state_bytes = None
    if not lowered.problems:
        state_bytes, refused = _state_bytes(model, seq_len)
        reasons += refused
    in_keras = not lowered.conversion and not graph.problems and bool(graph.layers)
    streams = not lowered.problems and not reasons
    explanation = Explanation(
        model.name, streams, in_keras, table.rows, tuple(reasons), state_bytes=state_bytes
    )
    if not streams and not in_keras:
        return explanation
    length = graph.model.inputs[0].shape[1]
    equals, windows = _compared_with_windows(windows_of_graph(graph), length)
    return dataclasses.replace(
        explanation,
        receptive_field=graph.receptive_field,
        delay=graph.delay,
        block=graph.block,
        goes_on=graph.goes_on,
        equals_windows=equals,
        windows=windows,
    )


def _explain_layer(layer: keras.layers.Layer) -> Explanation:
    try:
        lower(layer)
    except CannotStream as error:
        reasons = tuple(problem.why for problem in error.problems)
        row = ExplainedLayer(layer.name, type(layer).__name__, NOT_AT_ALL, False, reasons)
        in_keras = isinstance(layer, ContinualLayer) and not getattr(layer, "_no_steps", None)
        return Explanation(layer.name, False, in_keras, (row,))
    state_bytes, reasons_of_session = _state_bytes(layer, None)
    row = ExplainedLayer(layer.name, type(layer).__name__, _how_continual(layer), True)
    equals, windows = _compared_with_windows(windows_of_layer(layer), None)
    return Explanation(
        layer.name,
        not reasons_of_session,
        True,
        (row,),
        tuple(reasons_of_session),
        layer.receptive_field,
        layer.delay,
        layer.block,
        getattr(layer, "goes_on", False),
        equals,
        windows,
        state_bytes,
    )


def _state_bytes(model: keras.layers.Layer, seq_len: int | None) -> tuple[int | None, list[str]]:
    """Return how many bytes a session keeps of a stream, and why there is no session."""
    try:
        from continual_transformers_tf.session import Session
    except ImportError:  # Without the native libraries, this is not known.
        return None, []
    try:
        return Session(model, seq_len=seq_len).state_bytes, []
    except ValueError as error:
        return None, [str(error)]


class _Rows:
    """The rows of a model.

    Args:
        model: The model that was given.
        lowered: Its `LoweredGraph`. The layers in it may be converted copies.

    Attributes:
        rows: An `ExplainedLayer` for each layer and operation.
        reasons_of_the_model: The reasons that are of no single row.
    """

    def __init__(self, model: keras.Model, lowered: LoweredGraph) -> None:
        self._given = dict(_operations(model))
        self._problems = lowered.problems
        self._rows: dict[str, ExplainedLayer] = {}
        self._told: set[str] = set()
        self._add(lowered.graph, "")
        self.rows = tuple(self._rows.values())
        left = {str(p): None for p in self._problems if str(p) not in self._told}
        self.reasons_of_the_model = list(left)

    def _add(self, graph: StepGraph, scope: str) -> None:
        """Add the rows of a graph."""

        def visit(node: Node, values: dict[int, Any]) -> list[None]:
            op, way = node.operation, graph.way(node)
            name = scope + op.name
            given = self._given.get(name, op)
            reasons = [p for p in self._problems if p.layer is op or p.layer is given]
            self._told.update(map(str, reasons))
            if reasons or way != "model":
                how = NOT_AT_ALL if reasons or way is None else _how(graph, node, values, way)
                self._merge(name, type(given).__name__, how, reasons)
            if way == "model":
                self._add(graph.inner(node), f"{name}/")
            return [None] * len(node.outputs)

        graph.walk([None] * len(graph.model.inputs), visit)

    def _merge(self, name: str, kind: str, how: str, problems: list[Problem]) -> None:
        """Add a row, or to the row of a layer that is called again."""
        reasons = tuple(dict.fromkeys(problem.why for problem in problems))
        before = self._rows.get(name)
        if before is not None and not reasons and how not in before.how.split("; "):
            how = f"{before.how}; {how}"
        self._rows[name] = ExplainedLayer(name, kind, how, not reasons, reasons)


def _operations(model: keras.Model, scope: str = "") -> Iterator[tuple[str, keras.Operation]]:
    """Return the layers and operations of a model and of those within it, with their names."""
    if isinstance(model, StreamingModel):
        model = model.model
    if isinstance(model, keras.Sequential):
        model = model._functional
    for op in getattr(model, "operations", ()):
        yield scope + op.name, op
        if isinstance(op, keras.Model):
            yield from _operations(op, f"{scope}{op.name}/")


def _rows_without_a_graph(model: keras.Model, problems: list[Problem]) -> Iterator[ExplainedLayer]:
    """Return the rows of a model of which it is not known how its layers are called."""
    for layer in model._flatten_layers(recursive=False, include_self=False):
        if isinstance(layer, keras.layers.InputLayer):
            continue
        reasons = tuple(problem.why for problem in problems if problem.layer is layer)
        streams = isinstance(layer, ContinualLayer) and not reasons
        how = NOT_AT_ALL if reasons else "not known"
        if streams:
            how = f"{_how_continual(layer)}, as a layer by itself"
        yield ExplainedLayer(layer.name, type(layer).__name__, how, streams, reasons)


def _how(graph: StepGraph, node: Node, values: dict[int, Any], way: str) -> str:
    """Return in words how a node of a graph streams, given the values of the graph's tensors."""
    if way == "continual":
        causal = ", causal" if node.arguments.kwargs.get("use_causal_mask") else ""
        return _how_continual(node.operation) + causal
    if way == "row taken":
        return "takes the row that a step gives: nothing to do"
    whole = any(graph.known(x).kind == "whole" for x in node.input_tensors if id(x) in values)
    return {
        "queries": "the same rows at every step",
        "row by row": "row by row",
        "reshaped": "row by row",
        "on samples": "on the whole window at every step" if whole else "on the newest row",
        "attention to whole": "attention on the whole window at every step",
    }[way]


def _how_continual(layer: keras.layers.Layer) -> str:
    """Return in words how a continual layer streams."""
    if isinstance(layer, CoResidual):
        return f"adds its input to: {_how_continual(layer.layer)}"
    if isinstance(layer, CoDelay):
        return f"delay of {_steps(layer.delay)}"
    if isinstance(layer, CoTemporal):
        return _how_temporal(layer)
    if isinstance(layer, CoChunkedMultiHeadAttention):
        before = f"{layer.left_chunks} chunk" + "s" * (layer.left_chunks != 1)
        return f"attention within chunks of {_steps(layer.chunk)}, and to {before} before"
    if isinstance(layer, CoRecurrent):
        if layer.window is None:
            return "a state that goes on from step to step"
        return f"runs on a window of {_steps(layer.window)}, from zeros"
    if isinstance(layer, CircularPositionalEncoding):
        return f"positions: row p mod {layer.get_config()['max_len']:,} for step p of a stream"
    if isinstance(layer, RotaryEmbedding):
        return "turned by the number of the step"
    if isinstance(layer, CoWindow):
        return f"gives the whole window of {_steps(layer.seq_len)} at every step"
    if not hasattr(layer, "seq_len"):
        return "takes steps in its own way"
    late = f", delay of {_steps(layer.delay)}" if layer.delay else ""
    how = f"attention over a window of {_steps(layer.seq_len)}"
    if isinstance(layer, TransformerEncoder):
        kind = layer.kind.replace("_", " ")
        blocks = f"{len(layer.blocks)} block" + "s" * (len(layer.blocks) > 1)
        return f"{how}, {kind}, {blocks}{late}"
    return f"{how}, {'retroactive' if layer.gives_windows else 'single output'}{late}"


def _how_temporal(layer: CoTemporal) -> str:
    """Return in words how a convolution or pooling along time streams."""
    every = f", a row for every {_steps(layer.block)}" if layer.block > 1 else ""
    late = f", delay of {_steps(layer.delay)}" if layer.delay else ""
    if isinstance(layer.layer, keras.layers.ZeroPadding1D):
        return "zeros before the stream's first step"
    return f"reads {_steps(layer.span)}{every}{late}"


# Why a step sees further back than a window, by `Windows.deep`.
_FURTHER_BACK = (
    "reads outputs of attention, or of a layer with padding: in a window the first of these see "
    "fewer steps, or zeros, than in a stream. Train the model on steps, or give convolutions "
    "padding='valid'"
)
_DEEP = {
    "attention": (
        "because attention attends to the outputs of other attention, or of convolutions with "
        "padding, so a step sees further back than a window: give causal attention a "
        "sliding_window, train the model on steps, or use ct.TransformerEncoder(kind='retroactive')"
    ),
    "recurrent": (
        f"because a recurrent layer with a window {_FURTHER_BACK}, which a ct.StreamingModel takes"
    ),
    "temporal": (
        f"because a convolution or pooling {_FURTHER_BACK}, and causal attention a sliding_window"
    ),
    "pooling": f"because a pooling of the whole window {_FURTHER_BACK}",
}


def _compared_with_windows(windows: Windows, length: int | None) -> tuple[bool, str]:
    """Return whether a step equals the model on its windows, and the same in words.

    Args:
        windows: The `Windows` of the model's outputs.
        length: The length of the model's windows; None: its axis of time is open.
    """
    if windows.rows and not windows.placed:
        return True, "because each output depends only on its own step"
    if windows.goes_on:
        return False, (
            "only the first window of a new stream: a recurrent state goes on with a stream, and "
            "every window begins with zeros. ct.convert(..., recurrence='window') begins each step "
            "with zeros too"
        )
    if windows.length is None:
        return False, (
            _DEEP[windows.deep]
            if windows.deep
            else "because its layers have windows of different lengths: give them the same seq_len"
        )
    if windows.include(length):
        if windows.placed:
            return False, (
                "only the first window of a new stream: positions go on with a stream, and every "
                "window begins at row 0. Training moves the first row of a "
                "CircularPositionalEncoding, so a trained model can be read from any row"
            )
        least = "" if windows.lengths else "at least "
        return True, f"on windows of {least}{_steps(windows.length)}"
    return False, (
        f"because an output depends on {_steps(windows.length)}, and the model's windows have "
        f"{length:,}: train the model on windows of {_steps(windows.length)}, or on steps"
    )


def _steps(count: int) -> str:
    return f"{count:,} step" + ("" if count == 1 else "s")


def _wrapped(text: str, indent: str) -> list[str]:
    return [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(
            part, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False
        )
    ]
