"""The continual single-output transformer encoder."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.co_si_encoder_step import OneOpEncoderStep
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_step import one_op_step
from continual_transformers_tf.layers.inputs import rows_and_steps
from continual_transformers_tf.layers.narrow_kernels import NarrowKernels
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoSiTransformerEncoder(TransformerEncoderBlock):
    """A transformer encoder block that gives the newest step's output, on windows and on streams.

    Attention, residual, layer norm, feed-forward, residual, layer norm, of the newest step only:
    continual single-output attention leaves nothing else to compute (Hedegaard & Iosifidis,
    "Continual Transformers", ICLR 2023, arXiv 2201.06268). Called eagerly, a step is one fused op,
    but in training and with activations other than "gelu", "relu" and "linear".

    Args:
        seq_len: N, the window: how many of the newest steps a step attends to. A regular call
            attends to all of the window that it is given, of whatever length.
        embed_dim: E, the features of input and output.
        num_heads: H.
        ff_dim: F, the features between the two layers of the feed-forward part.
        dropout_rate: of the dropout before each residual, which acts where `training` is true.
        call_mode: what calling the layer does: "regular", "step" or "steps".
        key_dim: the size of each head's keys and values. None: embed_dim.
        use_bias: whether the attention's layers have biases.
        norm_first: whether each layer norm is of what goes into the attention and the feed-forward
            part (pre-norm), and not of the residual sums (post-norm, as published).
        activation: of the feed-forward part, as `keras.layers.Dense` takes it. "gelu" is the real
            one, not its approximation by tanh. With any but "gelu", "relu" and "linear" a step in
            TensorFlow is many ops; to a `ct.Session` all are alike.
        epsilon: of the layer norms.
        warm_up, cache_dtype, weights_dtype: as `CoSiMultiHeadAttention` has them; `weights_dtype`
            is that of the feed-forward part too.
        **kwargs: `name`, `dtype` and the like.

    Attributes:
        attention: the block's `CoSiMultiHeadAttention`.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if a size is not a positive integer.
    """

    make_attention = CoSiMultiHeadAttention

    def __init__(
        self,
        seq_len,
        embed_dim,
        num_heads,
        ff_dim,
        dropout_rate=0.1,
        call_mode="regular",
        *,
        cache_dtype=None,
        weights_dtype=None,
        **kwargs,
    ):
        super().__init__(
            seq_len,
            embed_dim,
            num_heads,
            ff_dim,
            dropout_rate,
            call_mode,
            attention_options=dict(cache_dtype=cache_dtype, weights_dtype=weights_dtype),
            **kwargs,
        )
        self._one_op_step = None  # Gathered at the first step that needs it.
        self._narrow_kernels = NarrowKernels()

    def call_regular(self, x, training=None, key_mask=None):
        """The newest step's output of whole windows; the streams' state plays no part.

        Args:
            x: `(B, T, E)`, windows, oldest step first.
            training: whether dropout acts.
            key_mask: bool `(B, T)`, which steps there are to attend to; None: all.

        Returns:
            `(B, 1, E)`.
        """
        x = self._input(x, "regular")
        attended = self.attention.call_regular(
            self.attention_norm(x) if self.norm_first else x, training=training, key_mask=key_mask
        )
        return self._feed_forward(x[:, -1:], attended, training)

    def call_step(self, x, training=None, *, streams=None, update_state=True):
        """Takes one step of M streams.

        Args:
            x: `(M, E)`.
            training: whether dropout acts.
            streams, update_state: as `CoSiMultiHeadAttention.call_step` has them.

        Returns:
            `(M, E)`, or None while the window fills (see `warm_up`).

        Raises:
            ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit. The
                streams then go on as if the call had not been made.
        """
        one_op = one_op_step(self, training, x, OneOpEncoderStep)
        x = self._input(x, "step")
        if one_op is not None:
            return one_op(x, streams, update_state)

        def compute(step):
            attended = self.attention.call_step(
                self._attention_input(x), training=training, update_state=update_state
            )
            return None if attended is None else self._step_feed_forward(x, attended, training)

        rows = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
        return self._streams.take_steps(self, compute, streams, rows, 1, update_state)

    def call_steps(self, x, training=None, *, streams=None, update_state=True):
        """Takes T steps of M streams: the same outputs and state as T calls of `call_step`.

        Args:
            x: `(M, T, E)`.
            training, streams, update_state: as `call_step` has them.

        Returns:
            `(M, T', E)` or None, as `CoSiMultiHeadAttention.call_steps`.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        x = self._input(x, "steps")

        def compute(step):
            attended = self.attention.call_steps(
                self._attention_input(x), training=training, update_state=update_state
            )
            if attended is None:
                return None
            return self._step_feed_forward(x[:, -tf.shape(attended)[1] :], attended, training)

        rows, steps = rows_and_steps(x)
        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def compute_output_shape(self, input_shape):
        if self.active_call_mode == "regular":
            return (input_shape[0], 1, input_shape[2])
        return tuple(input_shape)

    def convert_weights(self):
        """Takes the kernels as they are now for steps in `weights_dtype`: after training, say."""
        self.attention.convert_weights()  # It may be called by itself.
        if self.built:
            self._narrow_kernels.convert(OneOpEncoderStep.dense_layers(self))
