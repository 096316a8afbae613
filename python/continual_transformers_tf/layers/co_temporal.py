"""A layer that reads a few neighbouring steps, such as a convolution, on the steps of streams."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.call_modes import call_mode as calling
from continual_transformers_tf.layers.inputs import (
    TensorLike,
    expect_given,
    in_blocks,
    rows_and_steps,
    without_keras_mask,
)
from continual_transformers_tf.layers.row_ring_layer import RowRingLayer
from continual_transformers_tf.layers.wrapping_layer import WrappingLayer
from continual_transformers_tf.ops.delay import mask_rows, put_steps, sequence_before
from continual_transformers_tf.ops.step import ALL_ROWS, Rows, Step

CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.DepthwiseConv1D,
    keras.layers.SeparableConv1D,
)
_POOLING = (keras.layers.AveragePooling1D, keras.layers.MaxPooling1D)
GLOBAL_POOLING = (keras.layers.GlobalAveragePooling1D, keras.layers.GlobalMaxPooling1D)
_AVERAGES = (keras.layers.AveragePooling1D, keras.layers.GlobalAveragePooling1D)
TEMPORAL = (
    *CONVOLUTIONS,
    *_POOLING,
    *GLOBAL_POOLING,
    keras.layers.STFTSpectrogram,
    keras.layers.ZeroPadding1D,
)


@dataclasses.dataclass(frozen=True)
class Frames:
    """Which rows a temporal layer reads for each of its outputs.

    Output number j reads the rows `j * stride - before` to `j * stride - before + span - 1`.

    Attributes:
        span: How many rows an output spans.
        stride: How many rows lie between outputs.
        before: How many rows of padding are in front of row 0.
        history: How many rows of earlier calls the first output of a call reads. Less than 0: it
            leaves out so many rows of the call.
        rows: The `Rows` of the outputs.
    """

    span: int
    stride: int
    before: int
    history: int
    rows: Rows


@registered
class CoTemporal(RowRingLayer, WrappingLayer):
    """Runs a Keras layer that reads a few neighbouring steps, on windows or step by step.

    The layer is a convolution, a pooling or a short-time Fourier transform along time. A stream
    keeps the steps that the next outputs read. Outputs are those of a call of the layer on the
    whole sequence, from the stream's first step on:

    - With padding "causal", row t of the sequence is the output of step t.
    - With "same", outputs come `delay` steps later, because they read later steps.
    - With "valid", the first steps have no output: what comes then has no meaning, and layers that
      follow in a `StreamingModel` know it.
    - A layer with strides takes `block` steps at once, and gives one output for them.
    - Pooling over the whole window (`GlobalAveragePooling1D`, `GlobalMaxPooling1D`) reads the
      `window` newest steps.

    `ct.convert` makes these of the layers in a model.

    Args:
        layer: A `Conv1D`, `DepthwiseConv1D`, `SeparableConv1D`, `AveragePooling1D`, `MaxPooling1D`,
            `GlobalAveragePooling1D`, `GlobalMaxPooling1D`, `STFTSpectrogram` or `ZeroPadding1D`,
            with channels last. It is not copied.
        window: N, how many steps a global pooling reads. Other layers have no window.
        warm_up: "none": in eager mode, steps return None until a stream's receptive field is full.
            "partial": they return outputs at once.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        **kwargs: `name` and other arguments of `keras.layers.Layer`. The default `dtype` is the
            given layer's.

    Attributes:
        layer, window: As given.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if the layer is none of these, has channels first, or `window`
            does not fit it.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        window: int | None = None,
        *,
        warm_up: str = "none",
        call_mode: str = "regular",
        **kwargs: Any,
    ) -> None:
        if not isinstance(layer, TEMPORAL):
            kinds = ", ".join(kind.__name__ for kind in TEMPORAL)
            raise ValueError(f"Expected a layer of one of these kinds: {kinds}; but got {layer!r}")
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise ValueError(
                f"Expected channels last, time on axis 1, but {layer.name} has "
                f"data_format={layer.data_format!r}"
            )
        if isinstance(layer, GLOBAL_POOLING):
            if window is None:
                raise ValueError(
                    f"Expected window, the number of steps that {layer.name} "
                    f"({type(layer).__name__}) reads, but got None"
                )
        elif window is not None:
            raise ValueError(
                f"Expected window only for a global pooling, but {layer.name} is a "
                f"{type(layer).__name__}"
            )
        super().__init__(layer, window, warm_up, call_mode, **kwargs)
        self._ring_rows = self.span - 1

    # The rows of the input that an output is computed from.

    @property
    def span(self) -> int:
        """How many steps an output spans."""
        layer: Any = self.layer
        if isinstance(layer, CONVOLUTIONS):
            return (layer.kernel_size[0] - 1) * layer.dilation_rate[0] + 1
        if isinstance(layer, _POOLING):
            return layer.pool_size[0]
        if isinstance(layer, keras.layers.STFTSpectrogram):
            return layer.frame_length
        return self.window or 1

    @property
    def block(self) -> int:
        layer: Any = self.layer
        if isinstance(layer, (*CONVOLUTIONS, *_POOLING)):
            return layer.strides[0]
        return layer._frame_step if isinstance(layer, keras.layers.STFTSpectrogram) else 1

    @property
    def gives_one_row(self) -> bool:
        """Whether an output is one row for the whole window, without an axis of time."""
        return self.window is not None

    def frames(self, given: Rows = ALL_ROWS) -> Frames:
        """Return the `Frames` of the layer, given the `Rows` of its input."""
        layer: Any = self.layer
        span, stride = self.span, self.block
        # A regular call gives c rows more than the stream has taken positions, which are a multiple
        # of the stride.
        c = given.delay - given.lag
        if isinstance(layer, keras.layers.ZeroPadding1D):
            before, after = layer.padding
            return Frames(1, 1, 0, 0, Rows(given.lag - before, given.delay + after))
        padding = "left out" if self.window else layer.padding
        if padding == "valid":
            before, more = 0, (c - span) // stride + 1
        elif padding == "same":
            more = -(-c // stride)
            before = max((more - 1) * stride + span - c, 0) // 2
        else:
            before, more = span - 1, (c - 1) // stride + 1
        lag = -(-(span - before + given.lag - stride) // stride)
        history = lag * stride + before - given.lag
        return Frames(span, stride, before, history, Rows(lag, more + lag))

    @property
    def receptive_field(self) -> int:
        return max(1, self.block + self.frames().history)

    @property
    def delay(self) -> int:
        return self.frames().rows.delay * self.block

    # Calls.

    @property
    def input_features(self) -> dict[str, Any]:
        features = self._features
        return {"x": features if self.block == 1 or features is None else (self.block, *features)}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = tuple(input_shape[2:])
        if self.active_call_mode == "step" and self.block == 1:
            features = tuple(input_shape[1:])
        self._keep(features)

    def call_regular(
        self, x: TensorLike, mask: TensorLike | None = None, training: bool | None = None
    ) -> tf.Tensor:
        """Return the layer's output for windows `(B, T, F)`. This does not use streams' state."""
        expect_given("x", x)
        return self.layer(x, **self._mask_of_call(mask))

    def call_step(
        self,
        x: TensorLike,
        mask: TensorLike | None = None,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> tf.Tensor | None:
        """Take the steps of one output of M streams.

        Args:
            x: `(M, F)`; of a layer with strides `(M, block, F)`.
            mask: None. Only a regular call of `GlobalAveragePooling1D` heeds one.
            training: Has no effect.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, ...)`, or None while the receptive field fills (see `warm_up`).

        Raises:
            ValueError: If shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then continue as if the call had not
                been made.
        """
        self._expect_no_mask(mask)
        x = self._rows_of(x, "(M, F)" if self.block == 1 else f"(M, {self.block}, F)")
        if self.block == 1:
            x = tf.expand_dims(x, 1)
        y = self._take_steps(x, streams, update_state)
        return None if y is None else tf.squeeze(y, 1)

    def call_steps(
        self,
        x: TensorLike,
        mask: TensorLike | None = None,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> tf.Tensor | None:
        """Take T steps of M streams, with the outputs and state of T / block calls of `call_step`.

        Gradients flow to the steps of this call. Those of earlier calls are constants.

        Args:
            x: `(M, T, F)`, oldest step first. T is a multiple of `block`.
            mask, training, streams, update_state: As in `call_step`.

        Returns:
            `(M, T', ...)`, an output for every `block` steps; those with a full receptive field if
            `warm_up="none"` in eager mode, or None if there are none.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        self._expect_no_mask(mask)
        return self._take_steps(self._rows_of(x, "(M, T, F)"), streams, update_state)

    def compute_output_spec(self, x: Any, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.active_call_mode == "regular":
            return self.layer.compute_output_spec(x, **self._mask_of_call(mask))
        return super().compute_output_spec(x, mask, *args, **kwargs)

    def _mask_of_call(self, mask: Any) -> dict[str, Any]:
        """Return the mask as an argument of the layer's call, if that takes one."""
        heeds = isinstance(self.layer, keras.layers.GlobalAveragePooling1D)
        return {"mask": mask} if heeds and mask is not None else {}

    def _expect_no_mask(self, mask: Any) -> None:
        if self._mask_of_call(mask):
            raise ValueError(
                f"Expected no mask, but {self.name} got one: its steps pool all rows of the window"
            )

    # Steps.

    def _rows_of(self, x: TensorLike, shape: str) -> tf.Tensor:
        """Return an input as a tensor of the compute dtype, and build the layer."""
        expect_given(f"x of shape {shape}", x)
        x = tf.convert_to_tensor(x)
        rank = shape.count(",") + 1
        if x.shape.rank != rank:
            raise ValueError(f"Expected x of shape {shape}, but got {tuple(x.shape)}")
        if not x.dtype.is_floating:
            raise ValueError(f"Expected x of a floating dtype, but got {x.dtype.name}")
        x = without_keras_mask(tf.cast(x, self.compute_dtype))
        if not self.built:
            with tf.init_scope(), calling("steps"):
                self.build((None, None, *x.shape[rank - 1 :]))
            self.built = True
        if not x.shape[rank - 1 :].is_compatible_with(self._features):
            expected = f"{shape[:-2]}{self._features[-1]})" if self._features else shape
            raise ValueError(f"Expected x of shape {expected}, but got {tuple(x.shape)}")
        if rank == 3 and x.shape[1] is not None and (x.shape[1] == 0 or x.shape[1] % self.block):
            raise ValueError(
                f"Expected a multiple of {self.block} steps, at least one, but got {tuple(x.shape)}"
            )
        return in_blocks(x, self.block) if rank == 3 else x

    def _keep(self, features: Sequence[Any]) -> None:
        """Make the ring for rows of these features, and build the layer."""
        if None in features:
            raise ValueError(f"Expected features of a known size, but got (B, T, {features})")
        if not self.layer.built:
            self.layer.build((None, None, *features))
        super()._keep(features)

    def _take_steps(
        self, x: tf.Tensor, streams: TensorLike | None, update_state: bool
    ) -> tf.Tensor | None:
        """Take the steps x `(M, T, F)`, and return `(M, T / block, ...)` or None."""
        self._check_policy()
        rows, steps = rows_and_steps(x)

        def compute(step: Step) -> tf.Tensor | None:
            outputs = self._outputs(x, step, self.frames(step.rows_of_input))
            return self._ready_outputs(step, outputs)

        return self._streams.take_steps(
            self, compute, streams, rows, steps // self.block, update_state
        )

    def _outputs(self, x: tf.Tensor, step: Step, frames: Frames) -> tf.Tensor:
        """Return the outputs for all steps x, and keep what the next call reads."""
        ring = getattr(self._stream_state, "steps", None)
        taken, before, given = tf.shape(x)[1], frames.history, step.rows_of_input
        position = step.rows_before(taken)
        # Rows before the sequence's first are zeros. So they are in the ring, as in a session.
        x = x if given.lag <= 0 else mask_rows(x, step.numbers_of(taken) >= 0)
        real = x
        if before > 0:
            first = max(given.lag, 0)
            past, _ = sequence_before(ring, step.numbers, position, before, first)
            real = tf.concat([past, real], 1)
            step.at_the_end(lambda: put_steps(ring, x, step.numbers, position))
        elif before < 0:
            real = real[:, -before:]
        outputs = taken // frames.stride
        real = real[:, : (outputs - 1) * frames.stride + frames.span]
        return self._of_frames(real, frames, position // frames.stride - frames.rows.lag)

    def _of_frames(self, x: tf.Tensor, frames: Frames, first: tf.Tensor) -> tf.Tensor:
        """Return the outputs whose frames lie side by side in x.

        Args:
            x: `(M, (outputs - 1) * stride + span, F)`.
            frames: The `Frames`.
            first: int64 `[M]`, the number of the first output.
        """
        layer = self.layer
        if isinstance(layer, keras.layers.ZeroPadding1D):
            return x
        if not isinstance(layer, (*_POOLING, *GLOBAL_POOLING)):
            return _without_padding(layer)(x)
        # Rows of padding, and rows before the stream's first, do not count in a pooling.
        row = tf.range(tf.shape(x)[1]) - frames.before
        number = first[:, tf.newaxis] * frames.stride + tf.cast(row, tf.int64)
        there = number >= 0
        pool = (frames.span, frames.stride, "valid")
        if not isinstance(layer, _AVERAGES):
            return keras.ops.max_pool(mask_rows(x, there, x.dtype.min), *pool)
        mean = keras.ops.average_pool(mask_rows(x, there), *pool)
        share = keras.ops.average_pool(tf.cast(there, x.dtype)[..., tf.newaxis], *pool)
        return tf.math.divide_no_nan(mean, share)


def _without_padding(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Return a layer that shares the given one's weights, for rows with the padding among them.

    copy.copy would save the layer to a file and load it: with weights of its own, and not in a
    graph.
    """
    valid = object.__new__(type(layer))
    valid.__dict__.update(layer.__dict__, padding="valid")
    return valid
