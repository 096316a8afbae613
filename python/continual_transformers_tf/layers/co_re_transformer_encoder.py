"""The continual retroactive transformer encoder."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.inputs import rows_and_steps
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.ops.delay import put_steps, windows_of


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
        # The window's inputs, for the residuals.
        shape = (max(1, seq_len - 1), embed_dim)
        self.attention._stream_state.add_row("window", shape, self.compute_dtype)
        # By itself the attention would keep no input.
        self._streams.join([], self)

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
        window, n = self._stream_state.window, self.seq_len
        rows, steps = rows_and_steps(x)

        def compute(step):
            attended = self.attention.call_steps(
                self._attention_input(x), training=training, update_state=update_state
            )
            windows, taken = windows_of(window, x, step.numbers, step.position, n)
            step.at_the_end(lambda: put_steps(window, x, step.numbers, step.position))
            if attended is None:
                return None
            newest = tf.shape(attended)[1]
            outputs = self._step_feed_forward(windows[:, -newest:], attended, training)
            return tf.where(taken[:, -newest:, :, tf.newaxis], outputs, 0)

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def compute_output_shape(self, input_shape):
        if self.active_call_mode == "regular":
            return tuple(input_shape)
        return (*input_shape[:-1], self.seq_len, input_shape[-1])
