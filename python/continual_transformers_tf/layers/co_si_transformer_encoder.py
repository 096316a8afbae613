"""The continual single-output transformer encoder."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.fused_step import FusedStepLayer
from continual_transformers_tf.layers.inputs import TensorLike, check_features
from continual_transformers_tf.layers.narrow_kernels import NarrowKernels
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.ops.layer_step import ENCODER_STEP
from continual_transformers_tf.ops.step import Step

# The activations that the fused op knows, and its names for them. A step of a block with any other
# is several ops.
FUSED_ACTIVATIONS = {
    keras.activations.gelu: "gelu",
    keras.activations.relu: "relu",
    keras.activations.linear: "linear",
}


@registered
class CoSiTransformerEncoder(FusedStepLayer, TransformerEncoderBlock):
    """A transformer encoder block that returns the newest step's output, on windows and streams.

    It computes attention, residual, layer norm, feed-forward, residual and layer norm of the newest
    step only: continual single-output attention needs no other (Hedegaard et al., "Continual
    Transformers", ICLR 2023, arXiv 2201.06268). A step is one fused op, except in training and with
    activations other than "gelu", "relu" and "linear".

    Args:
        seq_len: N, the window: how many of the newest steps a step attends to. A regular call
            attends to its whole window, of any length.
        embed_dim: E, the features of input and output.
        num_heads: H.
        ff_dim: F, the features between the two layers of the feed-forward part.
        dropout_rate: The rate of the dropout before each residual. It acts if `training` is true.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        key_dim: The size of each head's keys and values. None: embed_dim, as in the original
            package. Most transformers have embed_dim // num_heads, so that all heads together have
            embed_dim features, and attention has a num_heads-th of the weights.
        use_bias: Whether the attention's layers have biases.
        norm_first: Whether the layer norms are applied to the inputs of the attention and of the
            feed-forward part (pre-norm), and not to the residual sums (post-norm, as published).
        activation: The activation of the feed-forward part, as in `keras.layers.Dense`. "gelu" is
            the exact one, not its approximation by tanh. With any but "gelu", "relu" and "linear" a
            step in TensorFlow is many ops. A `ct.Session` is as fast with all of them.
        epsilon: The epsilon of the layer norms. `keras.layers.LayerNormalization` has 1e-3.
        warm_up, cache_dtype, weights_dtype: As in `CoSiMultiHeadAttention`. `weights_dtype` is also
            that of the feed-forward part.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Attributes:
        attention: The block's `CoSiMultiHeadAttention`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if a size is not a positive integer.
    """

    _attention_class = CoSiMultiHeadAttention
    _fused_op = ENCODER_STEP

    def __init__(
        self,
        seq_len: int,
        embed_dim: int,
        num_heads: int,
        ff_dim: int,
        dropout_rate: float = 0.1,
        call_mode: str = "regular",
        *,
        cache_dtype: str | None = None,
        weights_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
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
        self._narrow_kernels = NarrowKernels()

    @property
    def weights_dtype(self) -> str | None:
        return self.attention.weights_dtype

    def call_regular(
        self,
        x: TensorLike,
        training: bool | None = None,
        key_mask: TensorLike | None = None,
    ) -> tf.Tensor:
        """Return the newest step's output of whole windows. This does not use the streams' state.

        Args:
            x: `(B, T, E)`, windows, oldest step first.
            training: Whether dropout acts.
            key_mask: bool `(B, T)`, the steps that can be attended to. None: all.

        Returns:
            `(B, 1, E)`.
        """
        x = self._rows_input(x, "regular")
        attended = self.attention.call_regular(
            self.attention_norm(x) if self.norm_first else x, training=training, key_mask=key_mask
        )
        return self._feed_forward(x[:, -1:], attended, training)

    def _take_steps(
        self, mode: str, x: TensorLike, training: bool | None, streams: Any, update_state: bool
    ) -> tf.Tensor | None:
        fused_step = self._step_as_one_op(training, x) if mode == "step" else None
        if fused_step is None:
            return super()._take_steps(mode, x, training, streams, update_state)
        x = self._rows_input(x, mode)
        check_features("x", x, self._config["embed_dim"])
        first_output = self._first_output if tf.executing_eagerly() else 0
        (output,) = fused_step(self, (x,), (), first_output, streams, update_state)
        return output

    def _step_outputs(
        self, step: Step, x: tf.Tensor, attended: tf.Tensor | None, training: bool | None
    ) -> tf.Tensor | None:
        if attended is None:
            return None
        if x.shape.rank == 3:
            x = x[:, -tf.shape(attended)[1] :]
        return self._step_feed_forward(x, attended, training)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if self.active_call_mode == "regular":
            return (input_shape[0], 1, input_shape[2])
        return tuple(input_shape)

    # The fused op of a step.

    def _dense_layers(self) -> tuple[keras.layers.Layer, ...]:
        return (*self.attention._dense_layers(), self.feed_forward, self.feed_forward_output)

    def _fused_weights(self, dense_weights: list[tf.Variable]) -> list[tf.Variable]:
        *attention, w1, b1, w2, b2 = dense_weights
        before, after = (
            [norm.gamma.value, norm.beta.value] for norm in (self.attention_norm, self.output_norm)
        )
        return [*attention, *before, w1, b1, w2, b2, *after]

    def _fused_attributes(self) -> dict[str, Any] | None:
        activation = self.feed_forward.activation
        names = [name for known, name in FUSED_ACTIVATIONS.items() if known is activation]
        if not names:
            return None
        # The op's attributes are float32. A float64 takes two.
        epsilon = self.attention_norm.epsilon
        high = float(np.float32(epsilon))
        return {
            "use_bias": self.attention._use_bias,
            "norm_first": self.norm_first,
            "activation": names[0],
            "epsilon": high,
            "epsilon_low": epsilon - high,
        }
