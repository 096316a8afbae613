"""A residual connection around a continual layer."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.composite_layer import CompositeLayer
from continual_transformers_tf.layers.continual_layer import ContinualLayer, call_mode
from continual_transformers_tf.layers.inputs import expect_given
from continual_transformers_tf.layers.step_ops import cast


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoResidual(CompositeLayer, keras.layers.Layer):
    """`layer(x) + x`, where each output meets the step that it belongs to.

    What goes past the layer is delayed by the layer's delay, and of windows of which the layer
    gives one row alone, as `CoSiMultiHeadAttention` does, that row is added.

    Args:
        layer: a continual layer that gives as many features as it is given. It is not copied.
        call_mode: what calling this layer does: "regular", "step" or "steps". That of the layer
            within plays no part.
        **kwargs: `name` and the like; `dtype` is the layer's own where it is left out.

    Attributes:
        layer: the layer that was given.

    Call arguments:
        x: what the layer takes; and whatever else its own methods take by name.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if `layer` is no continual layer, or one that gives all outputs
            of the window at a step; when it is built, if the layer gives other features than it is
            given.
    """

    def __init__(self, layer, call_mode="regular", **kwargs):
        if not isinstance(layer, ContinualLayer) or not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                f"Expected a continual layer of continual_transformers_tf, but got {layer!r}"
            )
        if layer.gives_windows:
            raise ValueError(
                f"Expected a layer that gives a row at a step, but {layer.name} "
                f"({type(layer).__name__}) gives all of the window, whose inputs there are to be "
                "added to: CoReTransformerEncoder does that"
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
    def parts(self):
        return [self.layer] if self._skip is None else [self.layer, self._skip]

    @property
    def receptive_field(self):
        return self.layer.receptive_field

    @property
    def delay(self):
        return self.layer.delay

    @property
    def warm_up(self):
        """What a step gives while the layer's window fills: the layer's own."""
        return getattr(self.layer, "warm_up", "partial")

    @property
    def ready(self):
        """bool tensor `[S]`: of which streams held the layer has a full window."""
        return self.position >= self.receptive_field

    @property
    def input_features(self):
        return dict(list(self.layer.input_features.items())[:1])

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})

    def build(self, input_shape):
        """Builds the layer.

        Args:
            input_shape: in the call mode in force.
        """
        shape, mode = tuple(input_shape), self.active_call_mode
        with call_mode(mode):
            given = tuple(self.layer.compute_output_shape(shape))
        # Of time the layer may give one row alone.
        time = 0 if mode == "step" else self._time_axis % len(shape)
        if len(given) != len(shape) or any(
            size != given[axis] for axis, size in enumerate(shape) if axis not in (0, time)
        ):
            raise ValueError(
                "Expected a layer that gives the features that it is given, those of "
                f"{shape}, but {self.layer.name} gives {given}"
            )
        self._build_config = {"input_shape": shape, "mode": mode}
        with call_mode(mode):
            for part in (self.layer, self._skip):
                if part is not None and not part.built:
                    part.build(shape)

    def get_build_config(self):
        return dict(self._build_config)

    def build_from_config(self, config):
        with call_mode(config["mode"]):
            self.build(tuple(config["input_shape"]))

    def call(self, x, training=None, streams=None, update_state=True, **arguments):
        mode = self.active_call_mode

        def call_layer(*args, **kwargs):  # With all that Keras does: masks.
            with call_mode(mode):
                return self.layer(*args, **kwargs)

        if mode == "regular":
            return self._add_windows(call_layer, x, training, arguments)
        return self._add_steps(mode, call_layer, x, training, streams, update_state, arguments)

    def call_regular(self, x, training=None, **arguments):
        """The layer's outputs for windows, and what they belong to; no stream plays a part.

        Args:
            x: `(B, T, E)`, windows, oldest step first.
            training, **arguments: for the layer.

        Returns:
            `(B, T, E)`; where the layer gives one row alone, `(B, 1, E)`.
        """
        return self._add_windows(self.layer.call_regular, x, training, arguments)

    def call_step(self, x, training=None, *, streams=None, update_state=True, **arguments):
        """Takes one step of M streams.

        Args:
            x: `(M, E)`.
            training, **arguments: for the layer.
            streams, update_state: as `CoSiMultiHeadAttention.call_step` has them.

        Returns:
            `(M, E)`, or None where the layer gives None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit. The
                streams then go on as if the call had not been made.
        """
        call = self.layer.call_step
        return self._add_steps("step", call, x, training, streams, update_state, arguments)

    def call_steps(self, x, training=None, *, streams=None, update_state=True, **arguments):
        """Takes T steps of M streams: the same outputs and state as T calls of `call_step`.

        Args:
            x: `(M, T, E)`.
            training, streams, update_state, **arguments: as `call_step` has them.

        Returns:
            `(M, T', E)` or None, as the layer's `call_steps`.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        call = self.layer.call_steps
        return self._add_steps("steps", call, x, training, streams, update_state, arguments)

    def compute_output_shape(self, input_shape):
        with call_mode(self.active_call_mode):
            return self.layer.compute_output_shape(tuple(input_shape))

    def compute_mask(self, inputs, previous_mask):
        layer, mode = self.layer, self.active_call_mode
        if mode != "regular" and self.delay > 0:
            return None  # The mask of a delayed row came with an earlier call, and was not kept.
        if hasattr(layer, "seq_len") and not layer.supports_masking:
            return None  # An encoder: it may give one row alone, and heeds no mask.
        with call_mode(mode):
            return layer.compute_mask(inputs, previous_mask)

    # The state of the streams: the layer's, and of what goes past it.

    def get_state(self, streams=None):
        """Return the state of streams: "layer", and of a delayed layer "skip", that of a `CoDelay`.

        Args:
            streams: Integers `[M]`: which ones, in this order; None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        with self._streams.turn():
            states = [part.get_state(streams) for part in self.parts]
        return dict(zip(("layer", "skip"), states, strict=False))

    def _states(self, state):
        expected = ["layer", "skip"][: len(self.parts)]
        if not isinstance(state, dict) or sorted(state) != expected:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {expected}, but got {got}")
        return [
            pair
            for name, part in zip(expected, self.parts, strict=True)
            for pair in part._states(state[name])
        ]

    # Calling.

    @property
    def _time_axis(self):
        return getattr(self.layer, "temporal_dim", 1)

    def _check_policy(self):
        super()._check_policy()
        self.layer._check_policy()

    def _input(self, mode, x):
        if mode != "regular":
            self._check_policy()
        expect_given("x", x)
        x = tf.convert_to_tensor(x)
        mask = getattr(x, "_keras_mask", None)
        if x.dtype.is_floating and x.dtype != self.compute_dtype:
            x = tf.cast(x, self.compute_dtype)
            if mask is not None:
                x._keras_mask = mask
        if not self.built:
            with call_mode(mode), tf.init_scope():
                self.build(x.shape)
        return x

    def _options(self, training, arguments):
        if arguments.get("return_attention_scores"):
            raise ValueError(
                "Expected outputs alone to add to, but got return_attention_scores=True"
            )
        if self.layer._call_has_training_arg:
            return {"training": training, **arguments}
        return arguments

    def _add_windows(self, call, x, training, arguments):
        options = self._options(training, arguments)
        x = self._input("regular", x)
        y = call(x, **options)
        with call_mode("regular"):
            given = self.layer.compute_output_shape(tuple(x.shape))
        axis = self._time_axis % len(given)
        if given[axis] == 1:
            index = getattr(self.layer, "_query_index", -1 - self.delay)
            x = tf.gather(x, [index % tf.shape(x)[axis]], axis=axis)
        return cast(y, self.compute_dtype) + x

    def _add_steps(self, mode, call, x, training, streams, update_state, arguments):
        options = self._options(training, arguments)
        x = self._input(mode, x)
        axis = self._time_axis % x.shape.rank
        steps = 1 if mode == "step" else x.shape[axis]

        def compute(step):
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
        rows = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
        steps = tf.shape(x)[axis] if steps is None else steps
        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)
