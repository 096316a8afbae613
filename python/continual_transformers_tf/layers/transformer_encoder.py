"""Transformer encoders of any depth, on windows and on streams."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.co_re_transformer_encoder import CoReTransformerEncoder
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.composite_layer import CompositeLayer
from continual_transformers_tf.layers.continual_layer import always_partial
from continual_transformers_tf.layers.inputs import (
    WARM_UPS,
    rows_and_steps,
    step_input,
    without_keras_mask,
)
from continual_transformers_tf.layers.step_ops import layer_norm
from continual_transformers_tf.ops.stream_state import check_integer

KINDS = ("single_output", "retroactive")


@keras.saving.register_keras_serializable("continual_transformers_tf")
class TransformerEncoder(CompositeLayer, keras.layers.Layer):
    """A stack of encoder blocks that gives the newest step's output.

    Two kinds of stack meet a stream of which every step attends to the N newest (Hedegaard &
    Iosifidis, "Continual Transformers", ICLR 2023, arXiv 2201.06268):

    - "retroactive": `CoReTransformerEncoder`s, then one `CoSiTransformerEncoder`. On every window
      it is exactly the regular encoder's newest output, the paper's two-block model and deeper. The
      first block's attention is updated step by step; what is above sees a window all of whose rows
      have changed, and is computed anew, the last block for the newest row alone.
    - "single_output": a `CoSiTransformerEncoder` in every layer. A step costs one row in every
      layer, and the newest output depends on 1 + L (N - 1) steps: it is another model than the
      regular encoder, to be trained on steps, in "steps" mode from a clean state. A regular call is
      those steps' last output: attention to the N newest steps in every layer.

    Eagerly a step of kind "single_output" is one op a block. That of kind "retroactive" is many ops
    where there is more than one block: take it as a `tf.function`, which is some 20 times faster,
    and serve it as a `ct.Session`.

    Args:
        num_layers: L, the blocks.
        seq_len: N, the window.
        embed_dim, num_heads, ff_dim, dropout_rate, call_mode, key_dim, use_bias, norm_first,
            activation, epsilon: as `CoSiTransformerEncoder` has them.
        kind: "single_output" or "retroactive".
        final_norm: whether there is a layer norm after the last block. None: with `norm_first`,
            whose blocks end without one.
        warm_up: "none": in eager mode a step gives None until a stream's receptive field is full.
            "partial": the outputs of the shorter sequence.
        cache_dtype, weights_dtype: of the `CoSiTransformerEncoder`s, as these have them.
        **kwargs: `name`, `dtype` and the like.

    Attributes:
        blocks: the list of the blocks.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if a size is not a positive integer, or `kind` or `warm_up` is
            none of those above.
    """

    def __init__(
        self,
        num_layers,
        seq_len,
        embed_dim,
        num_heads,
        ff_dim,
        dropout_rate=0.1,
        call_mode="regular",
        *,
        kind="single_output",
        key_dim=None,
        use_bias=True,
        norm_first=False,
        activation="gelu",
        epsilon=1e-6,
        final_norm=None,
        warm_up="none",
        cache_dtype=None,
        weights_dtype=None,
        **kwargs,
    ):
        check_integer("num_layers", num_layers, at_least=1)
        if kind not in KINDS:
            raise ValueError(f"Expected kind to be one of {KINDS}, but got {kind!r}")
        if warm_up not in WARM_UPS:
            raise ValueError(f"Expected warm_up to be one of {WARM_UPS}, but got {warm_up!r}")
        super().__init__(**kwargs)
        block = dict(
            seq_len=seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            ff_dim=ff_dim,
            dropout_rate=dropout_rate,
            key_dim=key_dim,
            use_bias=use_bias,
            norm_first=norm_first,
            activation=activation,
            epsilon=epsilon,
        )
        self._config = {
            **block,
            "num_layers": num_layers,
            "kind": kind,
            "activation": keras.activations.serialize(keras.activations.get(activation)),
            "final_norm": final_norm,
            "warm_up": warm_up,
            "cache_dtype": cache_dtype,
            "weights_dtype": weights_dtype,
        }
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._warm_up = warm_up
        single_output = dict(cache_dtype=cache_dtype, weights_dtype=weights_dtype)
        self.blocks = []
        for i in range(num_layers):
            names = dict(name=f"block_{i}", dtype=self.dtype_policy)
            if kind == "single_output" or i == num_layers - 1:
                self.blocks.append(CoSiTransformerEncoder(**block, **single_output, **names))
            else:
                self.blocks.append(CoReTransformerEncoder(**block, **names))
        # Keras hides lists of layers from tf.train.Checkpoint.
        for block in self.blocks:
            self._track_trackable(block, block.name)
        # Those that take steps; the others are given whole windows.
        self._streaming = self.blocks if kind == "single_output" else self.blocks[:1]
        self._share_streams()
        self.final_norm = None
        if norm_first if final_norm is None else final_norm:
            self.final_norm = keras.layers.LayerNormalization(
                epsilon=epsilon, name="final_norm", dtype=self.dtype_policy
            )

    @property
    def kind(self):
        """ "single_output" or "retroactive"."""
        return self._config["kind"]

    @property
    def seq_len(self):
        """N, the window: how many of the newest steps a step attends to."""
        return self._config["seq_len"]

    @property
    def warm_up(self):
        """What a step gives while the receptive field fills: "none" or "partial"."""
        return self._warm_up

    @property
    def receptive_field(self):
        return 1 + sum(block.receptive_field - 1 for block in self._streaming)

    @property
    def delay(self):
        return sum(block.delay for block in self._streaming)

    @property
    def parts(self):
        return self._streaming

    @property
    def ready(self):
        """bool tensor `[S]`: which of the streams held have a full receptive field."""
        return self.position >= self.receptive_field

    @property
    def input_features(self):
        return self.blocks[0].input_features

    def get_config(self):
        return {**super().get_config(), **self._config}

    def build(self, input_shape):
        for block in self.blocks:
            if not block.built:
                block.build((None, self.seq_len, input_shape[-1]))
        if self.final_norm is not None:
            self.final_norm.build((None, input_shape[-1]))

    def call(self, x, training=None, streams=None, update_state=True):
        if self.active_call_mode == "regular":
            return self.call_regular(x, training)
        call = self.call_step if self.active_call_mode == "step" else self.call_steps
        return call(x, training, streams=streams, update_state=update_state)

    def call_regular(self, x, training=None):
        """The newest step's output of whole windows; the streams' state plays no part.

        Args:
            x: `(B, T, E)`, windows, oldest step first. Of kind "single_output" the newest
                `receptive_field` steps matter, and with fewer it is the output of the shorter
                sequence.
            training: whether dropout acts.

        Returns:
            `(B, 1, E)`.
        """
        x = self._input(x, "regular")
        *below, last = self.blocks
        for i, block in enumerate(below):
            mask = None
            if self.kind == "single_output":
                x = x[:, -(1 + (len(self.blocks) - i) * (self.seq_len - 1)) :]
                mask = self._band(tf.shape(x)[1])
            x = block.call_regular_rows(x, training, mask)
        if self.kind == "single_output":
            x = x[:, -self.seq_len :]
        x = last.call_regular(x, training)
        return x if self.final_norm is None else self.final_norm(x)

    def call_step(self, x, training=None, *, streams=None, update_state=True):
        """Takes one step of M streams.

        Args:
            x: `(M, E)`.
            training: whether dropout acts.
            streams, update_state: as `CoSiMultiHeadAttention.call_step` has them.

        Returns:
            `(M, E)`, or None while the receptive field fills (see `warm_up`).

        Raises:
            ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit. The
                streams then go on as if the call had not been made.
        """
        x = self._input(x, "step")
        if self.kind == "retroactive" and len(self.blocks) > 1:
            y = self.call_steps(
                tf.expand_dims(x, 1), training, streams=streams, update_state=update_state
            )
            return None if y is None else tf.squeeze(y, 1)

        def compute(step):
            ready = self._ready_steps(step)
            y = x
            with always_partial():
                for block in self._streaming:
                    # Only a layer norm can follow the last block. Nothing can fail after its op.
                    step.op_advances = block is self.blocks[-1] and step.whole is self
                    y = block.call_step(y, training, update_state=update_state)
            return self._normalized(y) if ready else None

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
        rows, steps = rows_and_steps(x)

        def compute(step):
            ready = self._ready_steps(step)
            y = x
            with always_partial():
                for block in self._streaming:
                    y = block.call_steps(y, training, update_state=update_state)
                if self.kind == "retroactive" and len(self.blocks) > 1:
                    y = self._above(y, step, training)
            y = self._normalized(y)
            if ready is step.steps or (tf.executing_eagerly() and ready == step.steps):
                return y
            return y[:, -ready:] if ready else None

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    def compute_output_shape(self, input_shape):
        if self.active_call_mode == "regular":
            return (input_shape[0], 1, input_shape[2])
        return tuple(input_shape)

    def convert_weights(self):
        """Takes the kernels as they are now for steps in `weights_dtype`: after training, say."""
        for block in self.blocks:
            if isinstance(block, CoSiTransformerEncoder):
                block.convert_weights()

    def _check_policy(self):
        super()._check_policy()
        for block in self.blocks:
            block._check_policy()

    def _input(self, x, mode):
        if mode != "regular" or self.compute_dtype != self.blocks[0].compute_dtype:
            self._check_policy()
        # The layer does not support masking, as Keras warns: no mode may heed a part of a mask.
        x = without_keras_mask(step_input("x", x, mode, self.compute_dtype))
        if not self.built:
            with tf.init_scope():
                self.build(x.shape)
                self.built = True
        return x

    def _normalized(self, x):
        return x if self.final_norm is None else layer_norm(x, self.final_norm, self.compute_dtype)

    def _band(self, steps):
        """bool `[1, T, T]`: each step attends to the N newest of those up to it."""
        step = tf.range(steps)
        age = step[:, tf.newaxis] - step
        return ((age >= 0) & (age < self.seq_len))[tf.newaxis]

    def _above(self, windows, step, training):
        """The newest outputs of the blocks above the first, of its outputs `(M, T, N, E)`."""
        shape = tf.shape(windows)
        m, t, n, features = shape[0], shape[1], self.seq_len, windows.shape[-1]
        # How many steps each stream has taken by then, [M, T].
        taken = step.position[:, tf.newaxis] + 1 + tf.range(tf.cast(t, tf.int64))
        there = tf.range(tf.constant(n, tf.int64)) >= n - taken[..., tf.newaxis]
        x, there = tf.reshape(windows, [m * t, n, features]), tf.reshape(there, [m * t, n])
        for block in self.blocks[1:]:
            x = block.call_regular(x, training, key_mask=there)
        return tf.reshape(x, [m, t, features])

    def _ready_steps(self, step):
        """How many of a step's newest tokens have an output: all, where it may not be None."""
        if self.active_warm_up == "partial":
            return step.steps
        furthest = int(step.position.numpy().max(initial=0)) + step.steps
        return max(0, min(step.steps, furthest - self.receptive_field + 1))
