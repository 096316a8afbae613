"""What the continual transformer encoder blocks have in common."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import step_input, without_keras_mask
from continual_transformers_tf.layers.step_ops import layer_norm, project
from continual_transformers_tf.ops.stream_state import check_integer


class TransformerEncoderBlock(ContinualLayer, keras.layers.Layer):
    """Attention, residual, layer norm, feed-forward, residual, layer norm; or with the norms first.

    A block gives `make_attention`, the class of its attention, and the calls of the three modes.
    Its arguments are those of `CoSiTransformerEncoder`, but for those of the attention alone.
    """

    def __init__(
        self,
        seq_len,
        embed_dim,
        num_heads,
        ff_dim,
        dropout_rate=0.1,
        call_mode="regular",
        *,
        key_dim=None,
        use_bias=True,
        norm_first=False,
        activation="gelu",
        epsilon=1e-6,
        warm_up="none",
        attention_options,
        **kwargs,
    ):
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
        self.attention = self.make_attention(
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
    def seq_len(self):
        """N, the window: the newest steps, which attend to each other."""
        return self.attention.seq_len

    @property
    def warm_up(self):
        """What a step gives while the window fills: "none" or "partial"."""
        return self.attention.warm_up

    @property
    def receptive_field(self):
        return self.attention.receptive_field

    @property
    def input_features(self):
        return {"x": self._config["embed_dim"]}

    @property
    def _stream_state(self):
        return self.attention._stream_state

    @property
    def ready(self):
        """bool tensor `[S]`: which of the streams held have a full window."""
        return self.attention.ready

    def get_config(self):
        return {**super().get_config(), **self._config}

    def build(self, input_shape):
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

    def call(self, x, training=None, streams=None, update_state=True):
        if self.active_call_mode == "regular":
            return self.call_regular(x, training)
        call = self.call_step if self.active_call_mode == "step" else self.call_steps
        return call(x, training, streams=streams, update_state=update_state)

    def call_regular_rows(self, x, training=None, attention_mask=None):
        """All rows of windows, by Keras' own layers: a regular encoder with these weights.

        Args:
            x: `(B, T, E)`.
            attention_mask: as `keras.layers.MultiHeadAttention` has it.

        Returns:
            `(B, T, E)`.
        """
        x = self._input(x, "regular")
        normal = self.attention_norm(x) if self.norm_first else x
        attended = keras.layers.MultiHeadAttention.call(
            self.attention, normal, normal, attention_mask=attention_mask, training=training
        )
        return self._feed_forward(x, attended, training)

    def _check_policy(self):
        super()._check_policy()
        self.attention._check_policy()

    def _input(self, x, mode):
        if mode != "regular" or self.compute_dtype != self.attention.compute_dtype:
            self._check_policy()
        # The layer does not support masking, as Keras warns: no mode may heed a part of a mask.
        x = without_keras_mask(step_input("x", x, mode, self.compute_dtype))
        if not self.built:
            with tf.init_scope():
                self.build(x.shape)
        return x

    def _attention_input(self, x):
        return layer_norm(x, self.attention_norm, self.compute_dtype) if self.norm_first else x

    def _step_feed_forward(self, x, attended, training):
        """`_feed_forward` by plain ops, for steps."""
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

    def _feed_forward(self, x, attended, training):
        """What comes after the attention, of rows `x` of the block's input."""
        attended = x + self.attention_dropout(attended, training=training)
        if not self.norm_first:
            attended = self.attention_norm(attended)
        x = self.output_norm(attended) if self.norm_first else attended
        output = self.feed_forward_output(self.feed_forward(x))
        output = attended + self.feed_forward_dropout(output, training=training)
        return output if self.norm_first else self.output_norm(output)
