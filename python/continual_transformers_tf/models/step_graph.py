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
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf.layers.call_modes import call_mode
from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.learned_queries import LearnedQueries
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.models.own_calls import (
    OWN_CALL,
    computes_as,
    computes_as_ours,
    has_own_call,
)
from continual_transformers_tf.models.positions import table_of
from continual_transformers_tf.models.problem import Problem
from continual_transformers_tf.models.row_wise import (
    Tensor,
    is_row_wise,
    lengths_differ,
    reshapes,
    row_taken,
)
from continual_transformers_tf.models.row_wise_mark import difference_from_mark, relies_on_mark
from continual_transformers_tf.ops.step import Rows, Step

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
        late = _unequal_delays(self.outputs)
        if late and inputs_are_own:
            self.problems.append(Problem(f"its outputs are {late}"))

    def _begin(self, problems: list[Problem]) -> None:
        """Forget a plan, and begin another."""
        self._plan: dict[int, str] = {}  # Id of a node -> how it is run, one of the names in _RUNS.
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

    def run(self, inputs: Sequence[tf.Tensor], step: Step, training: bool | None) -> Any:
        """Compute the outputs of T steps.

        Args:
            inputs: Tensors `(M, T, ...)`, in the order of the model's inputs. T is a multiple of
                `block`.
            step: The `Step` that the model's streams are taking.
            training: Whether this is training.

        Returns:
            Tensors `(M, T / stride, ...)`, in the structure of the model's outputs.
        """
        for layer in self.layers:  # Before anything is computed.
            layer._check_policy()
        return self.walk(
            inputs,
            lambda node, values: _RUNS[self._plan[id(node)]](self, node, values, step, training),
        )

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
        unequal = _unequal_delays(inputs)
        if unequal:
            self._refuse(node, f"is given {unequal}")
        if "whole" in kinds and _takes_mask_of_whole(node, values):
            self._refuse(
                node,
                "is given the mask of a window, as from keras.layers.Masking, after retroactive "
                "attention, which keeps no such mask in steps: pass the window through an "
                "operation that drops masks, such as keras.ops.multiply(x, 1)",
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
        uneven = _uneven_rows(inputs)
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
            table = table_of(node)
            self._refuse(node, _looks_at_more(op, causal) if table is None else table.why)
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
                "for it: pass the window through an operation that drops masks, such as "
                "keras.ops.multiply(x, 1)",
            )
        if not x.causal:
            self._refuse(
                node,
                _READS_ATTENTION,
            )
        self._needed = math.lcm(self._needed, op.block * x.stride)
        frames = op.frames(Rows(x.lag, x.delay))
        if op.gives_one_row and x.delay > 0:
            self._refuse(node, _sees_an_older_window(x.delayed_by, x.delay))
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
        sees_no_later = isinstance(layer, finished) or kwargs.get("use_causal_mask")
        # One output for the whole window is that of the newest row, which has not come yet.
        sums_up = isinstance(layer, CoRecurrent) and not layer.layer.return_sequences
        if late.delay > 0 and (sums_up or not sees_no_later):
            self._refuse(node, _sees_an_older_window(late.delayed_by, late.delay))
        if self.rows(inputs[0]) > 1 and not isinstance(layer, finished):
            self._refuse(
                node,
                f"is given {self.rows(inputs[0])} rows in each step, because a layer after it has "
                "strides: put the layers with strides before it",
            )
        if late.lag > 0 and (
            isinstance(layer, (CircularPositionalEncoding, RotaryEmbedding))
            or any(getattr(part, "gives_windows", False) for part in layer._flatten_layers())
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
            if late.lag % layer.chunk:
                self._refuse(
                    node,
                    f"has chunks of {layer.chunk} steps, but is given no row in the first "
                    f"{late.lag} steps of a stream, so its chunks would begin elsewhere: give the "
                    'layers before it padding="causal"',
                )
            if not all(x.causal for x in inputs):
                self._refuse(node, _READS_ATTENTION)
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
            masked = any(map(_has_mask, node.input_tensors))
            if masked and (layer.window or not layer.heeds_masks):
                self._refuse(
                    node,
                    "is given the mask of a window, but with a window, or with a cell of your own, "
                    "it cannot skip steps: pass the window through an operation that drops masks, "
                    "such as keras.ops.multiply(x, 1)",
                )
            if not all(x.causal for x in inputs):
                self._refuse(
                    node,
                    _READS_ATTENTION,
                )
            return True
        given = inspect.signature(layer.call).bind(*args, **kwargs).arguments
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
        return bool(given.get("use_causal_mask"))

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

    # Running.

    def _run_continual(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> Any:
        options: dict[str, Any] = {"update_state": step.update_state}
        given = [self._known[id(x)] for x in node.input_tensors if id(x) in values]
        before = step.rows_of_input
        step.rows_of_input = Rows(max(x.lag for x in given), max(x.delay for x in given))
        try:
            outputs = self._continual_outputs(node, values, step, training, options)
        finally:
            step.rows_of_input = before
        if self._known[id(node.outputs[0])].kind in ("newest", "sample"):
            return keras.tree.map_structure(lambda y: self._newest_rows(y, given[0]), outputs)
        return outputs

    def _newest_rows(self, x: tf.Tensor, known: Tensor) -> tf.Tensor:
        """Return the last of the rows that a tensor has in each step."""
        rows = self.rows(known)
        return x if rows == 1 else x[:, rows - 1 :: rows]

    def _continual_outputs(
        self,
        node: Node,
        values: dict[int, tf.Tensor],
        step: Step,
        training: bool | None,
        options: dict[str, Any],
    ) -> Any:
        if not (step.one_row and _steps_in_one_op(node.operation)):
            return _call(node, values, training, **options)
        rows = {id(x): _without_time(values[id(x)]) for x in node.input_tensors if id(x) in values}
        with call_mode("step"):
            outputs = _call(node, rows, training, **options)
        return keras.tree.map_structure(with_time, outputs)

    def _run_model(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> Any:
        inner = [values[id(x)] for x in inputs_of_model(node)]
        return self._inner[id(node)].run(inner, step, training)

    def _run_identity(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> tf.Tensor:
        x = node.input_tensors[0]
        return self._newest_rows(values[id(x)], self._known[id(x)])

    def _run_row_wise(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> Any:
        return _call(node, values, training)

    def _run_reshaped(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> tf.Tensor:
        x = values[id(node.input_tensors[0])]
        return tf.reshape(x, tf.concat([tf.shape(x)[:2], node.outputs[0].shape[2:]], 0))

    def _run_attention_to_whole(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> list[tf.Tensor]:
        """Run as `_run_on_samples`, but let no row attend to a step that was never taken."""
        inputs = [x for x in node.input_tensors if id(x) in values]
        kept = [layer for x in inputs if (layer := self.kept_window(node, x)) is not None]
        whole = [x for x in inputs if self._known[id(x)].kind == "whole"]
        n = kept[0].seq_len if kept else values[id(whole[0])].shape[2]
        steps = tf.shape(values[id(inputs[0])], tf.int64)[1]
        number = step.position[:, tf.newaxis] + tf.range(steps)
        row = tf.range(n, dtype=tf.int64) - n + 1  # 0 is the newest step's row.
        there = tf.reshape(number[..., tf.newaxis] + row >= 0, [-1, n])
        if isinstance(node.operation, TransformerEncoderBlock):
            regular = node.operation.call_regular
            return self._run_on_samples(node, values, step, training, call=regular, key_mask=there)
        return self._run_on_samples(node, values, step, training, value_mask=there)

    def _run_on_samples(
        self,
        node: Node,
        values: dict[int, tf.Tensor],
        step: Step,
        training: bool | None,
        **more: Any,
    ) -> list[tf.Tensor]:
        """Run a node with steps as samples: (M, T, ...) becomes (M * T, ...), and back."""
        inputs = [x for x in node.input_tensors if id(x) in values]
        lead = tf.shape(values[id(inputs[0])])[:2]
        samples = {}
        for x in inputs:
            layer, kind, y = self.kept_window(node, x), self._known[id(x)].kind, values[id(x)]
            if layer is not None:
                if id(layer) not in values:  # Another node may have called it already.
                    values[id(layer)] = layer.call_steps(y, update_state=step.update_state)
                kind, y = "whole", values[id(layer)]
            samples[id(x)] = _to_samples(kind, y)
        with call_mode("regular"):
            outputs = keras.tree.flatten(_call(node, samples, training, **more))
        return [
            _to_steps(self._known[id(x)].kind, y, lead)
            for x, y in zip(node.outputs, outputs, strict=True)
        ]

    def _run_queries(
        self, node: Node, values: dict[int, tf.Tensor], step: Step, training: bool | None
    ) -> tf.Tensor:
        """Return the same queries for every step: `(M, T, Q, E)`."""
        given = node.input_tensors[0]
        lead = tf.shape(values[id(given)])[:2] // [1, self.rows(given)]
        queries = _call(node, {id(x): values[id(x)] for x in node.input_tensors}, training)
        return tf.broadcast_to(queries[:, tf.newaxis], tf.concat([lead, tf.shape(queries)[1:]], 0))


_RUNS = {
    "queries": StepGraph._run_queries,
    "continual": StepGraph._run_continual,
    "model": StepGraph._run_model,
    "row taken": StepGraph._run_identity,
    "row by row": StepGraph._run_row_wise,
    "reshaped": StepGraph._run_reshaped,
    "on samples": StepGraph._run_on_samples,
    "attention to whole": StepGraph._run_attention_to_whole,
}

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


_WINDOW = "put a ct.CoWindow before it, which gives it the whole window at every step"
# Rows that see later steps cannot be kept in a window.
_RETROACTIVE = (
    "ct.convert(model, seq_len, kind='retroactive') gives it the whole window at every step, as a "
    "ct.CoReTransformerEncoder before it does"
)
_FEATURES = "keep the first two axes, samples and time, and work along the others"
_FUNCTION = "write its function with keras.ops along features, or mark it with @ct.row_wise"
# What to do about operations that look at several steps, by the names of their classes.
_CURES = {
    **dict.fromkeys(("Activation", "Dense", "EinsumDense", "Lambda"), _FUNCTION),
    **dict.fromkeys(
        ("ExpandDims", "Moveaxis", "Permute", "Reshape", "Squeeze", "Swapaxes", "Transpose"),
        _FEATURES,
    ),
    "GetItem": "take the newest step, as by x[:, -1]",
    "GroupNormalization": "put it into a keras.layers.TimeDistributed, which normalizes each row",
    "PReLU": "give it shared_axes=[1], so that its slopes are the same for all steps",
}


_READS_ATTENTION = (
    "reads the outputs of attention. Every new step changes all of them, so none can be kept. "
    "ct.convert(model, seq_len, kind='retroactive') runs it on the whole window at every step, as "
    "does a ct.CoReTransformerEncoder in place of that attention. With use_causal_mask=True the "
    "attention streams as it is"
)


def _sees_an_older_window(delayed_by: str, delay: int) -> str:
    """Return why a layer that sees a whole window cannot be given delayed rows."""
    return (
        f"is given rows that {delayed_by} delays by {delay} steps, so it would see a window that "
        f"ended before: put {delayed_by} after it, or, if that is a convolution, give it "
        'padding="causal"'
    )


def _looks_at_more(operation: keras.Operation, causal: bool) -> str:
    """Return why an operation on windows cannot run on a step, and what to do.

    Args:
        operation: The operation.
        causal: Whether no row that it is given depends on a later one.
    """
    if isinstance(operation, keras.Model) and _graph_of(operation) is not None:
        return OWN_CALL
    why = "may look at several steps of the window, but a step has only the newest one: "
    whole = _WINDOW if causal else _RETROACTIVE
    if type(operation).__module__.startswith("keras."):
        return why + _CURES.get(type(operation).__name__, whole)
    attention = [
        layer
        for layer in getattr(operation, "_flatten_layers", list)()
        if isinstance(layer, keras.layers.MultiHeadAttention)
    ]
    if attention:
        return (
            f"calls {attention[0].name} ({type(attention[0]).__name__}) by itself, and a layer of "
            "your own is not read: put the layers inside it into the graph of the model"
        )
    return (
        f"{why}if it computes each row of a window only from that row, mark its class with "
        f"@ct.row_wise. Otherwise {whole}"
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


def _unequal_delays(tensors: Iterable[Tensor]) -> str | None:
    """Return what is wrong if windows have different delays, and the cure; otherwise None."""
    windows = [(x.delay * x.stride, x) for x in tensors if x.kind == "window"]
    windows.sort(key=lambda pair: pair[0])
    if not windows or windows[0][0] == windows[-1][0]:
        return None
    (early, other), (late, latest) = windows[0], windows[-1]
    return (
        f"windows with different delays: {latest.delayed_by} delays one by {late} steps, the delay "
        f"of another is {early}. Pass the other through "
        f"ct.CoDelay({(late - early) // other.stride}). If this is the sum of the input and the "
        f"output of {latest.delayed_by}, put ct.CoResidual around that layer"
    )


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


def _uneven_rows(tensors: Iterable[Tensor]) -> str | None:
    """Return what is wrong if windows have other numbers of rows; otherwise None."""
    windows = [x for x in tensors if x.kind == "window"]
    strides = sorted({x.stride for x in windows})
    if len(strides) > 1:
        return (
            f"combines windows with a row for every {strides[0]} and every {strides[-1]} steps: "
            "give their layers the same strides"
        )
    if len({x.lag - x.delay for x in windows}) > 1:
        return (
            "combines windows of different lengths, because a layer before one of them leaves out "
            'rows at the beginning: give that layer padding="causal"'
        )
    return None


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


def _to_samples(kind: str, x: tf.Tensor) -> tf.Tensor:
    axis_of_time = [1] if kind == "newest" else []
    return tf.reshape(x, tf.concat([[-1], axis_of_time, tf.shape(x)[2:]], 0))


def _to_steps(kind: str, x: tf.Tensor, lead: tf.Tensor) -> tf.Tensor:
    first = 2 if kind == "newest" else 1
    return tf.reshape(x, tf.concat([lead, tf.shape(x)[first:]], 0))


def _call(
    node: Node,
    values: dict[int, tf.Tensor],
    training: bool | None,
    call: Callable[..., Any] | None = None,
    **more: Any,
) -> Any:
    args, kwargs = node.arguments.fill_in(values)
    if getattr(node.operation, "_call_has_training_arg", False):
        kwargs = {"training": training, **kwargs}
    return (call or node.operation)(*args, **kwargs, **more)
