"""Rotary positions as a layer of a model's graph."""

from typing import Any

import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike, expect_given, rows_and_steps
from continual_transformers_tf.layers.rotary import Rotary
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState


@registered
class RotaryEmbedding(ContinualLayer):
    """Rotary positions: the rows' places in a window, and the steps' numbers in a stream.

    `ct.convert` puts this layer in the place of a `keras_hub.layers.RotaryEmbedding` with
    `rope_type="linear"`. If the layers that follow depend on more than the distances between rows,
    windows and steps agree only for the first window of a stream. In attention, use the argument
    `rotary` of `CoSiMultiHeadAttention` instead: windows and steps then always agree.

    Args:
        max_wavelength, scaling_factor, size, interleaved: As in `ct.Rotary`. A head is the last
            axis.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Call arguments:
        x: `(B, T, ..., D)`, of steps `(M, T, ..., D)`, of one step `(M, ..., D)`.

    Raises:
        ValueError: If D is odd or smaller than `size`, or an argument is none of those of
            `ct.Rotary`.
    """

    def __init__(
        self,
        max_wavelength: float = 10000.0,
        scaling_factor: float = 1.0,
        size: int | None = None,
        interleaved: bool = False,
        call_mode: str = "regular",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rotary = Rotary(max_wavelength, scaling_factor, size, interleaved)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._features: tuple[int | None, ...] | None = None
        self._stream_state = StreamState(0, name="state")

    @property
    def input_features(self) -> dict[str, Any]:
        return {"x": self._features}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.rotary.get_config()}

    def build(self, input_shape: Any) -> None:
        """Learn the features of a step: `input_shape` is that of the active call mode."""
        lead = 1 if self.active_call_mode == "step" else 2
        if len(input_shape) <= lead:
            raise ValueError(f"Expected x of shape (B, T, ..., D), but got {tuple(input_shape)}")
        self.rotary.turns(input_shape[-1])  # For its checks.
        self._features = tuple(input_shape[lead:])

    def call(
        self, x: TensorLike, streams: TensorLike | None = None, update_state: bool = True
    ) -> Any:
        return self._call_by_mode(x, streams=streams, update_state=update_state)

    def call_regular(self, x: TensorLike) -> tf.Tensor:
        """Turn windows `(B, T, ..., D)` from place 0 on. This does not use the streams' state."""
        x = self._input(x, lead=2)
        return self._turned(x, tf.zeros([1], tf.int64))

    def call_step(
        self, x: TensorLike, *, streams: TensorLike | None = None, update_state: bool = True
    ) -> tf.Tensor:
        """Take one step of M streams.

        Args:
            x: `(M, ..., D)`.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            A tensor like x.

        Raises:
            ValueError: If shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then continue as if the call had not
                been made.
        """
        x = tf.expand_dims(self._input(x, lead=1), 1)
        return tf.squeeze(self._take_steps(x, streams, update_state), 1)

    def call_steps(
        self, x: TensorLike, *, streams: TensorLike | None = None, update_state: bool = True
    ) -> tf.Tensor:
        """Take T steps of M streams, `(M, T, ..., D)`, as T calls of `call_step` would."""
        x = self._input(x, lead=2)
        if x.shape[1] == 0:
            raise ValueError(f"Expected at least one step, but got {tuple(x.shape)}")
        return self._take_steps(x, streams, update_state)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def _input(self, x: TensorLike, lead: int) -> tf.Tensor:
        expect_given("x", x)
        x = tf.convert_to_tensor(x)
        if not x.dtype.is_floating:
            raise ValueError(f"Expected x of a floating dtype, but got {x.dtype.name}")
        self._check_policy()
        x = tf.cast(x, self.compute_dtype)
        if self._features is None and x.shape.rank is not None and x.shape.rank > lead:
            self.rotary.turns(x.shape[-1])
            self._features = tuple(x.shape[lead:])
            self.built = True
        features = self._features or ()
        if x.shape.rank != lead + len(features) or not x.shape[lead:].is_compatible_with(features):
            axes = ", ".join(["M", "T"][:lead] + [str(n) for n in features or ("...", "D")])
            raise ValueError(f"Expected x of shape ({axes}), but got {tuple(x.shape)}")
        return x

    def _take_steps(self, x: tf.Tensor, streams: Any, update_state: bool) -> tf.Tensor:
        def compute(step: Step) -> tf.Tensor:
            return self._turned(x, step.rows_before(steps))

        rows, steps = rows_and_steps(x)
        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def _turned(self, x: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        """Turn steps `(M, T, ..., D)`, the first of which are the steps `first`, `(M | 1,)`."""
        shape = tf.shape(x)
        heads = tf.reshape(x, tf.stack([shape[0], shape[1], -1, x.shape[-1]]))
        positions = tf.expand_dims(first, 1) + tf.range(tf.cast(shape[1], tf.int64))
        turned = tf.reshape(self.rotary.rotate(heads, positions), shape)
        return tf.ensure_shape(turned, x.shape)
