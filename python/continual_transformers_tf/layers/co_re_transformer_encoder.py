"""The continual retroactive transformer encoder."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.ops.delay import put_steps, windows_of
from continual_transformers_tf.ops.stream_state import StreamState


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoReTransformerEncoder(TransformerEncoderBlock):
    """A transformer encoder block that gives all outputs of the window, on windows and on streams.

    A step changes what every step of the window attends to, and so all N outputs: retroactive
    attention updates them (Hedegaard & Iosifidis, "Continual Transformers", ICLR 2023, arXiv
    2201.06268), and the residuals and the feed-forward part are computed for all N.

    Args:
        seq_len: N, the window: the newest steps, which attend to each other. A regular call takes
            windows of any length.
        embed_dim, num_heads, ff_dim, dropout_rate, call_mode, key_dim, use_bias, norm_first,
            activation, epsilon: as `CoSiTransformerEncoder` has them.
        warm_up, algorithm: as `CoReMultiHeadAttention` has them.
        **kwargs: `name`, `dtype` and the like.

    Attributes:
        attention: the block's `CoReMultiHeadAttention`.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if a size is not a positive integer.
    """

    make_attention = CoReMultiHeadAttention
    gives_windows = True

    def __init__(
        self,
        seq_len,
        embed_dim,
        num_heads,
        ff_dim,
        dropout_rate=0.1,
        call_mode="regular",
        *,
        algorithm="auto",
        **kwargs,
    ):
        super().__init__(
            seq_len,
            embed_dim,
            num_heads,
            ff_dim,
            dropout_rate,
            call_mode,
            attention_options=dict(algorithm=algorithm),
            **kwargs,
        )
        # What the residuals are of: the window's inputs.
        rows = {"window": ((max(1, seq_len - 1), embed_dim), self.compute_dtype)}
        self._window = StreamState(0, rows, name="inputs")

    def call_regular(self, x, training=None, key_mask=None):
        """All outputs of whole windows; the streams' state plays no part.

        Args:
            x: `(B, T, E)`, windows, oldest step first.
            training: whether dropout acts.
            key_mask: bool `(B, T)`, which steps there are to attend to; None: all.

        Returns:
            `(B, T, E)`.
        """
        attention_mask = None if key_mask is None else key_mask[:, tf.newaxis]
        return self.call_regular_rows(x, training, attention_mask)

    def call_step(self, x, training=None, *, streams=None, update_state=True):
        """Takes one step of M streams.

        Args:
            x: `(M, E)`.
            training: whether dropout acts.
            streams, update_state: as `CoReMultiHeadAttention.call_step` has them.

        Returns:
            `(M, N, E)`, the outputs of the window's steps, oldest first; zeros for steps that were
            never taken. Or None while the window fills (see `warm_up`).

        Raises:
            ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit. The
                streams then go on as if the call had not been made.
        """
        steps = tf.expand_dims(self._input(x, "step"), 1)
        outputs = self.call_steps(steps, training, streams=streams, update_state=update_state)
        return None if outputs is None else tf.squeeze(outputs, 1)

    def call_steps(self, x, training=None, *, streams=None, update_state=True):
        """Takes T steps of M streams: the same outputs and state as T calls of `call_step`.

        Args:
            x: `(M, T, E)`.
            training, streams, update_state: as `call_step` has them.

        Returns:
            `(M, T', N, E)`: the outputs of the T' newest steps, those with a full window in the
            stream that has come furthest, or None where there is none; with `warm_up="partial"`
            and in a graph, T' = T.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        x = self._input(x, "steps")
        attended = self.attention.call_steps(
            self._attention_input(x), training=training, streams=streams, update_state=update_state
        )
        # The attention has found the streams to be held, each named once.
        with tf.control_dependencies([] if attended is None else [attended]):
            windows, taken = self._take_windows(x, streams, update_state)
        if attended is None:
            return None
        steps = tf.shape(attended)[1]
        outputs = self._step_feed_forward(windows[:, -steps:], attended, training)
        return tf.where(taken[:, -steps:, :, tf.newaxis], outputs, 0)

    def compute_output_shape(self, input_shape):
        if self.active_call_mode == "regular":
            return tuple(input_shape)
        return (*input_shape[:-1], self.seq_len, input_shape[-1])

    def _take_windows(self, x, streams, update_state):
        """Each step's window, `(M, T, N, E)`, and which of its steps were taken, `(M, T, N)`."""
        state, n = self._window, self.seq_len
        rows, steps = tf.shape(x)[0], tf.shape(x)[1]
        streams = state.streams_of_call(streams, x.shape[0] or rows)
        with state.lock:
            state.ensure_streams(tf.shape(self.attention.position)[0])
            position = tf.gather(state.position, streams)
            windows, taken = windows_of(state.window, x, streams, position, n)
            if update_state:
                with tf.control_dependencies([windows]):
                    put_steps(state.window, x, streams, position)
                state.position.scatter_nd_add(
                    streams[:, tf.newaxis], tf.fill([rows], tf.cast(steps, tf.int64))
                )
        return windows, taken

    # The state of the streams: that of the attention, and the window's inputs.

    @property
    def position(self):
        return self.attention.position

    def ensure_streams(self, streams):
        """Makes room for streams 0, ..., streams - 1. Those that are held keep their state."""
        self.attention.ensure_streams(streams)
        self._window.ensure_streams(streams)

    def clean_state(self, streams=None):
        """Forgets what streams have seen: they begin again.

        Args:
            streams: integers `[M]`, which ones; None: all.

        Raises:
            ValueError: if a stream is not held, or is named twice.
        """
        self.attention.clean_state(streams)
        self._hold_as_many()
        self._window.clean_state(streams)

    def get_state(self, streams=None):
        """The state of streams, a dict of NumPy arrays with one row a stream. Eager mode only.

        Args:
            streams: integers `[M]`, which ones, in this order; None: all.

        Raises:
            ValueError: if a stream is not held, or is named twice.
        """
        state = self.attention.get_state(streams)
        self._hold_as_many()
        return {**state, "window": self._window.get_state(streams)["window"]}

    def set_state(self, state, streams=None):
        """Puts back what `get_state` gave, here or in another block of the same sizes.

        Args:
            state: what `get_state` gave, of M streams.
            streams: integers `[M]`, which streams take it; None: streams 0, ..., M - 1, for which
                there is made room, and others that are held begin again.

        Raises:
            ValueError: if the state does not fit; the streams then stay as they were.
        """
        if not isinstance(state, dict) or "window" not in state or "position" not in state:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with 'window' and 'position', but got {got}")
        before = self.get_state(streams)
        attention = {name: array for name, array in state.items() if name != "window"}
        window = {"window": state["window"], "position": state["position"]}
        self.attention.set_state(attention, streams)
        try:
            self._hold_as_many()
            self._window.set_state(window, streams)
        except Exception:
            before.pop("window")
            self.attention.set_state(before, streams)
            raise

    def _hold_as_many(self):
        self._window.ensure_streams(int(tf.shape(self.attention.position)[0]))
