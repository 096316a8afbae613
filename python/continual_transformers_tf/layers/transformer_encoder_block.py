"""What the continual transformer encoder blocks share."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike, rows_and_steps
from continual_transformers_tf.layers.one_input_layer import OneInputLayer
from continual_transformers_tf.layers.plain_layers import layer_norm, project
from continual_transformers_tf.layers.streaming_attention import StreamingAttention
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState, check_integer


class TransformerEncoderBlock(OneInputLayer):
    """Attention, residual, layer norm, feed-forward, residual, layer norm; or with the norms first.

    A subclass defines `_attention_class`, `call_regular` and `_step_outputs`. The arguments are
    those of `CoSiTransformerEncoder`; `attention_options` are arguments of the attention only.
    """

    _attention_class: type[StreamingAttention]

    def __init__(
        self,
        seq_len: int,
        embed_dim: int,
        num_heads: int,
        ff_dim: int,
        dropout_rate: float = 0.1,
        call_mode: str = "regular",
        *,
        key_dim: int | None = None,
        use_bias: bool = True,
        norm_first: bool = False,
        activation: Any = "gelu",
        epsilon: float = 1e-6,
        warm_up: str = "none",
        attention_options: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        check_integer("embed_dim", embed_dim, at_least=1)
        check_integer("ff_dim", ff_dim, at_least=1)
        super().__init__(**kwargs)
        self._config = dict(
            seq_len=seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            ff_dim=ff_dim,
            dropout_rate=dropout_rate,
            key_dim=key_dim,
            use_bias=bool(use_bias),
            norm_first=bool(norm_first),
            activation=keras.activations.serialize(keras.activations.get(activation)),
            epsilon=epsilon,
            warm_up=warm_up,
            **attention_options,
        )
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self.norm_first = bool(norm_first)
        policy = dict(dtype=self.dtype_policy)
        self.attention = self._attention_class(
            seq_len,
            num_heads,
            embed_dim if key_dim is None else key_dim,
            use_bias=use_bias,
            warm_up=warm_up,
            name="attention",
            **attention_options,
            **policy,
        )
        self.attention_dropout = keras.layers.Dropout(dropout_rate, **policy)
        self.attention_norm = keras.layers.LayerNormalization(epsilon=epsilon, **policy)
        self.feed_forward = keras.layers.Dense(ff_dim, activation=activation, **policy)
        self.feed_forward_output = keras.layers.Dense(embed_dim, **policy)
        self.feed_forward_dropout = keras.layers.Dropout(dropout_rate, **policy)
        self.output_norm = keras.layers.LayerNormalization(epsilon=epsilon, **policy)

    @property
    def seq_len(self) -> int:
        """N, the window: the newest steps, which attend to each other."""
        return self.attention.seq_len

    @property
    def warm_up(self) -> str:
        return self.attention.warm_up

    @property
    def receptive_field(self) -> int:
        return self.attention.receptive_field

    @property
    def input_features(self) -> dict[str, int]:
        return {"x": self._config["embed_dim"]}

    @property
    def _stream_state(self) -> StreamState:
        return self.attention._stream_state

    @property
    def _inner_layers(self) -> Sequence[ContinualLayer]:
        return [self.attention]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = self._config["embed_dim"]
        if input_shape[-1] != features:
            raise ValueError(f"Expected {features} features, embed_dim, but got {input_shape}")
        if not self.attention.built:  # It may have been called by itself.
            self.attention.build(input_shape)
        newest = (None, features)
        self.attention_norm.build(newest)
        self.feed_forward.build(newest)
        self.feed_forward_output.build((None, self._config["ff_dim"]))
        self.output_norm.build(newest)

    def call_regular_rows(
        self, x: TensorLike, training: bool | None = None, attention_mask: Any = None
    ) -> tf.Tensor:
        """Return all rows of windows, from Keras' own layers: a regular encoder's output.

        Args:
            x: `(B, T, E)`.
            training: Whether dropout acts.
            attention_mask: As in `keras.layers.MultiHeadAttention`.

        Returns:
            `(B, T, E)`.
        """
        x = self._rows_input(x, "regular")
        normal = self.attention_norm(x) if self.norm_first else x
        attended = self.attention.call_regular_rows(
            normal, normal, attention_mask=attention_mask, training=training
        )
        return self._feed_forward(x, attended, training)

    def _take_steps(
        self, mode: str, x: TensorLike, training: bool | None, streams: Any, update_state: bool
    ) -> tf.Tensor | None:
        x = self._rows_input(x, mode)
        attend = self.attention.call_step if mode == "step" else self.attention.call_steps

        def compute(step: Step) -> tf.Tensor | None:
            normal = x
            if self.norm_first:
                normal = layer_norm(x, self.attention_norm, self.compute_dtype)
            attended = attend(normal, training=training, update_state=update_state)
            return self._step_outputs(step, x, attended, training)

        rows, steps = rows_and_steps(x, mode)
        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def _step_outputs(
        self, step: Step, x: tf.Tensor, attended: tf.Tensor | None, training: bool | None
    ) -> tf.Tensor | None:
        """Return the block's outputs of a call of steps.

        Args:
            step: The `Step`.
            x: The call's input, `(M, E)` or `(M, T, E)`.
            attended: The attention's output; None while the window fills.
            training: Whether dropout acts.
        """
        raise NotImplementedError

    def _step_feed_forward(
        self, x: tf.Tensor, attended: tf.Tensor, training: bool | None
    ) -> tf.Tensor:
        """Return what `_feed_forward` does, computed by plain ops."""
        dtype = self.compute_dtype
        if training:
            attended = self.attention_dropout(attended, training=True)
        attended = x + attended
        if not self.norm_first:
            attended = layer_norm(attended, self.attention_norm, dtype)
        x = layer_norm(attended, self.output_norm, dtype) if self.norm_first else attended
        output = project(x, self.feed_forward, dtype, training)
        output = project(output, self.feed_forward_output, dtype, training)
        if training:
            output = self.feed_forward_dropout(output, training=True)
        output = attended + output
        return output if self.norm_first else layer_norm(output, self.output_norm, dtype)

    def _feed_forward(self, x: tf.Tensor, attended: tf.Tensor, training: bool | None) -> tf.Tensor:
        """Return the block's outputs, given the rows `x` of its input and the attention's output.

        A regular call uses Keras' own layers, so that it is exactly a regular encoder.
        """
        attended = x + self.attention_dropout(attended, training=training)
        if not self.norm_first:
            attended = self.attention_norm(attended)
        x = self.output_norm(attended) if self.norm_first else attended
        output = self.feed_forward_output(self.feed_forward(x))
        output = attended + self.feed_forward_dropout(output, training=training)
        return output if self.norm_first else self.output_norm(output)
