"""A residual connection around a continual layer."""

from collections.abc import Sequence
from typing import Any, Self

import keras
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.call_modes import call_mode
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.composite_layer import CompositeLayer
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike, expect_given, rows_and_steps
from continual_transformers_tf.layers.plain_layers import cast
from continual_transformers_tf.ops.step import Step


@registered
class CoResidual(CompositeLayer):
    """`layer(x) + x`, in which each output is added to the step that it belongs to.

    The residual is delayed by the layer's delay. If the layer returns only one row of a window, as
    `CoSiMultiHeadAttention` does, the input's row of the same step is added.

    Args:
        layer: A continual layer that returns as many features as it is given. It is not copied.
        call_mode: What calling this layer does: "regular", "step" or "steps". The inner layer's own
            call mode has no effect.
        **kwargs: `name` and other arguments of `keras.layers.Layer`. The default `dtype` is the
            inner layer's.

    Attributes:
        layer: The layer that was given.

    Call arguments:
        x: The layer's input. Other arguments of the layer's methods can be given by name.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if `layer` is not a continual layer, or one whose step returns
            all outputs of the window. When it is built, if the layer returns other features than it
            is given.
    """

    def __init__(self, layer: ContinualLayer, call_mode: str = "regular", **kwargs: Any) -> None:
        if not isinstance(layer, ContinualLayer):
            raise ValueError(
                f"Expected a continual layer of continual_transformers_tf, but got {layer!r}"
            )
        if layer.gives_windows:
            raise ValueError(
                f"Expected a layer whose step returns one row, but {layer.name} "
                f"({type(layer).__name__}) returns the whole window, to which the window's inputs "
                "would have to be added. CoReTransformerEncoder does that"
            )
        super().__init__(**{"dtype": layer.dtype_policy, **kwargs})
        self.layer = layer
        self.supports_masking = True
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._skip = None
        if layer.delay > 0:
            self._skip = CoDelay(
                layer.delay,
                self.compute_dtype,
                self._time_axis,
                warm_up="partial",
                name="skip",
            )
            self._share_streams()

    @property
    def parts(self) -> Sequence[ContinualLayer]:
        return [self.layer] if self._skip is None else [self.layer, self._skip]

    @property
    def _part_names(self) -> list[str]:
        return ["layer", "skip"][: len(self.parts)]

    @property
    def _inner_layers(self) -> Sequence[ContinualLayer]:
        return [self.layer]

    @property
    def receptive_field(self) -> int:
        return self.layer.receptive_field

    @property
    def delay(self) -> int:
        return self.layer.delay

    @property
    def warm_up(self) -> str:
        return self.layer.warm_up

    @property
    def input_features(self) -> dict[str, Any]:
        return dict(list(self.layer.input_features.items())[:1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Build the layer.

        Args:
            input_shape: The input's shape in the active call mode.
        """
        shape, mode = tuple(input_shape), self.active_call_mode
        with call_mode(mode):
            returned = tuple(self.layer.compute_output_shape(shape))
        # The layer may return only one row of time.
        time = 0 if mode == "step" else self._time_axis % len(shape)
        if len(returned) != len(shape) or any(
            size != returned[axis] for axis, size in enumerate(shape) if axis not in (0, time)
        ):
            raise ValueError(
                "Expected a layer that returns the features that it is given, those of "
                f"{shape}, but {self.layer.name} returns {returned}"
            )
        self._build_config = {"input_shape": shape, "mode": mode}
        with call_mode(mode):
            for part in self.parts:
                if not part.built:
                    part.build(shape)

    def get_build_config(self) -> dict[str, Any]:
        return dict(self._build_config)

    def build_from_config(self, config: dict[str, Any]) -> None:
        with call_mode(config["mode"]):
            self.build(tuple(config["input_shape"]))

    def call(
        self,
        x: TensorLike,
        training: bool | None = None,
        streams: TensorLike | None = None,
        update_state: bool = True,
        **arguments: Any,
    ) -> Any:
        mode = self.active_call_mode

        def call_layer(*args: Any, **kwargs: Any) -> Any:
            # Through Keras' __call__, which passes its masks on.
            with call_mode(mode):
                return self.layer(*args, **kwargs)

        if mode == "regular":
            return self._add_windows(call_layer, x, training, arguments)
        return self._add_steps(mode, call_layer, x, training, streams, update_state, arguments)

    def call_regular(
        self, x: TensorLike, training: bool | None = None, **arguments: Any
    ) -> tf.Tensor:
        """Return the layer's outputs for windows plus the steps that they belong to.

        This does not use the streams' state.

        Args:
            x: `(B, T, E)`, windows, oldest step first.
            training, **arguments: The layer's arguments.

        Returns:
            `(B, T, E)`. If the layer returns only one row, `(B, 1, E)`.
        """
        return self._add_windows(self.layer.call_regular, x, training, arguments)

    def call_step(
        self,
        x: TensorLike,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
        **arguments: Any,
    ) -> tf.Tensor | None:
        """Take one step of M streams.

        Args:
            x: `(M, E)`.
            training, **arguments: The layer's arguments.
            streams, update_state: As in `CoSiMultiHeadAttention.call_step`.

        Returns:
            `(M, E)`, or None if the layer returns None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: If shapes, dtypes or streams do not fit. The
                streams then continue as if the call had not been made.
        """
        call = self.layer.call_step
        return self._add_steps("step", call, x, training, streams, update_state, arguments)

    def call_steps(
        self,
        x: TensorLike,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
        **arguments: Any,
    ) -> tf.Tensor | None:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Args:
            x: `(M, T, E)`.
            training, streams, update_state, **arguments: As in `call_step`.

        Returns:
            `(M, T', E)` or None, as the layer's `call_steps`.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        call = self.layer.call_steps
        return self._add_steps("steps", call, x, training, streams, update_state, arguments)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        with call_mode(self.active_call_mode):
            return self.layer.compute_output_shape(tuple(input_shape))

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        layer, mode = self.layer, self.active_call_mode
        if mode != "regular" and self.delay > 0:
            return None  # The mask of a delayed row came with an earlier call, and was not kept.
        if hasattr(layer, "seq_len") and not layer.supports_masking:
            return None  # An encoder: it may return one row only, and heeds no mask.
        with call_mode(mode):
            return layer.compute_mask(inputs, previous_mask)

    @property
    def _time_axis(self) -> int:
        return getattr(self.layer, "temporal_dim", 1)

    def _input(self, mode: str, x: TensorLike) -> tf.Tensor:
        """Return the input as a tensor with its mask of Keras, and build the layer."""
        if mode != "regular":
            self._check_policy()
        expect_given("x", x)
        x = tf.convert_to_tensor(x)
        mask = getattr(x, "_keras_mask", None)
        if x.dtype.is_floating and x.dtype != self.compute_dtype:
            x = tf.cast(x, self.compute_dtype)
            if mask is not None:
                x._keras_mask = mask
        with call_mode(mode):
            self._ensure_built(x)
        return x

    def _options(self, training: bool | None, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("return_attention_scores"):
            raise ValueError(
                "Expected outputs only, to add the input to, but got return_attention_scores=True"
            )
        if self.layer._call_has_training_arg:
            return {"training": training, **arguments}
        return arguments

    def _add_windows(
        self, call: Any, x: TensorLike, training: bool | None, arguments: dict[str, Any]
    ) -> tf.Tensor:
        options = self._options(training, arguments)
        x = self._input("regular", x)
        y = call(x, **options)
        with call_mode("regular"):
            returned = self.layer.compute_output_shape(tuple(x.shape))
        axis = self._time_axis % len(returned)
        if returned[axis] == 1:
            index = getattr(self.layer, "_query_index", -1 - self.delay)
            x = tf.gather(x, [index % tf.shape(x)[axis]], axis=axis)
        return cast(y, self.compute_dtype) + x

    def _add_steps(
        self,
        mode: str,
        call: Any,
        x: TensorLike,
        training: bool | None,
        streams: TensorLike | None,
        update_state: bool,
        arguments: dict[str, Any],
    ) -> tf.Tensor | None:
        options = self._options(training, arguments)
        x = self._input(mode, x)
        axis = self._time_axis % x.shape.rank

        def compute(step: Step | None) -> tf.Tensor | None:
            y = call(x, streams=streams, update_state=update_state, **options)
            past = x
            if self._skip is not None:
                skip = self._skip.call_step if mode == "step" else self._skip.call_steps
                past = skip(x, update_state=update_state)
            if y is None:
                return None
            y = cast(y, self.compute_dtype)
            if mode == "steps" and y.shape[axis] != x.shape[axis] and tf.executing_eagerly():
                newest = tf.range(x.shape[axis] - y.shape[axis], x.shape[axis])
                past = tf.gather(past, newest, axis=axis)
            return y + past

        if self._skip is None:  # The layer takes the step by itself.
            return compute(None)
        rows, steps = rows_and_steps(x, mode, axis)
        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)
