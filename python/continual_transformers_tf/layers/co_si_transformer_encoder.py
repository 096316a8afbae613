"""The continual single-output transformer encoder."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.co_si_encoder_step import OneOpEncoderStep
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_step import one_op_step
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import step_input
from continual_transformers_tf.layers.step_ops import layer_norm, project
from continual_transformers_tf.ops.stream_state import check_integer


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoSiTransformerEncoder(ContinualLayer, keras.layers.Layer):
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
        norm_first: whether each layer norm is of what goes into the attention and the feed-forward
            part (pre-norm), and not of the residual sums (post-norm, as published).
        activation: of the feed-forward part, as `keras.layers.Dense` takes it. "gelu" is the real
            one, not its approximation by tanh.
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
        norm_first=False,
        activation="gelu",
        epsilon=1e-6,
        warm_up="none",
        cache_dtype=None,
        weights_dtype=None,
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
            norm_first=bool(norm_first),
            activation=keras.activations.serialize(keras.activations.get(activation)),
            epsilon=epsilon,
            warm_up=warm_up,
            cache_dtype=cache_dtype,
            weights_dtype=weights_dtype,
        )
        self.call_mode = call_mode
        self.norm_first = bool(norm_first)
        policy = dict(dtype=self.dtype_policy)
        self.attention = CoSiMultiHeadAttention(
            seq_len,
            num_heads,
            embed_dim if key_dim is None else key_dim,
            warm_up=warm_up,
            cache_dtype=cache_dtype,
            weights_dtype=weights_dtype,
            name="attention",
            **policy,
        )
        self.attention_dropout = keras.layers.Dropout(dropout_rate, **policy)
        self.attention_norm = keras.layers.LayerNormalization(epsilon=epsilon, **policy)
        self.feed_forward = keras.layers.Dense(ff_dim, activation=activation, **policy)
        self.feed_forward_output = keras.layers.Dense(embed_dim, **policy)
        self.feed_forward_dropout = keras.layers.Dropout(dropout_rate, **policy)
        self.output_norm = keras.layers.LayerNormalization(epsilon=epsilon, **policy)
        self._one_op_step = None  # Gathered at the first step that needs it.

    @property
    def seq_len(self):
        """N, the window: how many of the newest steps the newest attends to."""
        return self.attention.seq_len

    @property
    def receptive_field(self):
        return self.attention.receptive_field

    @property
    def input_features(self):
        return {"x": self._config["embed_dim"]}

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

    def call_regular(self, x, training=None):
        """The newest step's output of whole windows; the streams' state plays no part.

        Args:
            x: `(B, T, E)`, windows, oldest step first.

        Returns:
            `(B, 1, E)`.
        """
        x = self._input(x, 3)
        attended = self.attention.call_regular(
            self.attention_norm(x) if self.norm_first else x, training=training
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
        step = one_op_step(self, training, OneOpEncoderStep)
        if step is not None:
            output = step.direct(x, None, None, False, streams, update_state)
            if output is not NotImplemented:
                return output
        x = self._input(x, 2)
        if step is not None:
            return step(x, streams, update_state)
        attended = self.attention.call_step(
            self._attention_input(x), training=training, streams=streams, update_state=update_state
        )
        return None if attended is None else self._step_feed_forward(x, attended, training)

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
        x = self._input(x, 3)
        attended = self.attention.call_steps(
            self._attention_input(x), training=training, streams=streams, update_state=update_state
        )
        if attended is None:
            return None
        return self._step_feed_forward(x[:, -tf.shape(attended)[1] :], attended, training)

    def compute_output_shape(self, input_shape):
        if self.active_call_mode == "regular":
            return (input_shape[0], 1, input_shape[2])
        return tuple(input_shape)

    @property
    def ready(self):
        """bool tensor `[S]`: which of the streams held have a full window."""
        return self.attention.ready

    @property
    def _stream_state(self):
        return self.attention

    def _input(self, x, rank):
        x = step_input("x", x, rank, self.compute_dtype)
        if not self.built:
            with tf.init_scope():
                self.build(x.shape)
        return x

    def _attention_input(self, x):
        return layer_norm(x, self.attention_norm, self.compute_dtype) if self.norm_first else x

    def _step_feed_forward(self, newest, attended, training):
        """`_feed_forward` by plain ops, for steps."""
        dtype = self.compute_dtype
        if training:
            attended = self.attention_dropout(attended, training=True)
        attended = newest + attended
        if not self.norm_first:
            attended = layer_norm(attended, self.attention_norm, dtype)
        x = layer_norm(attended, self.output_norm, dtype) if self.norm_first else attended
        output = project(x, self.feed_forward, dtype, training)
        output = project(output, self.feed_forward_output, dtype, training)
        if training:
            output = self.feed_forward_dropout(output, training=True)
        output = attended + output
        return output if self.norm_first else layer_norm(output, self.output_norm, dtype)

    def _feed_forward(self, newest, attended, training):
        attended = newest + self.attention_dropout(attended, training=training)
        if not self.norm_first:
            attended = self.attention_norm(attended)
        x = self.output_norm(attended) if self.norm_first else attended
        output = self.feed_forward_output(self.feed_forward(x))
        output = attended + self.feed_forward_dropout(output, training=training)
        return output if self.norm_first else self.output_norm(output)

    def convert_weights(self):
        """Takes the kernels as they are now for steps in `weights_dtype`: after training, say."""
        if self._one_op_step is not None:
            self._one_op_step.convert_weights()

    def set_weights(self, weights):
        super().set_weights(weights)
        self.convert_weights()

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self._one_op_step = None  # Its sublayers' variables are loaded after it.
