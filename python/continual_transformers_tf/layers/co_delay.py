"""A delay: a step comes out again some steps later."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.inputs import TensorLike, rows_and_steps
from continual_transformers_tf.layers.row_ring_layer import RowRingLayer
from continual_transformers_tf.layers.warm_up import check_warm_up
from continual_transformers_tf.ops.delay import delayed_steps, mask_rows, put_steps
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState, check_integer


@registered
class CoDelay(RowRingLayer):
    """Returns each step `delay` steps later. Windows are returned as they are.

    With it, a branch without delay meets another whose outputs come later, such as attention with a
    `query_index`: see `CoResidual`.

    Args:
        delay: D, the delay in steps. 0: each step is returned at once.
        dtype: The dtype in which steps are kept and returned, floating or not. None: Keras' own.
        temporal_dim: The axis of time in windows and in several steps. A step has no such axis.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        warm_up: What a step returns, in eager mode, while no stream of the call has taken more than
            `delay` steps. "none": None. "partial": zeros. Graphs return zeros, and so do streams
            that have not come so far in a call in which others have.
        **kwargs: `name` and other arguments of `keras.layers.Layer`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if `delay` is not an integer >= 0, `temporal_dim` is not an
            axis, or `warm_up` or `call_mode` is none of those above.
    """

    def __init__(
        self,
        delay: int,
        dtype: Any = "float32",
        temporal_dim: int = 1,
        call_mode: str = "regular",
        *,
        warm_up: str = "none",
        **kwargs: Any,
    ) -> None:
        check_integer("delay", delay, at_least=0)
        integer = isinstance(temporal_dim, (int, np.integer)) and not isinstance(temporal_dim, bool)
        if not integer or temporal_dim == 0:
            raise ValueError(
                "Expected temporal_dim to be an axis other than 0, the streams', but got "
                f"{temporal_dim!r}"
            )
        if isinstance(dtype, (tf.DType, type)):  # Keras knows only names of dtypes.
            dtype = tf.as_dtype(dtype).name
        super().__init__(dtype=dtype, **kwargs)
        self._delay = int(delay)
        self._temporal_dim = int(temporal_dim)
        self._warm_up = check_warm_up(warm_up)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._ring_rows = self._delay
        self._stream_state = StreamState(0, name="state")

    @property
    def temporal_dim(self) -> int:
        """The axis of time in windows and in several steps."""
        return self._temporal_dim

    @property
    def receptive_field(self) -> int:
        return self._delay + 1

    @property
    def delay(self) -> int:
        return self._delay

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "delay": self._delay,
            "temporal_dim": self._temporal_dim,
            "warm_up": self._warm_up,
        }

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Learn the features of a step.

        Args:
            input_shape: The input's shape in the active call mode. Features of unknown size are
                learned from the first step instead.
        """
        features = list(input_shape[1:])
        if self.active_call_mode != "step":
            features.pop(self._time_axis(len(input_shape)) - 1)
        if None not in features:
            self._keep(features)

    def call(
        self, x: TensorLike, streams: TensorLike | None = None, update_state: bool = True
    ) -> Any:
        return self._call_by_mode(x, streams=streams, update_state=update_state)

    def call_regular(self, x: TensorLike) -> tf.Tensor:
        """Return windows as they are. This does not use the streams' state.

        Args:
            x: `(B, T, ...)`, or with time on the axis `temporal_dim`.
        """
        return self._as_own_dtype(x)

    def call_step(
        self, x: TensorLike, *, streams: TensorLike | None = None, update_state: bool = True
    ) -> tf.Tensor | None:
        """Take one step of M streams, and return that of `delay` steps before.

        Args:
            x: `(M, ...)`.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, ...)`, or None while there is none (see `warm_up`).

        Raises:
            ValueError: If shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then continue as if the call had not
                been made.
        """
        x = self._as_own_dtype(x)
        if x.shape.rank == 0:
            raise ValueError(
                f"Expected x of shape (M, ...), one step of M streams, but got {x.shape}"
            )
        self._check_features(x, tuple(x.shape[1:]), time_axis=None)
        delayed = self._take_steps(tf.expand_dims(x, 1), streams, update_state)
        return None if delayed is None else tf.squeeze(delayed, 1)

    def call_steps(
        self, x: TensorLike, *, streams: TensorLike | None = None, update_state: bool = True
    ) -> tf.Tensor | None:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Gradients flow to the steps of this call. Those of earlier calls are constants.

        Args:
            x: `(M, T, ...)`, oldest step first, or with time on the axis `temporal_dim`.
            streams, update_state: As in `call_step`.

        Returns:
            `(M, T', ...)`, with time on the same axis. In eager mode with `warm_up="none"` these
            are the outputs of the T' newest steps that have one in the stream that has come
            furthest, or None if there are none. Otherwise T' = T.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        x = self._as_own_dtype(x)
        axis = self._time_axis(x.shape.rank)
        features = list(x.shape[1:])
        if features.pop(axis - 1) == 0:
            raise ValueError(f"Expected at least one step, but got {tuple(x.shape)}")
        self._check_features(x, tuple(features), time_axis=axis)
        delayed = self._take_steps(_with_moved_axis(x, axis, 1), streams, update_state)
        return None if delayed is None else _with_moved_axis(delayed, 1, axis)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def _time_axis(self, rank: int | None) -> int:
        """Return the axis of time in several steps or windows of this rank."""
        axis = self._temporal_dim
        if rank is None or rank < 2 or not -rank < axis < rank:
            shape = "(M, T, ...)" if axis == 1 else f"with time on axis {axis}"
            raise ValueError(f"Expected x of shape {shape}, but got one of rank {rank}")
        return axis % rank

    def _check_features(
        self, x: tf.Tensor, features: Sequence[int | None], time_axis: int | None
    ) -> None:
        """Raise ValueError unless x has the features that the layer keeps. Build the layer."""
        if self._features is None:
            if None in features:
                raise ValueError(f"Expected x of known features, but got {tuple(x.shape)}")
            with tf.init_scope():
                self._keep(features)
            self.built = True
        if not tf.TensorShape(features).is_compatible_with(self._features):
            expected = ["M", *map(str, self._features or ())]
            if time_axis is not None:
                expected.insert(time_axis, "T")
            raise ValueError(
                f"Expected x of shape ({', '.join(expected)}), but got {tuple(x.shape)}"
            )

    def _take_steps(
        self, x: tf.Tensor, streams: TensorLike | None, update_state: bool
    ) -> tf.Tensor | None:
        """Take the steps x `(M, T, ...)`, and return `(M, T', ...)` or None."""
        self._check_policy()
        state = self._stream_state
        rows, steps = rows_and_steps(x)

        def compute(step: Step) -> tf.Tensor | None:
            delayed = x
            if self._delay > 0:
                position = step.rows_before(steps)
                delayed = delayed_steps(state.steps, x, step.numbers, position)
                number = tf.range(tf.cast(steps, tf.int64))
                came = tf.expand_dims(position, 1) + number >= self._delay
                delayed = mask_rows(delayed, came)
                step.at_the_end(lambda: put_steps(state.steps, x, step.numbers, position))
            return self._ready_outputs(step, delayed)

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)


def _with_moved_axis(x: tf.Tensor, source: int, target: int) -> tf.Tensor:
    """Return x with one axis moved."""
    if source == target:
        return x
    axes = [axis for axis in range(x.shape.rank) if axis != source]
    axes.insert(target, source)
    return tf.transpose(x, axes)
