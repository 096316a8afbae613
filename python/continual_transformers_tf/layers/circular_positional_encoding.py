"""Positional encoding that repeats, for streams without an end."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.inputs import TensorLike, expect_given, rows_and_steps
from continual_transformers_tf.layers.one_input_layer import OneInputLayer
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState, check_integer

ENCODINGS = ("learned", "sinusoidal")


@registered
class CircularPositionalEncoding(OneInputLayer):
    """Adds rows in turn, and begins again with the first row after the last.

    An endless stream has no last position. Attention only needs the steps of one window to differ.
    (This is the recycling positional encoding of Hedegaard et al., "Continual Transformers",
    ICLR 2023, arXiv 2201.06268, which takes 2N - 1 rows for windows of N steps.)

    The index, the row that is next, is the streams' state and not among the weights. A stream's
    index moves with its steps. Regular calls have an index of their own, the start row:

    - In training it moves from call to call, so that the model meets every row at every place of a
      window. A stream will do that too: it has no first row.
    - Outside training, a regular call of a functional, sequential or streaming model begins at row
      0, as a new stream does. So the model is a function of its input, and its steps equal it on
      windows.
    - If `call_update_index_steps` is given, and in a layer that is called by itself or in a
      subclassed model, every regular call moves the start row. Streams then begin there, and those
      that are held move with it, as in the original package.

    Args:
        max_len: The number of rows.
        embed_dim: E, the features of a row.
        call_update_index_steps: How far a regular call moves the start row. With 1, windows that
            slide by a step get the rows that the stream would, but two calls on the same window
            differ. With 0 every window begins at the same row. None: 1 where regular calls move it,
            as above.
        temporal_dim: The axis of time in windows and in several steps: 1, `(B, T, E)`, or 2,
            `(B, E, T)`.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        encoding: "learned": the rows are weights. "sinusoidal": the rows are sines and cosines in
            turn, and there are no weights. Their frequencies fall from feature to feature, and each
            completes a whole number of periods in `max_len` rows. So the first row follows the last
            as any row follows the one before, and the similarity of two rows depends only on their
            distance.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Returns:
        A tensor of the shape of the input.

    Raises:
        ValueError: At construction, if a size is not a positive integer, or `encoding` is neither.
    """

    def __init__(
        self,
        max_len: int,
        embed_dim: int,
        call_update_index_steps: int | None = None,
        temporal_dim: int = 1,
        call_mode: str = "regular",
        *,
        encoding: str = "learned",
        **kwargs: Any,
    ) -> None:
        check_integer("max_len", max_len, at_least=1)
        check_integer("embed_dim", embed_dim, at_least=1)
        if call_update_index_steps is not None:
            check_integer("call_update_index_steps", call_update_index_steps, at_least=0)
            call_update_index_steps = int(call_update_index_steps)
        if temporal_dim not in (1, 2, -1, -2):
            raise ValueError(f"Expected temporal_dim to be 1 or 2, but got {temporal_dim!r}")
        if encoding not in ENCODINGS:
            raise ValueError(f"Expected encoding to be one of {ENCODINGS}, but got {encoding!r}")
        super().__init__(**kwargs)
        self._temporal_dim = temporal_dim % 3
        self._max_len = int(max_len)
        self._embed_dim = int(embed_dim)
        self._call_update_index_steps = call_update_index_steps
        self._encoding = encoding
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        # The index of stream s is first_row + offset[s] + position[s]. It has an offset where its
        # state came from a layer that had another first row.
        with tf.init_scope():
            self._start = tf.Variable(0, trainable=False, name="start", dtype=tf.int64)
        self._stream_state = StreamState(0, {"offset": ([], tf.int64)}, name="state")

    @property
    def temporal_dim(self) -> int:
        """The axis of time in windows and in several steps."""
        return self._temporal_dim

    @property
    def input_features(self) -> dict[str, int]:
        return {"x": self._embed_dim}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "max_len": self._max_len,
            "embed_dim": self._embed_dim,
            "call_update_index_steps": self._call_update_index_steps,
            "temporal_dim": self._temporal_dim,
            "encoding": self._encoding,
        }

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if self._encoding == "sinusoidal":
            with tf.init_scope():
                rows = sinusoids(self._max_len, self._embed_dim)
                self._rows = tf.constant(rows, self.compute_dtype)
            return
        self.embeddings = self.add_weight(
            shape=(self._max_len, self._embed_dim),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="embeddings",
        )

    def call_regular(self, x: TensorLike, training: bool | None = None) -> tf.Tensor:
        """Add consecutive rows to windows; the class says from which row on.

        Args:
            x: `(B, T, E)`. If streams move with the start row, window i begins at the index of
                stream i.
            training: Whether this is training.
        """
        x = self._steps_input(x, "regular")
        first = tf.zeros([1], tf.int64)
        if self._begins_at_row_0 and _is_called_by_a_model(self):
            if not training:
                return self._time_in_place(self._add_rows(x, first))
            first += self._start
        else:
            # Windows without a stream that is held begin where a new stream would.
            state = self._stream_state
            moved = tf.concat([state.offset + state.position, first], 0)
            window = tf.minimum(tf.range(tf.shape(x)[0]), tf.shape(moved)[0] - 1)
            first = self._start + tf.gather(moved, window)
        output = self._add_rows(x, first)
        by = self._call_update_index_steps
        self._start.assign_add(1 if by is None else by)
        return self._time_in_place(output)

    @property
    def _begins_at_row_0(self) -> bool:
        """Whether new streams, and windows outside training, begin at row 0."""
        # Only a functional or sequential model has nodes of its layers.
        return bool(self._inbound_nodes) and self._call_update_index_steps is None

    @property
    def first_row(self) -> tf.Tensor:
        """int64 scalar tensor: the row at which a new stream begins."""
        return tf.zeros([], tf.int64) if self._begins_at_row_0 else self._start.value()

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def _restart(self) -> None:
        self._start.assign(0)

    def get_state(self, streams: TensorLike | None = None) -> dict[str, Any]:
        """Return the state of streams: a dict of int64 arrays `[M]`. Eager mode only.

        It has "position", the number of steps taken, and "index", the row that is next. In a model
        with strides after this layer, a step has several rows. "index" is then not the next row,
        but the stream's first row plus the number of steps taken.

        Args:
            streams: Integers `[M]`, the streams to read, in this order. None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        state = self._stream_state.get_state(streams)
        index = (self.first_row.numpy() + state["offset"] + state["position"]) % self._max_len
        return {"index": index, "position": state["position"]}

    def _states(self, state: dict[str, Any]) -> list[tuple[StreamState, dict[str, Any]]]:
        if not isinstance(state, dict) or set(state) != {"index", "position"}:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with ['index', 'position'], but got {got}")
        index, position = (np.asarray(state[name]) for name in ("index", "position"))
        if index.shape != position.shape or not index.dtype == position.dtype == np.int64:
            raise ValueError(
                "Expected the state's index and position to be int64 [M], but got "
                f"{index.dtype} {list(index.shape)} and {position.dtype} {list(position.shape)}"
            )
        offset = (index - self.first_row.numpy() - position) % self._max_len
        return super()._states({"offset": offset, "position": position})

    def _steps_input(self, x: TensorLike, mode: str) -> tf.Tensor:
        """Return windows or several steps as `(B, T, E)`, from any axis of time."""
        expect_given("x", x)
        x = tf.convert_to_tensor(x)
        if self._temporal_dim == 2 and x.shape.rank == 3:
            x = tf.transpose(x, (0, 2, 1))
        return self._input(x, mode)

    def _time_in_place(self, x: tf.Tensor) -> tf.Tensor:
        return tf.transpose(x, (0, 2, 1)) if self._temporal_dim == 2 else x

    def _input(self, x: TensorLike, mode: str) -> tf.Tensor:
        x = self._rows_input(x, mode)
        if x.shape[-1] != self._embed_dim:
            raise ValueError(
                f"Expected x of {self._embed_dim} features, embed_dim, but got {tuple(x.shape)}"
            )
        return x

    def _take_steps(
        self, mode: str, x: TensorLike, training: bool | None, streams: Any, update_state: bool
    ) -> tf.Tensor:
        one_step = mode == "step"
        x = tf.expand_dims(self._input(x, mode), 1) if one_step else self._steps_input(x, mode)

        def compute(step: Step) -> tf.Tensor:
            moved = tf.gather(self._stream_state.offset, step.numbers) + step.rows_before(steps)
            return self._add_rows(x, self.first_row + moved)

        rows, steps = rows_and_steps(x)
        y = self._streams.take_steps(self, compute, streams, rows, steps, update_state)
        return tf.squeeze(y, 1) if one_step else self._time_in_place(y)

    def _add_rows(self, x: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        """Return x `(M, T, E)` plus the rows from `first`, `(M,)` or `(1,)`, on."""
        steps = tf.range(tf.shape(x, tf.int64)[1])
        index = tf.math.floormod(tf.expand_dims(first, 1) + steps, self._max_len)
        rows = self._rows if self._encoding == "sinusoidal" else self.embeddings.value
        return x + tf.cast(tf.gather(rows, index), self.compute_dtype)


def _is_called_by_a_model(layer: keras.layers.Layer) -> bool:
    """Return whether another layer's call is in progress, which then called this one."""
    context = global_state.get_global_attribute("current_call_ctx")
    return context is not None and context.entry_layer is not layer


def sinusoids(rows: int, features: int) -> np.ndarray:
    """Return float64 rows `[rows, features]` of sines and cosines in turn, all of them periodic.

    Each pair of features completes a whole number of periods. The first pair completes
    (rows - 1) // 2 of them, beyond which a sine equals a slower one. The last pair completes one,
    which tells all rows apart. The pairs between have equal ratios.
    """
    fastest = max(1, (rows - 1) // 2)
    times = np.round(np.geomspace(1, fastest, (features + 1) // 2))[::-1]
    angles = 2 * np.pi / rows * np.outer(np.arange(rows), times)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(rows, -1)[:, :features]
