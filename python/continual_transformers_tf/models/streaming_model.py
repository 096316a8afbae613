"""A Keras model that answers at every step of an endless stream."""

from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.call_modes import call_mode
from continual_transformers_tf.layers.composite_layer import CompositeLayer
from continual_transformers_tf.layers.inputs import expect_given, in_blocks, rows_and_steps
from continual_transformers_tf.layers.warm_up import always_partial, check_warm_up
from continual_transformers_tf.models.problem import CannotStream, Problem
from continual_transformers_tf.models.step_graph import StepGraph, names_of_inputs
from continual_transformers_tf.models.step_run import StepRun, with_mask, with_time
from continual_transformers_tf.ops.step import Step


@registered
class StreamingModel(CompositeLayer, keras.Model):
    """A functional or sequential Keras model that can be called on windows or step by step.

    A step gives the output of a regular call for the newest step of the window. Layers that compute
    each row of a window only from that row take steps as they are. `CoSiMultiHeadAttention` and the
    other continual layers keep the state that they need from earlier steps. After the newest row
    has been taken, as by `x[:, -1]`, any layer may follow. `ct.convert` makes a `StreamingModel`
    from a model with `keras.layers.MultiHeadAttention`.

    If one attention follows another, there are two ways:

    - The earlier one is causal (`use_causal_mask=True`). In a stream it then sees the newest
      `seq_len` steps and not the window's beginning. Steps equal regular calls on sequences of at
      most `seq_len` steps; after that they equal the same model with `sliding_window=seq_len`.
    - The earlier one is retroactive (`CoReMultiHeadAttention`, `CoReTransformerEncoder`). It then
      gives its whole window at every step, and any layers that follow are called on that window as
      in a regular call. (While the window fills, rows of steps that were never taken are zeros, and
      no attention attends to them.)

    A layer with a delay, such as `CoDelay` or attention with a `query_index`, gives at a step the
    row of `delay` steps before. That is row -1 - delay of the window that ends with the step; take
    it by `x[:, -1 - delay]`. Windows that are combined, as in a sum, must have the same delay:
    `CoDelay` and `CoResidual` can make it so. Delays and receptive fields add up.

    Args:
        model: A functional model, or a built sequential one. It is not copied.
        warm_up: "none": in eager mode, steps return None until a stream's receptive field is
            full. "partial": they return the outputs of shorter sequences. It works as in
            `CoSiMultiHeadAttention`, but for the model as a whole: it replaces the layers' own
            `warm_up`.
        call_mode: What calling the model does: "regular", "step" or "steps".
        **kwargs: `name` and other arguments of `keras.Model`.

    Attributes:
        model: The model that was given.

    Raises:
        ValueError: At construction, if the model cannot be run on steps. The message gives the
            reason for every layer in the way.
    """

    def __init__(
        self, model: keras.Model, warm_up: str = "none", call_mode: str = "regular", **kwargs: Any
    ) -> None:
        check_warm_up(warm_up)
        if not isinstance(model, keras.Model):
            raise ValueError(f"Expected a keras.Model, but got {model!r}")
        graph = StepGraph(model)
        problems = graph.problems
        if not problems and not graph.layers:
            problems = [Problem("it has no layer of continual_transformers_tf")]
        if problems:
            raise CannotStream(problems, f"{model.name} cannot be run on the steps of a stream")
        super().__init__(**{"name": f"streaming_{model.name}", **kwargs})
        self.model = model
        self._graph = graph
        self._warm_up = warm_up
        self.call_mode = call_mode
        self.built = True
        self._share_streams()

    @property
    def receptive_field(self) -> int:
        """How many steps an output depends on."""
        return self._graph.receptive_field

    @property
    def delay(self) -> int:
        """How many steps lie between an input and its output."""
        return self._graph.delay

    @property
    def block(self) -> int:
        """How many steps of its inputs the model takes at once: the product of its strides."""
        return self._graph.block

    @property
    def goes_on(self) -> bool:
        """Whether outputs depend on all earlier steps, through a recurrent layer.

        `receptive_field` is then that of the other layers.
        """
        return self._graph.goes_on

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.model),
            "warm_up": self._warm_up,
            "call_mode": self._call_mode,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "StreamingModel":
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects)
        return cls(**{**config, "model": model})

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        streams: Any = None,
        update_state: bool = True,
    ) -> Any:
        return self._call_by_mode(
            inputs, training=training, streams=streams, update_state=update_state
        )

    def call_regular(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the model's outputs for whole windows. This does not use the streams' state."""
        with call_mode("regular"):
            return self.model(inputs, training=training)

    def call_step(
        self,
        inputs: Any,
        training: bool | None = None,
        *,
        streams: Any = None,
        update_state: bool = True,
    ) -> Any:
        """Take one step of M streams.

        Args:
            inputs: The model's inputs without their time axis: `(M, ...)`. If the model has layers
                with strides, its `block` of steps: `(M, block, ...)`.
            training: Whether this is training.
            streams, update_state: As in `CoSiMultiHeadAttention.call_step`.

        Returns:
            The model's outputs for the newest step, `(M, ...)`, or for the step `delay` steps
            before; None while the receptive field fills (see `warm_up`). An output before the last
            of the strides has several rows: `(M, rows, ...)`.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: If shapes, dtypes or streams do not fit. The
                streams then continue as if the call had not been made.
        """
        if self.block > 1:
            steps = self._inputs(inputs, axes_of_steps=2, steps=self.block)
        else:
            steps = [with_time(x) for x in self._inputs(inputs, axes_of_steps=1)]
        outputs = self._take_steps(steps, training, streams, update_state, one_row=True)
        flat = [
            y if y is None or self._graph.rows(known) > 1 else tf.squeeze(y, 1)
            for y, known in zip(keras.tree.flatten(outputs), self._graph.outputs, strict=True)
        ]
        return keras.tree.pack_sequence_as(outputs, flat)

    def call_steps(
        self,
        inputs: Any,
        training: bool | None = None,
        *,
        streams: Any = None,
        update_state: bool = True,
    ) -> Any:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Args:
            inputs: The model's inputs, `(M, T, ...)`. T is a multiple of `block`.
            training, streams, update_state: As in `call_step`.

        Returns:
            `(M, T', ...)` or None, as in `CoSiMultiHeadAttention.call_steps`. With strides, T' is
            that many times smaller.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        inputs = self._inputs(inputs, axes_of_steps=2)
        return self._take_steps(inputs, training, streams, update_state)

    def _inputs(self, inputs: Any, axes_of_steps: int, steps: int | None = None) -> list[tf.Tensor]:
        """Check the inputs, and return them as a list of tensors.

        Args:
            inputs: What the user gave.
            axes_of_steps: 1 for `(M, ...)`, 2 for `(M, T, ...)`.
            steps: T, if it is fixed.
        """
        flat = keras.tree.flatten(self._by_name(inputs))
        if len(flat) != len(self.model.inputs):
            raise ValueError(f"Expected {len(self.model.inputs)} inputs, but got {len(flat)}")
        letters = ("M", "T")[:axes_of_steps]
        tensors = []
        names = names_of_inputs(self.model)
        for x, symbolic, name in zip(flat, self.model.inputs, names, strict=True):
            expect_given(name, x)
            x = tf.convert_to_tensor(x)
            features = symbolic.shape[2:]
            lead = [None, steps][:axes_of_steps]
            if not x.shape.is_compatible_with([*lead, *features]):
                axes = letters if steps is None else ("M", steps)
                expected = ", ".join(str(n) for n in (*axes, *features))
                raise ValueError(f"Expected {name} of shape ({expected}), but got {tuple(x.shape)}")
            if axes_of_steps == 2 and x.shape[1] == 0:
                raise ValueError(f"Expected at least one step, but got {tuple(x.shape)}")
            if axes_of_steps == 2 and x.shape[1] is not None and x.shape[1] % self.block:
                raise ValueError(
                    f"Expected {name} of a multiple of {self.block} steps, because the model has "
                    f"strides, but got {tuple(x.shape)}"
                )
            if x.dtype.is_floating and "int" in symbolic.dtype:
                raise ValueError(f"Expected {name} of integers, but got {x.dtype.name}")
            mask, x = getattr(x, "_keras_mask", None), tf.cast(x, symbolic.dtype)
            if axes_of_steps == 2:
                x = in_blocks(x, self.block)
            tensors.append(with_mask(x, mask))
        return _of_same_steps(tensors, letters)

    def _by_name(self, inputs: Any) -> Any:
        """Return the inputs in the structure of the model's inputs, if either of them is a dict."""
        # A sequential model has names for its inputs only if it was called as a part of another.
        own = self._graph.model.input
        names = list(own) if isinstance(own, dict) else [x.name for x in self.model.inputs]
        expected = f"Expected inputs by the names of {' and '.join(map(repr, names))}"
        if not isinstance(own, dict) and names_of_inputs(self.model) != names:
            expected = "Expected a tensor" if len(names) == 1 else f"Expected {len(names)} tensors"
        if not isinstance(inputs, dict):
            if isinstance(own, dict) and len(keras.tree.flatten(inputs)) == len(names) > 1:
                raise ValueError(f"{expected}, but got a {type(inputs).__name__}")
            return inputs
        if set(inputs) != set(names):
            raise ValueError(f"{expected}, but got {sorted(inputs)}")
        if isinstance(own, dict):
            return type(own)((name, inputs[name]) for name in names)
        return [inputs[name] for name in names]

    def _take_steps(
        self,
        inputs: list[tf.Tensor],
        training: bool | None,
        streams: Any,
        update_state: bool,
        one_row: bool = False,
    ) -> Any:
        rows, steps = rows_and_steps(inputs[0])

        def compute(step: Step) -> Any:
            step.one_row = one_row
            with call_mode("steps"), always_partial():
                outputs = StepRun(self._graph, step, training).outputs(inputs)
            return self._ready_outputs(step, outputs)

        return self._streams.take_steps(
            self, compute, streams, rows, steps // self.block, update_state
        )

    def export(self, filepath: str, format: str = "tf_saved_model", **options: Any) -> None:
        """Export the call of the model, as `keras.Model.export` does. `ct.export` exports steps.

        Args:
            filepath, format, options: As in `keras.Model.export`. The default `input_signature` is
                that of the model's windows.
        """
        if options.get("input_signature") is None:
            # Keras would take it from the build, which this model does not need.
            options["input_signature"] = [
                keras.tree.map_structure(
                    lambda x: keras.InputSpec(
                        dtype=x.dtype, shape=(None, *x.shape[1:]), name=x.name
                    ),
                    self._graph.model.input,
                )
            ]
        super().export(filepath, format=format, **options)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.model.compute_output_shape(input_shape)

    @property
    def parts(self) -> list[keras.layers.Layer]:
        return self._graph.layers


def _of_same_steps(tensors: list[tf.Tensor], letters: tuple[str, ...]) -> list[tf.Tensor]:
    """Check that the tensors agree in their first axes, before any layer's state changes.

    Returns:
        The tensors. In a graph they depend on the check.

    Raises:
        ValueError: If they do not agree; in a graph tf.errors.InvalidArgumentError, when it runs.
    """
    first, axes = tensors[0], len(letters)
    expected = f"Expected inputs of the same {' and '.join(letters)}"
    for x in tensors[1:]:
        if not x.shape[:axes].is_compatible_with(first.shape[:axes]):
            raise ValueError(f"{expected}, but got {tuple(first.shape)} and {tuple(x.shape)}")
    if len(tensors) == 1 or all(x.shape[:axes].is_fully_defined() for x in tensors):
        return tensors
    sizes = tf.shape(first)[:axes]
    fits = [tf.debugging.assert_equal(tf.shape(x)[:axes], sizes, expected) for x in tensors[1:]]
    with tf.control_dependencies(fits):
        return [with_mask(tf.identity(x), getattr(x, "_keras_mask", None)) for x in tensors]
