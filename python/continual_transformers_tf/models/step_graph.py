"""The graph of a Keras model, planned for steps of streams: what runs how, and what cannot run.

A tensor of the graph has one of four kinds. Its shape in a regular call depends on the kind, and in
steps it is always `(M, T, ...)`:

- "window": `(B, T, ...)`, a row for every step of the window;
- "newest": `(B, 1, ...)`, only the row of the newest step, or of a delayed one;
- "sample": `(B, ...)`, the same without the time axis;
- "whole": `(B, N, ...)`, a row for every step of the window, but every new step changes all of
  them. Retroactive attention returns this. In steps it is `(M, T, N, ...)`.

An operation that computes each row of a window only from that row does the same on a step. Any
operation may follow on the newest step only, or on a whole window: it runs on every step as on a
sample of a batch. Attention keeps the state that it needs from earlier steps.

A step's row of a window may be delayed. Step t then returns row -1 - delay of the window that ends
with step t. So a step still returns what a regular call returns for that window.

A layer with strides gives a row for every few rows of its input. A step of the model then takes a
block of steps, as many as one row of its slowest tensor stands for. Before the strides, tensors
have several rows in each step.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras

from continual_transformers_tf.layers.call_modes import call_mode
from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.learned_queries import LearnedQueries
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.models.own_calls import (
    OWN_CALL,
    computes_as_ours,
    has_own_call,
)
from continual_transformers_tf.models.positions import table_of
from continual_transformers_tf.models.problem import Problem
from continual_transformers_tf.models.refusals import (
    DROP_THE_MASK,
    READS_ATTENTION,
    looks_at_more,
    sees_an_older_window,
    unequal_delays,
    uneven_rows,
)
from continual_transformers_tf.models.row_wise import (
    Tensor,
    is_row_wise,
    lengths_differ,
    reshapes,
    row_taken,
)
from continual_transformers_tf.models.row_wise_mark import difference_from_mark, relies_on_mark
from continual_transformers_tf.ops.step import Rows

Node = Any  # A node of Keras' graph. Its class is not public.
Shape = tuple[int | None, ...]


class StepGraph:
    """The graph of a functional or sequential model, planned for steps.

    Args:
        model: A built `keras.Model` that is functional or sequential.
        inputs: The `Tensor`s of the model's inputs, if it is a part of another model; None: windows
            of single steps.
        block: How many steps a step of the whole model takes; None: as its strides need.

    Attributes:
        model: The functional model that the model is, or contains; None if there is none.
        problems: Why the model cannot be run on steps: `Problem`s. Empty if it can.
        layers: The continual layers, in the order in which they are run.
        receptive_field: How many steps an output depends on.
        delay: How many steps lie between an input and its output.
        goes_on: Whether outputs depend on all earlier steps, through a recurrent layer.
        block: How many steps of the inputs a step takes at once.
    """

    def __init__(
        self, model: keras.Model, inputs: list[Tensor] | None = None, block: int | None = None
    ) -> None:
        self.model: Any = _functional(model)  # Any: Keras' private attributes are read.
        self.block = block or 1
        self._begin([])
        if self.model is None and _graph_of(model) is not None:
            self.problems.append(Problem(OWN_CALL, model))
            return
        if self.model is None:
            self.problems.append(
                Problem(
                    f"{model.name} is neither a functional nor a built sequential model, so it has "
                    "no graph to read. Make a ct.Session of each of its continual layers, or build "
                    "the model with keras.Model(inputs, outputs)"
                )
            )
            return
        inputs_are_own = inputs is None
        if inputs is None:
            inputs = [Tensor("window", True, 1, tuple(x.shape)) for x in self.model.inputs]
            self.problems += [
                Problem(
                    f"no axis of time in {name} of shape {x.shape}: expected (B, T, E), "
                    "or (B, T) of integers"
                )
                for x, name in zip(self.model.inputs, names_of_inputs(self.model), strict=True)
                if len(x.shape) < 3 and not (len(x.shape) == 2 and "int" in x.dtype)
            ]
        of_inputs = list(self.problems)
        outputs = self.walk(inputs, self._plan_node, self._known)
        if block is None and self._needed > 1:
            # Plan again: whether the newest row of a tensor is one of several depends on the block.
            self.block = self._needed
            self._begin(of_inputs)
            outputs = self.walk(inputs, self._plan_node, self._known)
        self.outputs = keras.tree.flatten(outputs)
        self.receptive_field = max(x.receptive_field for x in self.outputs)
        self.delay = max(x.delay * x.stride for x in self.outputs)
        self.goes_on = any(getattr(layer, "goes_on", False) for layer in self.layers)
        late = unequal_delays(self.outputs)
        if late and inputs_are_own:
            self.problems.append(Problem(f"its outputs are {late}"))

    def _begin(self, problems: list[Problem]) -> None:
        """Forget a plan, and begin another."""
        self._plan: dict[int, str] = {}  # Id of a node -> how it is run: see `way`.
        self._inner: dict[int, StepGraph] = {}  # Id of a nested model's node -> its StepGraph.
        self._known: dict[int, Tensor] = {}  # Id of a tensor of the graph -> its Tensor.
        self._refused: set[int] = set()  # Ids of nodes with problems.
        self.problems: list[Problem] = list(problems)
        # (Id of a tensor of windows, N) -> the layer that keeps its N newest rows.
        self._windows: dict[tuple[int, int], CoWindow] = {}
        # (Id of a node, id of its input) -> the layer of those that gives the input's rows.
        self._kept: dict[tuple[int, int], CoWindow] = {}
        self.layers: list[keras.layers.Layer] = []
        self._needed = 1  # How many steps the layers with strides or chunks take at once.

    def way(self, node: Node) -> str | None:
        """Return how a node is run on steps; None if it cannot be.

        - "queries": the same rows at every step.
        - "continual": a continual layer takes a step.
        - "model": a model within the model, whose `StepGraph` is `inner(node)`.
        - "row taken": the node takes the row that the step gives, so it does nothing in steps.
        - "row by row": the operation is called with (M, T, ...), as if with a window.
        - "reshaped": the same, but the operation's shape has the length of windows in it.
        - "on samples": the operation is called with every step as a sample of a batch.
        - "attention to whole": the same, and rows of steps that were never taken are masked.
        """
        return None if id(node) in self._refused else self._plan.get(id(node))

    def inner(self, node: Node) -> "StepGraph":
        """Return the StepGraph of the model that a node calls."""
        return self._inner[id(node)]

    def known(self, tensor: keras.KerasTensor) -> Tensor:
        """Return the `Tensor` that describes a tensor of the graph."""
        return self._known[id(tensor)]

    def rows(self, tensor: keras.KerasTensor | Tensor) -> int:
        """Return how many rows of a tensor of the graph a step has."""
        known = tensor if isinstance(tensor, Tensor) else self._known[id(tensor)]
        return max(1, self.block // known.stride) if known.kind == "window" else 1

    def kept_window(self, node: Node, x: keras.KerasTensor) -> CoWindow | None:
        """Return the layer that keeps the newest rows of a node's input; None: there is none.

        A node that combines a window with whole windows is given the rows of the window that an
        earlier step gave.
        """
        return self._kept.get((id(node), id(x)))

    @property
    def kept_windows(self) -> list[CoWindow]:
        """The layers of `kept_window`."""
        return list(self._windows.values())

    @property
    def has_whole_windows(self) -> bool:
        """Whether a layer of the model gives all rows of the window at every step."""
        return any(x.kind == "whole" for x in self._known.values()) or any(
            graph.has_whole_windows for graph in self._inner.values()
        )

    def walk(
        self,
        inputs: Sequence[Any],
        visit: Callable[[Node, dict[int, Any]], Any],
        values: dict[int, Any] | None = None,
    ) -> Any:
        """Visit all nodes in order, and return the model's outputs.

        Args:
            inputs: The values of the model's inputs.
            visit: A function of (node, values) that returns the values of the node's outputs.
            values: A dict from the ids of the graph's tensors to their values, which this fills;
                None: a new one.
        """
        values = {} if values is None else values
        values.update((id(x), y) for x, y in zip(self.model.inputs, inputs, strict=True))
        for depth in sorted(self.model._nodes_by_depth, reverse=True):
            for node in self.model._nodes_by_depth[depth]:
                if not node.is_input:
                    outputs = keras.tree.flatten(visit(node, values))
                    values.update((id(x), y) for x, y in zip(node.outputs, outputs, strict=True))
        outputs = [values[id(x)] for x in self.model.outputs]
        return keras.tree.pack_sequence_as(self.model._outputs_struct, outputs)

    # Planning.

    def _plan_node(self, node: Node, values: dict[int, Tensor]) -> list[Tensor]:
        op = node.operation
        if isinstance(op, LearnedQueries):
            self._plan[id(node)] = "queries"
            shape = tuple(node.outputs[0].shape)
            return [Tensor("sample", True, 1, shape, stride=self.block)]
        values = self._with_kept_windows(node, values)
        args, kwargs = node.arguments.fill_in(values)
        inputs = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Tensor)]
        causal = all(x.causal for x in inputs)
        field = max(x.receptive_field for x in inputs)
        latest = max(inputs, key=lambda x: x.delay * x.stride)
        late: dict[str, Any] = dict(
            delay=latest.delay,
            delayed_by=latest.delayed_by,
            stride=latest.stride,
            lag=max(x.lag for x in inputs),
        )
        kinds = {x.kind for x in inputs}
        unequal = unequal_delays(inputs)
        if unequal:
            self._refuse(node, f"is given {unequal}")
        if "whole" in kinds and _takes_mask_of_whole(node, values):
            self._refuse(
                node,
                "is given the mask of a window, as from keras.layers.Masking, after retroactive "
                f"attention, which keeps no such mask in steps: {DROP_THE_MASK}",
            )
        if isinstance(op, keras.Model):
            inner = op
            if isinstance(op, ContinualLayer):
                # A StreamingModel within another model is treated as the model that it contains.
                inner = node.operation.model
                if not computes_as_ours(op):
                    self._refuse(node, OWN_CALL)
            if _functional(inner) is not None:
                given = [values[id(x)] for x in inputs_of_model(node)]
                graph = self._inner[id(node)] = StepGraph(inner, given, self.block)
                self._plan[id(node)] = "model"
                self._needed = math.lcm(self._needed, graph._needed)
                self.problems += graph.problems
                for layer in graph.layers:
                    self._add_layer(layer)
                if graph.has_whole_windows and any(map(_has_mask, node.input_tensors)):
                    self._refuse(
                        node,
                        "has retroactive attention inside, and is given the mask of a window, as "
                        "from keras.layers.Masking: put the layers of the model into this graph",
                    )
                return graph.outputs
        uneven = uneven_rows(inputs)
        if uneven:
            self._refuse(node, uneven)
        if isinstance(op, CoTemporal) and kinds == {"window"}:
            return [self._plan_temporal(node, inputs[0])]
        if min(x.lag for x in inputs) < 0:
            self._refuse(
                node,
                "is given rows of padding before the stream's first, which only a convolution or a "
                "pooling can read: put keras.layers.ZeroPadding1D right before that layer",
            )
        if isinstance(op, ContinualLayer) and _streams_on(op, inputs):
            self._plan[id(node)] = "continual"
            self._needed = math.lcm(self._needed, op.block * inputs[0].stride)
            causal = self._plan_continual(node, args, kwargs, inputs) and causal
            field += (op.receptive_field - 1) * inputs[0].stride
            if op.delay > 0:
                late |= dict(
                    delay=latest.delay + op.delay,
                    delayed_by=node.operation.name,
                    lag=late["lag"] + op.delay,
                )
            if op.gives_windows:
                n = node.operation.seq_len
                shapes = [(x.shape[0], n, *x.shape[2:]) for x in node.outputs]
                return [Tensor("whole", causal, field, shape, **late) for shape in shapes]
            return [
                Tensor(_kind_of_step(op, x), causal, field, tuple(x.shape), **late)
                for x in node.outputs
            ]
        if "window" not in kinds:
            self._plan[id(node)] = "on samples"
            self._check_nothing_streams_within(node)
            whole = {x.shape[1] for x in inputs if x.kind == "whole"}
            if whole and isinstance(op, (ContinualLayer, keras.layers.MultiHeadAttention)):
                self._plan_attention_to_whole(node)
            shapes = self._shapes_of_newest(node, values)
            if _asks_from_elsewhere(op, inputs):
                whole = set()  # The output has a row for each query, also if they are N.
            return [
                Tensor(_kind_of_one(shape, whole), causal, field, shape, **late) for shape in shapes
            ]
        taken = row_taken(op, args, kwargs)
        if taken is not None:
            kind, row = taken
            self._plan[id(node)] = "row taken"
            if row != -1 - latest.delay:
                self._refuse(
                    node,
                    f"takes row {row} of a window, but a step gives row {-1 - latest.delay}: take "
                    f"that row, as by x[:, {-1 - latest.delay}]",
                )
            lead, *features = node.outputs[0].shape
            shape = (lead, 1, *features[1:]) if kind == "newest" else (lead, *features)
            return [Tensor(kind, causal, field, shape, **late)]
        if "whole" in kinds:
            self._refuse(
                node,
                "combines the whole windows of retroactive attention with a window of which no "
                "rows can be kept: each of its rows must see no later step, come without a delay, "
                "and belong to a window of the same length",
            )
        elif kinds != {"window"}:
            self._refuse(
                node,
                "mixes whole windows with tensors of only the newest step: take the newest step of "
                "the windows too, as by x[:, -1:]",
            )
        elif not is_row_wise(node, args, kwargs):
            self._refuse(node, _why_not_row_wise(node, causal))
            # Guess the kinds of its outputs by their shapes, to find the problems of later nodes.
            rank = len(node.input_tensors[0].shape)
            return [
                Tensor(
                    "window" if len(x.shape) >= rank else "sample",
                    causal,
                    field,
                    tuple(x.shape),
                    **late,
                )
                for x in node.outputs
            ]
        elif relies_on_mark(op):
            difference = difference_from_mark(node)
            if difference is not None:
                self._refuse(node, f"is marked with ct.row_wise, but {difference}")
        self._check_nothing_streams_within(node)
        self._plan[id(node)] = "reshaped" if reshapes(op) else "row by row"
        return [Tensor("window", causal, field, tuple(x.shape), **late) for x in node.outputs]

    def _plan_temporal(self, node: Node, x: Tensor) -> Tensor:
        """Plan a convolution or pooling along time."""
        op = node.operation
        self._plan[id(node)] = "continual"
        self._add_layer(op)
        if isinstance(op.layer, keras.layers.GlobalAveragePooling1D) and any(
            map(_has_mask, node.input_tensors)
        ):
            self._refuse(
                node,
                "is given the mask of a window, as from keras.layers.Masking, and steps keep none "
                f"for it: {DROP_THE_MASK}",
            )
        if not x.causal:
            self._refuse(node, READS_ATTENTION)
        self._needed = math.lcm(self._needed, op.block * x.stride)
        frames = op.frames(Rows(x.lag, x.delay))
        if op.gives_one_row and x.delay > 0:
            self._refuse(node, sees_an_older_window(x.delayed_by, x.delay))
        kind = "window"
        if op.gives_one_row:
            kind = "newest" if op.layer.keepdims else "sample"
        return Tensor(
            kind,
            True,
            x.receptive_field + (op.block + frames.history - 1) * x.stride,
            tuple(node.outputs[0].shape),
            delay=frames.rows.delay,
            delayed_by=op.name if frames.rows.delay > x.delay else x.delayed_by,
            stride=x.stride * op.block,
            lag=frames.rows.lag,
        )

    def _with_kept_windows(self, node: Node, values: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return values in which the windows that a node combines with whole ones are whole too.

        This plans a layer for each of them that keeps its newest rows.
        """
        given = {id(x): (x, values[id(x)]) for x in node.input_tensors if id(x) in values}
        lengths = {known.shape[1] for _, known in given.values() if known.kind == "whole"}
        op = node.operation
        if isinstance(op, CoSiMultiHeadAttention) and _asks_from_elsewhere(
            op, [values[id(x)] for x in node.input_tensors if id(x) in values]
        ):
            lengths |= {op.seq_len}
        if len(lengths) != 1 or None in lengths or isinstance(node.operation, keras.Model):
            return values
        n: Any = lengths.pop()
        windows = [(x, known) for x, known in given.values() if known.kind == "window"]
        if any(not y.causal or y.delay or y.shape[1] not in (None, n) for _, y in windows):
            return values
        if any(y.lag or self.rows(y) > 1 for _, y in windows):
            return values
        kept = {}
        for x, known in windows:
            layer = self._windows.get((id(x), n))
            if layer is None:
                name = f"{x._keras_history.operation.name}_window"
                layer = CoWindow(n, warm_up="partial", name=name, dtype=x.dtype)
                layer.build((None, *known.shape[1:]))
                layer.built = True
                self._windows[id(x), n] = layer
                self._add_layer(layer)
            self._kept[id(node), id(x)] = layer
            kept[id(x)] = dataclasses.replace(
                known,
                kind="whole",
                receptive_field=known.receptive_field + (n - 1) * known.stride,
                shape=(known.shape[0], n, *known.shape[2:]),
            )
        return {**values, **kept} if kept else values

    def _shapes_of_newest(self, node: Node, values: dict[int, Tensor]) -> list[Shape]:
        """Return the shapes of a node's outputs for the newest step only."""
        given = {
            id(x): keras.KerasTensor(values[id(x)].shape, dtype=x.dtype)
            for x in node.input_tensors
            if id(x) in values
        }
        args, kwargs = node.arguments.fill_in(given)
        try:
            with call_mode("regular"):
                outputs = node.operation.compute_output_spec(*args, **kwargs)
        except ValueError as error:
            self._refuse(node, f"cannot run on only the newest step: {error}")
            outputs = node.outputs
        return [tuple(x.shape) for x in keras.tree.flatten(outputs)]

    def _plan_continual(
        self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]
    ) -> bool:
        """Plan a continual layer, and return whether it is causal.

        A causal layer's outputs depend on no later steps than its inputs do.
        """
        layer = node.operation
        self._add_layer(layer)
        if any(x.kind != "window" for x in inputs):
            self._refuse(
                node,
                "is given only the newest step, but needs windows: put it before the newest step "
                "is taken",
            )
        while isinstance(layer, CoResidual):  # It is called as the layer within it is.
            layer = layer.layer
        late = max(inputs, key=lambda x: x.delay)
        finished = (CoChunkedMultiHeadAttention, CoDelay, CoRecurrent)
        gives_windows = any(getattr(x, "gives_windows", False) for x in layer._flatten_layers())
        sees_no_later = isinstance(layer, finished) or kwargs.get("use_causal_mask")
        # One output for the whole window is that of the newest row, which has not come yet.
        sums_up = isinstance(layer, CoRecurrent) and not layer.layer.return_sequences
        if late.delay > 0 and (sums_up or not sees_no_later):
            self._refuse(node, sees_an_older_window(late.delayed_by, late.delay))
        if self.rows(inputs[0]) > 1 and gives_windows:
            self._refuse(
                node,
                "gives all rows of a window at each step, but is given "
                f"{self.rows(inputs[0])} rows in each step, because another layer has strides: put "
                "the layers with strides before it",
            )
        if late.lag > 0 and (
            isinstance(layer, (CircularPositionalEncoding, RotaryEmbedding)) or gives_windows
        ):
            self._refuse(
                node,
                f"is given no row in the first {late.lag} steps of a stream, which it would count "
                'as rows of the window: give the layers before it padding="causal"',
            )
        lengths = {x.shape[1] for x in inputs} - {None}
        if layer.gives_windows and not lengths <= {layer.seq_len}:
            self._refuse(
                node,
                f"gives windows of its seq_len, {layer.seq_len} steps, but those of the model "
                f"have {', '.join(map(str, lengths))}",
            )
        if getattr(layer, "_no_steps", None) is not None:
            self._refuse(
                node,
                f"takes no steps, with {layer._no_steps}: steps only attend along time, axis 1",
            )
        if isinstance(layer, CoChunkedMultiHeadAttention):
            self._check_chunks(node, layer, inputs)
            return True
        if isinstance(layer, (CoDelay, CircularPositionalEncoding, RotaryEmbedding)):
            if layer.delay > 0 and not all(x.causal for x in inputs):
                self._refuse(
                    node,
                    "delays rows that see later steps, so they would be of a window that ended "
                    "before: give the attention before it the query_index of an older step, or "
                    "use_causal_mask=True",
                )
            return True
        if isinstance(layer, CoRecurrent):
            self._check_recurrence(node, layer, inputs)
            return True
        given = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        self._check_attention(node, given, inputs)
        return bool(given.get("use_causal_mask"))

    def _check_chunks(
        self, node: Node, layer: CoChunkedMultiHeadAttention, inputs: list[Tensor]
    ) -> None:
        lag = max(inputs, key=lambda x: x.delay).lag
        if lag % layer.chunk:
            self._refuse(
                node,
                f"has chunks of {layer.chunk} steps, but is given no row in the first {lag} steps "
                "of a stream, so its chunks would begin elsewhere: give the layers before it "
                'padding="causal"',
            )
        if not all(x.causal for x in inputs):
            self._refuse(node, READS_ATTENTION)

    def _check_recurrence(self, node: Node, layer: CoRecurrent, inputs: list[Tensor]) -> None:
        masked = any(map(_has_mask, node.input_tensors))
        masked |= node.arguments.kwargs.get("mask") is not None
        if masked and (layer.window or not layer.heeds_masks):
            self._refuse(
                node,
                "is given the mask of a window, but with a window, or with a cell of your own, it "
                f"cannot skip steps: {DROP_THE_MASK}",
            )
        if not all(x.causal for x in inputs):
            self._refuse(node, READS_ATTENTION)

    def _check_attention(self, node: Node, given: dict[str, Any], inputs: list[Tensor]) -> None:
        """Refuse attention, or an encoder, whose call has no equal in steps.

        Args:
            node: The node.
            given: The arguments of its call, by their names.
            inputs: The `Tensor`s among them.
        """
        unknown = [k for k, x in given.items() if k not in STEP_ARGUMENTS and x is not None]
        unknown = [k for k in unknown if given[k] is not False]
        if unknown:
            self._refuse(
                node,
                f"is called with {', '.join(unknown)}, which only whole windows have: leave it out",
            )
        windows = [x for x in node.input_tensors if len(x.shape) == 3 and x.shape[1] != 1]
        if lengths_differ(windows):
            self._refuse(
                node, "attends between windows of different lengths: give it the same steps of both"
            )
        attended = [x for k, x in given.items() if k in ("value", "key") and x is not None]
        if not all(x.causal for x in attended or inputs):
            self._refuse(
                node,
                "attends to the outputs of another attention, and every new step changes all of "
                "them: ct.convert(model, seq_len, kind='retroactive') computes them all, exactly. "
                "Or give the lower attention use_causal_mask=True and a sliding_window, and train "
                "on longer windows",
            )

    def _plan_attention_to_whole(self, node: Node) -> None:
        """Plan a regular call on the whole window of every step, which uses no stream's state."""
        op = node.operation
        self._plan[id(node)] = "attention to whole"
        if isinstance(op, (CoTemporal, CoRecurrent)):
            self._plan[id(node)] = "on samples"
            return
        if isinstance(op, keras.layers.MultiHeadAttention):
            return
        if isinstance(op, TransformerEncoderBlock):
            # Its call_regular is called, not its call, because that takes no mask.
            if type(op).call is not TransformerEncoderBlock.call:
                self._refuse(
                    node,
                    "has a call of its own. Steps on whole windows would leave it out: give it a "
                    "call_regular of its own instead",
                )
            return
        self._refuse(
            node,
            "is given whole windows at every step, and each step changes all their rows: put "
            "layers that take steps before retroactive attention",
        )

    def _check_nothing_streams_within(self, node: Node) -> None:
        """Refuse a layer that calls continual layers itself: the graph could not lead their steps.

        The graph knows only its own continual layers, and those of the models inside.
        """
        op = node.operation
        if isinstance(op, ContinualLayer) or not isinstance(op, keras.layers.Layer):
            return
        for layer in op._flatten_layers():
            name = layer.name
            if isinstance(layer, ContinualLayer):
                self._refuse(
                    node,
                    f"calls {name} ({type(layer).__name__}) by itself, which takes steps: "
                    "put that layer into the graph of the model",
                )
                return

    def _add_layer(self, layer: keras.layers.Layer) -> None:
        if any(layer is other for other in self.layers):
            self.problems.append(
                Problem(
                    "is called more than once, but has one state: make a layer for each call", layer
                )
            )
        self.layers.append(layer)

    def _refuse(self, node: Node, why: str) -> None:
        self._refused.add(id(node))
        self.problems.append(Problem(why, node.operation))


# The arguments that attention in a model's graph may be called with. All others are for whole
# windows.
STEP_ARGUMENTS = ("x", "query", "value", "key", "use_causal_mask", "training")


def inputs_of_model(node: Node) -> list[keras.KerasTensor]:
    """Return the tensors that a node gives to a model, without Keras' masks of them.

    The tensors carry these masks themselves.
    """
    masks = keras.tree.flatten(node.arguments.kwargs.get("mask"))
    return [x for x in node.input_tensors if not any(x is mask for mask in masks)]


def _has_mask(tensor: keras.KerasTensor) -> bool:
    """Return whether a tensor of the graph carries a mask of Keras."""
    return getattr(tensor, "_keras_mask", None) is not None


def _takes_mask_of_whole(node: Node, values: dict[int, Tensor]) -> bool:
    """Return whether a node uses the mask of a window that retroactive attention gives."""
    op = node.operation
    whole = [x for x in node.input_tensors if id(x) in values and values[id(x)].kind == "whole"]
    if not isinstance(op, keras.layers.Layer) or not any(map(_has_mask, whole)):
        return False
    names = inspect.signature(op.call).parameters
    return isinstance(op, (keras.layers.Maximum, keras.layers.Minimum)) or any(
        name == "mask" or name.endswith("_mask") for name in names
    )


def names_of_inputs(model: keras.Model) -> list[str]:
    """Return what messages call a model's inputs: their names, or their places if unnamed.

    Keras names an unnamed input keras_tensor and a number, which users do not know.
    """
    own = [x.name for x in model.inputs]
    places = ["inputs"] if len(own) == 1 else [f"inputs[{i}]" for i in range(len(own))]
    return [
        place if re.fullmatch(r"keras_tensor(_\d+)?", name) else name
        for name, place in zip(own, places, strict=True)
    ]


def _functional(model: keras.Model) -> keras.Model | None:
    """Return the functional model that a model computes; None if there is none."""
    graph = _graph_of(model)
    return None if graph is None or has_own_call(model) else graph


def _graph_of(model: keras.Model) -> keras.Model | None:
    """Return the functional model that a model is, or contains; None if there is none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def _why_not_row_wise(node: Node, causal: bool) -> str:
    """Return why an operation that may look at several steps of a window cannot run on one."""
    op, table = node.operation, table_of(node)
    if table is not None:
        return table.why
    if isinstance(op, keras.Model) and _graph_of(op) is not None:
        return OWN_CALL
    return looks_at_more(op, causal)


def _kind_of_step(layer: ContinualLayer, output: keras.KerasTensor) -> str:
    """Return the kind of a continual layer's output, if a step gives one row of it."""
    if isinstance(layer, CoRecurrent):
        return "window" if layer.layer.return_sequences else "sample"
    return "newest" if output.shape[1] == 1 else "window"


def _asks_from_elsewhere(op: keras.Operation, inputs: Sequence[Tensor]) -> bool:
    """Return whether attention has queries that are rows of a sample, or the newest row alone."""
    first = inputs[0]
    attends = isinstance(op, keras.layers.MultiHeadAttention)
    rows = first.kind == "newest" or (first.kind == "sample" and len(first.shape) == 3)
    return attends and rows


def _streams_on(layer: ContinualLayer, inputs: Sequence[Tensor]) -> bool:
    """Return whether a continual layer takes steps of such inputs.

    Convolutions, pooling and recurrent layers also run on whole windows, and on single rows.
    Attention also runs among the rows of a sample.
    """
    kinds = {x.kind for x in inputs}
    if _asks_from_elsewhere(layer, inputs) and kinds != {"newest"}:
        return False
    if isinstance(layer, (CoTemporal, CoRecurrent)):
        return "window" in kinds
    return "whole" not in kinds


def _kind_of_one(shape: Shape, whole: Collection[int | None] = ()) -> str:
    """Return the kind of a tensor of one step, by its shape.

    Args:
        shape: The tensor's shape.
        whole: Lengths of whole windows. A tensor whose axis 1 has such a length is "whole".

    Returns:
        "whole", or "newest" or "sample": the newest step with or without a time axis.
    """
    if len(shape) > 2 and shape[1] in whole:
        return "whole"
    return "newest" if len(shape) > 2 and shape[1] == 1 else "sample"
