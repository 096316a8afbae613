"""The continual retroactive transformer encoder."""

from typing import Any

import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.inputs import TensorLike
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.ops.delay import put_steps, windows_of
from continual_transformers_tf.ops.step import Step


@registered
class CoReTransformerEncoder(TransformerEncoderBlock):
    """A transformer encoder block that returns all outputs of the window, on windows and streams.

    A step changes what every step of the window attends to, and so all N outputs. Retroactive
    attention updates them (Hedegaard et al., "Continual Transformers", ICLR 2023, arXiv
    2201.06268). The residuals and the feed-forward part are computed for all N.

    Args:
        seq_len: N, the window: the newest steps, which attend to each other. A regular call takes
            windows of any length.
        embed_dim, num_heads, ff_dim, dropout_rate, call_mode: As in `CoSiTransformerEncoder`.
        key_dim, use_bias, norm_first, activation, epsilon: As in `CoSiTransformerEncoder`.
        warm_up, algorithm: As in `CoReMultiHeadAttention`.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Attributes:
        attention: The block's `CoReMultiHeadAttention`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if a size is not a positive integer.
    """

    _attention_class = CoReMultiHeadAttention
    gives_windows = True

    def __init__(
        self,
        seq_len: int,
        embed_dim: int,
        num_heads: int,
        ff_dim: int,
        dropout_rate: float = 0.1,
        call_mode: str = "regular",
        *,
        algorithm: str = "auto",
        **kwargs: Any,
    ) -> None:
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
        # A step of the attention by itself would keep no input, so the block owns its streams.
        self._streams.join([], self)

    def call_regular(
        self,
        x: TensorLike,
        training: bool | None = None,
        key_mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return all outputs of whole windows. This does not use the streams' state.

        Args:
            x: `(B, T, E)`, windows, oldest step first.
            training: Whether dropout acts.
            key_mask: bool `(B, T)`, the steps that can be attended to. None: all.

        Returns:
            `(B, T, E)`.
        """
        attention_mask = None if key_mask is None else key_mask[:, tf.newaxis]
        return self.call_regular_rows(x, training, attention_mask)

    def _step_outputs(
        self, step: Step, x: tf.Tensor, attended: tf.Tensor | None, training: bool | None
    ) -> tf.Tensor | None:
        ring, one_step = self._stream_state.window, x.shape.rank == 2
        steps = tf.expand_dims(x, 1) if one_step else x
        windows, taken = windows_of(ring, steps, step.numbers, step.position, self.seq_len)
        step.at_the_end(lambda: put_steps(ring, steps, step.numbers, step.position))
        if attended is None:
            return None
        if one_step:
            attended = tf.expand_dims(attended, 1)
        newest = tf.shape(attended)[1]
        outputs = self._step_feed_forward(windows[:, -newest:], attended, training)
        outputs = tf.where(taken[:, -newest:, :, tf.newaxis], outputs, 0)
        return tf.squeeze(outputs, 1) if one_step else outputs

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if self.active_call_mode == "regular":
            return tuple(input_shape)
        return (*input_shape[:-1], self.seq_len, input_shape[-1])
