"""The window of a stream's newest steps, as a whole at every step."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.inputs import TensorLike, rows_and_steps
from continual_transformers_tf.layers.row_ring_layer import RowRingLayer
from continual_transformers_tf.layers.warm_up import check_warm_up
from continual_transformers_tf.ops.delay import put_steps, windows_of
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState, check_integer


@registered
class CoWindow(RowRingLayer):
    """Returns the window of the newest `seq_len` steps at every step. Windows stay as they are.

    Any layer may follow it: it is then called on the whole window at every step, as in a regular
    call. This is exact, and costs as much as recomputing the window. So put it as late in the model
    as possible.

    Args:
        seq_len: N, the window: how many of the newest steps are returned.
        warm_up: What a step returns, in eager mode, while the window fills. "none": None, as long
            as no stream of the call has a full window. "partial": the steps seen so far in the
            newest rows, and zeros in those of steps that were never taken. A graph is always
            "partial".
        call_mode: What calling the layer does: "regular", "step" or "steps".
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if `seq_len` is not a positive integer, or `warm_up` or
            `call_mode` is none of those above.
    """

    gives_windows = True

    def __init__(
        self, seq_len: int, *, warm_up: str = "none", call_mode: str = "regular", **kwargs: Any
    ) -> None:
        check_integer("seq_len", seq_len, at_least=1)
        super().__init__(**kwargs)
        self._seq_len = int(seq_len)
        self._warm_up = check_warm_up(warm_up)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._ring_rows = max(1, self._seq_len - 1)
        self._stream_state = StreamState(0, name="state")

    @property
    def seq_len(self) -> int:
        """N, the window."""
        return self._seq_len

    @property
    def receptive_field(self) -> int:
        return self._seq_len

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seq_len": self._seq_len, "warm_up": self._warm_up}

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Learn the features of a step.

        Args:
            input_shape: The input's shape in the active call mode. Features of unknown size are
                learned from the first step instead.
        """
        features = input_shape[1 if self.active_call_mode == "step" else 2 :]
        if None not in features:
            self._keep(features)

    def call(
        self, x: TensorLike, streams: TensorLike | None = None, update_state: bool = True
    ) -> Any:
        return self._call_by_mode(x, streams=streams, update_state=update_state)

    def call_regular(self, x: TensorLike) -> tf.Tensor:
        """Return windows `(B, T, ...)` as they are. This does not use the streams' state."""
        return self._tensor(x)

    def call_step(
        self, x: TensorLike, *, streams: TensorLike | None = None, update_state: bool = True
    ) -> tf.Tensor | None:
        """Take one step of M streams, and return the windows that end with it.

        Args:
            x: `(M, ...)`.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, N, ...)`, oldest step first, or None while there is none (see `warm_up`).

        Raises:
            ValueError: If shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then continue as if the call had not
                been made.
        """
        windows = self._take_steps(tf.expand_dims(self._tensor(x), 1), streams, update_state)
        return None if windows is None else tf.squeeze(windows, 1)

    def call_steps(
        self, x: TensorLike, *, streams: TensorLike | None = None, update_state: bool = True
    ) -> tf.Tensor | None:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Args:
            x: `(M, T, ...)`, oldest step first.
            streams, update_state: As in `call_step`.

        Returns:
            `(M, T', N, ...)`. In eager mode with `warm_up="none"` these are the windows of the T'
            newest steps, those with a full window in the stream that has come furthest, or None if
            there are none. Otherwise T' = T.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        x = self._tensor(x)
        if x.shape.rank < 2 or x.shape[1] == 0:
            raise ValueError(
                f"Expected x of shape (M, T, ...), at least one step, but got {tuple(x.shape)}"
            )
        return self._take_steps(x, streams, update_state)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def _tensor(self, x: TensorLike) -> tf.Tensor:
        x = self._as_own_dtype(x)
        if x.shape.rank == 0:
            raise ValueError(
                f"Expected x of shape (M, ...), one step of M streams, but got {x.shape}"
            )
        return x

    def _take_steps(
        self, x: tf.Tensor, streams: TensorLike | None, update_state: bool
    ) -> tf.Tensor | None:
        """Take the steps x `(M, T, ...)`, and return `(M, T', N, ...)` or None."""
        self._check_policy()
        if self._features is None:
            if None in x.shape[2:]:
                raise ValueError(f"Expected x of known features, but got {tuple(x.shape)}")
            with tf.init_scope():
                self._keep(x.shape[2:])
            self.built = True
        if not x.shape[2:].is_compatible_with(self._features):
            raise ValueError(
                f"Expected steps of features {self._features}, but got {tuple(x.shape[2:])}"
            )
        state, n = self._stream_state, self._seq_len
        rows, steps = rows_and_steps(x)

        def compute(step: Step) -> tf.Tensor | None:
            if n == 1:
                windows = tf.expand_dims(x, 2)
            else:
                windows, _ = windows_of(state.steps, x, step.numbers, step.position, n)
            step.at_the_end(lambda: put_steps(state.steps, x, step.numbers, step.position))
            return self._ready_outputs(step, windows)

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)
