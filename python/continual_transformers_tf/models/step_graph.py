"""How the graph of a Keras model is run on steps of streams, and whether it can be.

A tensor of the graph is, for each window, one of three things, and in steps always `(M, T, ...)`:

- "window": `(B, T, ...)`, a row for every step of the window;
- "newest": `(B, 1, ...)`, that of the newest step alone;
- "sample": `(B, ...)`, the newest step's, its axis of time gone.

What computes each row of a window from that row alone computes the same of a step. What is given
the newest step alone may be anything: it is run on every step as if that were a sample of a batch.
And attention keeps what it needs of the steps before.
"""

import dataclasses
import inspect
import re

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.continual_layer import ContinualLayer

# Layers that compute each row of a window from that row alone.
ROW_WISE = (
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.AlphaDropout,
    keras.layers.Average,
    keras.layers.BatchNormalization,
    keras.layers.Dense,
    keras.layers.Dropout,
    keras.layers.ELU,
    keras.layers.Embedding,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.LayerNormalization,
    keras.layers.LeakyReLU,
    keras.layers.Masking,
    keras.layers.Maximum,
    keras.layers.Minimum,
    keras.layers.Multiply,
    keras.layers.ReLU,
    keras.layers.Rescaling,
    keras.layers.RMSNormalization,
    keras.layers.Softmax,
    keras.layers.Subtract,
    keras.layers.TimeDistributed,
    keras.layers.UnitNormalization,
)
# keras.ops, by the names of their classes, which are not public.
ROW_WISE_OPS = {
    "Absolute", "Add", "Cast", "Divide", "Elu", "Exp", "Gelu", "LeakyRelu", "Log", "Maximum",
    "Minimum", "Multiply", "Negative", "Power", "Relu", "Relu6", "Selu", "Sigmoid", "Silu", "Sin",
    "Softplus", "Sqrt", "Square", "Subtract", "Tanh", "TrueDivide",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What is known of a tensor of the graph before it is run."""

    kind: str  # "window", "newest" or "sample", as above.
    # Whether a row of a window depends on no later one: only then are rows known as they come.
    causal: bool
    receptive_field: int
    shape: tuple  # For each window. That of the graph may leave open that newest is one step.


class StepGraph:
    """The graph of a functional or sequential model, planned for steps.

    Args:
        model: a built `keras.Model` that is functional or sequential.

    Attributes:
        model: the functional model that the model is, or has within it; None if there is none.
        problems: why it cannot be run on steps: sentences that name the layer; none if it can.
        layers: its continual layers, in the order in which they are run.
        receptive_field: how many steps an output depends on.
    """

    def __init__(self, model, inputs=None):
        self.model = _functional(model)
        self._plan = {}  # Of a node's id: the method that runs it.
        self._inner = {}  # Of the id of a nested model's node: its StepGraph.
        self._known = {}  # Of the id of a tensor of the graph: its Tensor.
        self.problems = []
        self.layers = []
        if self.model is None:
            self.problems.append(
                f"{model.name} is neither a functional nor a built sequential model, and so has no "
                "graph to be read: give it CoSiMultiHeadAttention.from_regular(...) for its layers"
            )
            return
        if inputs is None:
            inputs = [Tensor("window", True, 1, tuple(x.shape)) for x in self.model.inputs]
            self.problems += [
                f"the input {x.name} of shape {x.shape} has no axis of time: expected (B, T, E), "
                "or (B, T) of integers"
                for x in self.model.inputs
                if len(x.shape) < 3 and not (len(x.shape) == 2 and "int" in x.dtype)
            ]
        outputs = self._walk(inputs, self._plan_node, self._known)
        self.outputs = keras.tree.flatten(outputs)
        self.receptive_field = max(x.receptive_field for x in self.outputs)

    def run(self, inputs, **options):
        """Takes T steps.

        Args:
            inputs: tensors `(M, T, ...)`, in the order of the model's inputs.
            **options: training, streams and update_state, for those who take them.

        Returns:
            Tensors `(M, T, ...)`, in the structure of the model's outputs.
        """
        return self._walk(
            inputs, lambda node, values: self._plan[id(node)](node, values, options), {}
        )

    def _walk(self, inputs, visit, values):
        """The outputs, where visit(node, values) says what a node makes of the values so far.

        `values`, at first empty, goes from the ids of the graph's tensors to their values.
        """
        values.update((id(x), y) for x, y in zip(self.model.inputs, inputs, strict=True))
        for depth in sorted(self.model._nodes_by_depth, reverse=True):
            for node in self.model._nodes_by_depth[depth]:
                if not node.is_input:
                    outputs = keras.tree.flatten(visit(node, values))
                    values.update((id(x), y) for x, y in zip(node.outputs, outputs, strict=True))
        outputs = [values[id(x)] for x in self.model.outputs]
        return keras.tree.pack_sequence_as(self.model._outputs_struct, outputs)

    # Planning.

    def _plan_node(self, node, values):
        op = node.operation
        args, kwargs = node.arguments.fill_in(values)
        inputs = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Tensor)]
        causal = all(x.causal for x in inputs)
        field = max(x.receptive_field for x in inputs)
        kinds = {x.kind for x in inputs}
        if isinstance(op, keras.Model):
            # A StreamingModel is, as a part of another, the model that it holds.
            inner = op.model if isinstance(op, ContinualLayer) else op
            if _functional(inner) is not None:
                graph = self._inner[id(node)] = StepGraph(inner, inputs)
                self._plan[id(node)] = self._run_model
                self.problems += graph.problems
                for layer in graph.layers:
                    self._add_layer(layer)
                return graph.outputs
        if isinstance(op, ContinualLayer):
            self._plan[id(node)] = self._run_continual
            causal = self._plan_continual(node, args, kwargs, inputs) and causal
            field += op.receptive_field - 1
            return [
                Tensor("newest" if x.shape[1] == 1 else "window", causal, field, tuple(x.shape))
                for x in node.outputs
            ]
        if "window" not in kinds:
            self._plan[id(node)] = self._run_on_samples
            shapes = self._shapes_of_newest(node, values)
            return [Tensor(_kind_of_one(shape), causal, field, shape) for shape in shapes]
        newest = _newest_row(op, args, kwargs)
        if newest is not None:
            self._plan[id(node)] = self._run_identity
            lead, *features = node.outputs[0].shape
            shape = (lead, 1, *features[1:]) if newest == "newest" else (lead, *features)
            return [Tensor(newest, causal, field, shape)]
        if kinds != {"window"}:
            self._refuse(node, "mixes whole windows with what is of their newest step alone")
        elif not _is_row_wise(node, args, kwargs):
            self._refuse(node, "needs more of a window than the row that it gives a result for")
            # What follows is judged as if it had given what it seems to give.
            rank = len(node.input_tensors[0].shape)
            kinds = ["window" if len(x.shape) >= rank else "sample" for x in node.outputs]
            return [
                Tensor(kind, causal, field, tuple(x.shape))
                for kind, x in zip(kinds, node.outputs, strict=True)
            ]
        self._plan[id(node)] = self._run_row_wise
        return [Tensor("window", causal, field, tuple(x.shape)) for x in node.outputs]

    def _shapes_of_newest(self, node, values):
        """The shapes of what a node makes of the newest step alone."""
        given = {
            id(x): keras.KerasTensor(values[id(x)].shape, dtype=x.dtype)
            for x in node.input_tensors
            if id(x) in values
        }
        args, kwargs = node.arguments.fill_in(given)
        try:
            outputs = node.operation.compute_output_spec(*args, **kwargs)
        except ValueError as error:
            self._refuse(node, f"cannot be run on the newest step alone: {error}")
            outputs = node.outputs
        return [tuple(x.shape) for x in keras.tree.flatten(outputs)]

    def _plan_continual(self, node, args, kwargs, inputs):
        """Whether the outputs depend on no later steps than the inputs do."""
        layer = node.operation
        self._add_layer(layer)
        if layer.delay > 0:
            self._refuse(node, f"has its outputs {layer.delay} steps after its inputs")
        if any(x.kind != "window" for x in inputs):
            self._refuse(node, "is given the newest step alone, where it needs windows")
        while isinstance(layer, CoResidual):  # Which is called as the layer within is.
            layer = layer.layer
        if layer.gives_windows:
            self._refuse(
                node,
                "gives all outputs of the window at every step, and what follows takes a row: "
                'ct.TransformerEncoder(kind="retroactive") has what goes on with windows',
            )
        if getattr(layer, "_no_steps", None) is not None:
            self._refuse(node, f"takes no steps, with {layer._no_steps}")
        if not isinstance(layer, keras.layers.MultiHeadAttention):
            return all(x.kind == "window" for x in inputs)
        given = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        unknown = [k for k, x in given.items() if k not in STEP_ARGUMENTS and x is not None]
        unknown = [k for k in unknown if given[k] is not False]
        if unknown:
            self._refuse(node, f"is called with {', '.join(unknown)}, which is of whole windows")
        windows = [x for x in node.input_tensors if len(x.shape) == 3 and x.shape[1] != 1]
        if _lengths_differ(windows):
            self._refuse(node, "attends between windows of different lengths")
        attended = [x for k, x in given.items() if k in ("value", "key") and x is not None]
        if not all(x.causal for x in attended or inputs):
            self._refuse(
                node,
                "attends to the outputs of an attention that itself sees later steps: those of "
                "older steps change with every step (use_causal_mask=True there would mend it)",
            )
        return bool(given.get("use_causal_mask"))

    def _add_layer(self, layer):
        if any(layer is other for other in self.layers):
            self.problems.append(
                f"{layer.name} is called more than once: each call needs a state of its own"
            )
        self.layers.append(layer)

    def _refuse(self, node, why):
        self.problems.append(f"{node.operation.name} ({type(node.operation).__name__}) {why}")

    # Running.

    def _run_continual(self, node, values, options):
        kept = {name: options[name] for name in ("streams", "update_state")}
        return _call(node, values, options, **kept)

    def _run_model(self, node, values, options):
        inner = [values[id(x)] for x in node.input_tensors]
        return self._inner[id(node)].run(inner, **options)

    def _run_identity(self, node, values, options):
        return values[id(node.input_tensors[0])]

    def _run_row_wise(self, node, values, options):
        return _call(node, values, options)

    def _run_on_samples(self, node, values, options):
        """Steps take the place of samples: (M, T, ...) becomes (M * T, ...), and comes back."""
        inputs = [x for x in node.input_tensors if id(x) in values]
        lead = tf.shape(values[id(inputs[0])])[:2]
        samples = {id(x): _to_samples(self._known[id(x)].kind, values[id(x)]) for x in inputs}
        outputs = keras.tree.flatten(_call(node, samples, options))
        return [
            _to_steps(self._known[id(x)].kind, y, lead)
            for x, y in zip(node.outputs, outputs, strict=True)
        ]


# What attention may be called with in the graph of a model; the rest is of whole windows.
STEP_ARGUMENTS = ("query", "value", "key", "use_causal_mask", "training")


def _functional(model):
    """The functional model that a model is, or has within it; None where there is none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def _kind_of_one(shape):
    """What a tensor that is of the newest step alone still is: with an axis of time, or without."""
    return "newest" if len(shape) > 2 and shape[1] == 1 else "sample"


def _to_samples(kind, x):
    axis_of_time = [1] if kind == "newest" else []
    return tf.reshape(x, tf.concat([[-1], axis_of_time, tf.shape(x)[2:]], 0))


def _to_steps(kind, x, lead):
    first = 2 if kind == "newest" else 1
    return tf.reshape(x, tf.concat([lead, tf.shape(x)[first:]], 0))


def _newest_row(op, args, kwargs):
    """The kind of x[:, -1:] or x[:, -1], a window's newest row; None for anything else."""
    if _name_of_op(op) != "GetItem":
        return None
    key = args[1] if len(args) > 1 else kwargs.get("key")
    if not isinstance(key, (tuple, list)) or len(key) < 2 or key[0] != slice(None):
        return None
    if not all(k is Ellipsis or k == slice(None) for k in key[2:]):
        return None
    return "sample" if key[1] == -1 else "newest" if key[1] == slice(-1, None) else None


def _name_of_op(op):
    """The name of the class of one of keras.ops; None for whatever else may have such a name."""
    return type(op).__name__ if type(op).__module__.startswith("keras.src.ops.") else None


def _is_row_wise(node, args, kwargs):
    op, rank = node.operation, len(node.input_tensors[0].shape)
    if rank == 2:  # Numbers of tokens, (B, T): their last axis is time.
        return type(op) in (keras.layers.Embedding, keras.layers.Identity)
    if any(len(x.shape) != rank for x in node.input_tensors) or _lengths_differ(node.input_tensors):
        return False  # One would be broadcast over the other's time.
    if isinstance(op, keras.layers.EinsumDense):
        return _einsum_is_row_wise(op, rank)
    if isinstance(op, keras.layers.Concatenate) or type(op) in ROW_WISE:
        axis = getattr(op, "axis", ())
        axes = axis if isinstance(axis, (list, tuple)) else [axis]
        return all(axis % rank > 1 for axis in axes)
    # An array that is added to a window, say, may hold a row for each of its steps.
    arrays = [x for x in keras.tree.flatten((args, kwargs)) if not isinstance(x, Tensor)]
    return _name_of_op(op) in ROW_WISE_OPS and all(np.ndim(x) <= rank - 2 for x in arrays)


def _einsum_is_row_wise(layer, rank):
    """Whether an EinsumDense leaves the first two axes alone, and no weight depends on time."""
    given, kernel, output = re.fullmatch(r"(.*),(.*)->(.*)", layer.equation).groups()
    rest = "0123456789"[: rank - len(given.replace("...", ""))]  # The axes that are not named.
    given, output = (x.replace("...", rest) for x in (given, output))
    weights = kernel + (layer.bias_axes or "")
    return given[:2] == output[:2] and given[1] not in weights


def _lengths_differ(tensors):
    """Whether windows are known to be of different lengths."""
    return len({x.shape[1] for x in tensors} - {None}) > 1


def _call(node, values, options, **more):
    args, kwargs = node.arguments.fill_in(values)
    if getattr(node.operation, "_call_has_training_arg", False):
        kwargs = {"training": options["training"], **kwargs}
    return node.operation(*args, **kwargs, **more)
