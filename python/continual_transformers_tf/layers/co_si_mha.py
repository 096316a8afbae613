"""Continual single-output multi-head attention."""

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import check_features, check_same_rows, step_input
from continual_transformers_tf.layers.step_ops import product
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.single_output import attend_steps, expand_mask
from continual_transformers_tf.ops.stream_state import check_integer

WARM_UPS = ("none", "partial")


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoSiMultiHeadAttention(ContinualLayer, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` that also answers at every step of an endless stream.

    On a window it gives the row of the newest query. Step by step it gives the same numbers at a
    fraction of the cost: the keys and values of the newest `seq_len` steps are kept in a ring, and
    a step computes only what it adds. Weights are those of `keras.layers.MultiHeadAttention`, in
    the same order; the streams' state is not among them. The algorithm is that of Hedegaard &
    Iosifidis, "Continual Transformers" (ICLR 2023, arXiv 2201.06268).

    Args:
        seq_len: N, the window: how many of the newest steps a step's query attends to. A regular
            call attends to all of the window that it is given, of whatever length.
        num_heads, ..., seed: as `keras.layers.MultiHeadAttention` has them. `attention_axes` can
            only be time, axis 1. `sliding_window` narrows the window of a step as it does that of
            a regular call. `dropout` acts in regular calls.
        single_output: whether a regular call gives only the newest query's row, `(B, 1, E)`. If
            False, it is exactly a call of `keras.layers.MultiHeadAttention`.
        warm_up: what a step gives, in eager mode, while the window fills. "none": None, as long as
            no stream of the call has a full window (rows of streams that have not are those of
            "partial"; `ready` tells them). "partial": attention over the steps seen so far, equal
            to regular attention on the shorter sequence. A graph cannot give None: there it is
            always "partial".
        call_mode: what calling the layer does: "regular", "step" or "steps".
        **kwargs: `name`, `dtype` and the like.

    Call arguments:
        As `keras.layers.MultiHeadAttention` has them, but `value` may be left out for
        self-attention. In the modes "step" and "steps" see `call_step` and `call_steps`.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if a size is not a positive integer, `attention_axes` is not
            time, or `warm_up` or `call_mode` is none of those above.
    """

    def __init__(
        self,
        seq_len,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        *,
        single_output=True,
        warm_up="none",
        call_mode="regular",
        **kwargs,
    ):
        check_integer("seq_len", seq_len, at_least=1)
        if attention_axes is not None and tuple(np.atleast_1d(attention_axes)) != (1,):
            raise ValueError(
                "Expected attention_axes to be None or 1, time: a step adds to the window along "
                f"time, and no other axis grows with the stream; but got {attention_axes!r}"
            )
        if warm_up not in WARM_UPS:
            raise ValueError(f"Expected warm_up to be one of {WARM_UPS}, but got {warm_up!r}")
        super().__init__(
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            **kwargs,
        )
        self._seq_len = int(seq_len)
        self._single_output = bool(single_output)
        self._warm_up = warm_up
        self.call_mode = call_mode
        self._stream_state = AttentionCache(
            0, num_heads, seq_len, key_dim, self._value_dim, self.compute_dtype, name="state"
        )
        self._band = None
        if sliding_window is not None and sliding_window < seq_len:
            self._band = (np.arange(seq_len) >= seq_len - sliding_window)[None, None, None]

    @property
    def seq_len(self):
        """N, the window: how many of the newest steps a query attends to."""
        return self._seq_len

    @property
    def warm_up(self):
        """What a step gives while the window fills: "none" or "partial"."""
        return self._warm_up

    @property
    def receptive_field(self):
        return self._seq_len

    def get_config(self):
        config = super().get_config()
        axes = self._attention_axes  # Keras' build makes it a tuple.
        return {
            **config,
            "seq_len": self._seq_len,
            "attention_axes": None if axes is None else 1,
            "flash_attention": self._flash_attention,
            "single_output": self._single_output,
            "warm_up": self._warm_up,
        }

    # Building and calling.

    def build(self, query_shape, value_shape=None, key_shape=None):
        """Makes the weights.

        Args:
            query_shape: `(B, T, E)`, or of a step, `(B, E)`.
            value_shape, key_shape: likewise; None: as query_shape, and as value_shape.
        """
        value_shape = query_shape if value_shape is None else value_shape
        key_shape = value_shape if key_shape is None else key_shape
        shapes = [
            (shape[0], self._seq_len, shape[1]) if len(shape) == 2 else tuple(shape)
            for shape in (query_shape, value_shape, key_shape)
        ]
        for name, shape in zip(("query", "value", "key"), shapes, strict=True):
            if len(shape) != 3:
                raise ValueError(
                    f"Expected {name} of shape (B, T, E), or (B, E) for a step, but got {shape}"
                )
        super().build(*shapes)
        self._features = tuple(shape[-1] for shape in shapes)

    def call(
        self,
        query,
        value=None,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        streams=None,
        update_state=True,
    ):
        if self.active_call_mode == "regular":
            return self.call_regular(
                query,
                value,
                key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
            )
        if any(mask is not None for mask in (query_mask, value_mask, key_mask)):
            raise ValueError(
                "Expected no query_mask, value_mask or key_mask in a step, whose mask is over the "
                "window: give attention_mask, [N], [M, N] or [M, H, N]"
            )
        call = self.call_step if self.active_call_mode == "step" else self.call_steps
        return call(
            query,
            value,
            key,
            attention_mask,
            return_attention_scores,
            training,
            streams=streams,
            update_state=update_state,
        )

    def call_regular(
        self,
        query,
        value=None,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        """Attention on whole windows; the streams' state plays no part.

        Args:
            query: `(B, T, E)`, windows, oldest step first.
            value, key, ..., use_causal_mask: as `keras.layers.MultiHeadAttention` has them.

        Returns:
            `(B, 1, E)`, the newest query's row; with `single_output=False` all, `(B, T, E)`. With
            return_attention_scores also the scores, `(B, H, 1, S)` or `(B, H, T, S)`.
        """
        query = keras.ops.convert_to_tensor(query)
        value = query if value is None else keras.ops.convert_to_tensor(value)
        for name, x in (("query", query), ("value", value)):
            if len(x.shape) != 3:
                raise ValueError(f"Expected {name} of shape (B, T, E), but got {tuple(x.shape)}")
        self._ensure_built(query, value, key)
        masks = dict(
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
        )
        plain = (
            all(mask is None for mask in masks.values())
            and not use_causal_mask
            and self._sliding_window is None
        )
        # With nothing that depends on a query's place among the others, the others need not be
        # computed: N times less attention.
        newest_only = self._single_output and plain
        result = super().call(
            query[:, -1:] if newest_only else query,
            value,
            key,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
            **masks,
        )
        if not self._single_output or newest_only:
            return result
        if return_attention_scores:
            return result[0][:, -1:], result[1][:, :, -1:]
        return result[:, -1:]

    def call_step(
        self,
        query,
        value=None,
        key=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        *,
        streams=None,
        update_state=True,
    ):
        """Takes one step of M streams.

        Args:
            query: `(M, E)`, the newest step of each stream.
            value, key: `(M, Ev)`, `(M, Ek)`; None: the query, and the value.
            attention_mask: bool over the window, oldest step first: `[N]`, `[M, N]` or `[M, H, N]`.
            return_attention_scores: whether to return the scores too.
            training: whether this is training: a step has no dropout, and refuses to train with it.
            streams: integers `[M]`, which stream each row belongs to, in any order, each once.
                None: row i is stream i, and there is made room for M streams.
            update_state: if False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, E)`, or None while the window fills (see `warm_up`). With return_attention_scores a
            pair with the scores, `(M, H, N)`, oldest step first, or None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit. The
                streams then go on as if the call had not been made.
        """
        outputs = self._take_steps(
            2, query, value, key, attention_mask, training, streams, update_state,
            return_attention_scores,
        )  # fmt: skip
        return outputs if return_attention_scores else outputs[0]

    def call_steps(
        self,
        query,
        value=None,
        key=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        *,
        streams=None,
        update_state=True,
    ):
        """Takes T steps of M streams: the same outputs and state as T calls of `call_step`.

        Args:
            query: `(M, T, E)`, the T newest steps of each stream, oldest first.
            value, key: `(M, T, Ev)`, `(M, T, Ek)`; None: the query, and the value.
            attention_mask: as `call_step` has it, the same for every step; or `[M, H, T, N]`.
            return_attention_scores, training, streams, update_state: as `call_step` has them.

        Returns:
            `(M, T', E)`: in eager mode with `warm_up="none"` the outputs of the T' newest steps,
            those with a full window in the stream that has come furthest, or None where there is
            none; otherwise T' = T. With return_attention_scores a pair with the scores,
            `(M, H, T', N)`, or None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        outputs = self._take_steps(
            3, query, value, key, attention_mask, training, streams, update_state,
            return_attention_scores,
        )  # fmt: skip
        return outputs if return_attention_scores else outputs[0]

    def _take_steps(
        self, rank, query, value, key, attention_mask, training, streams, update_state, with_scores
    ):
        """One step (rank 2) or several (rank 3). Returns (outputs, scores), or (None, None)."""
        if training and self._dropout > 0:
            raise ValueError(
                "Expected training=False in a step, which has no dropout, but got training=True "
                f"with dropout={self._dropout}: train on windows, by regular calls"
            )
        dtype = self.compute_dtype
        query = step_input("query", query, rank, dtype)
        value = query if value is None else step_input("value", value, rank, dtype)
        key = value if key is None else step_input("key", key, rank, dtype)
        check_same_rows(query=query, value=value, key=key)
        self._ensure_built(query, value, key)
        for name, x, size in zip(
            ("query", "value", "key"), (query, value, key), self._features, strict=True
        ):
            check_features(name, x, size)
        if rank == 2:
            one = query
            query = tf.expand_dims(one, 1)
            value = query if value is one else tf.expand_dims(value, 1)
            key = query if key is one else tf.expand_dims(key, 1)
        cache = self._stream_state
        mask = expand_mask(attention_mask, query, cache)
        if self._band is not None:
            band = tf.convert_to_tensor(self._band)
            mask = band if mask is None else mask & band
        streams = cache.streams_of_call(
            streams, tf.shape(query)[0] if query.shape[0] is None else query.shape[0]
        )
        attended, scores, steps_taken = attend_steps(
            product(query, self._query_dense, dtype),
            product(key, self._key_dense, dtype),
            product(value, self._value_dense, dtype),
            cache,
            streams=streams,
            attention_mask=mask,
            scale=self._inverse_sqrt_key_dim,
            return_attention_scores=with_scores,
            update_state=update_state,
        )
        if self._use_gate:
            attended *= tf.sigmoid(product(query, self._gate_dense, dtype))
        if self._warm_up == "none" and tf.executing_eagerly():
            steps = query.shape[1]
            furthest = steps_taken.numpy().max(initial=0)
            ready = max(0, min(steps, int(furthest) - self._seq_len + 1))
            if ready == 0:
                return None, None
            if ready < steps:
                attended, scores = attended[:, steps - ready :], scores[:, :, steps - ready :]
        output = product(attended, self._output_dense, dtype, axes=2)
        if rank == 2:
            output = tf.squeeze(output, 1)
        if with_scores:
            return output, tf.squeeze(scores, 2) if rank == 2 else scores
        return output, None

    def _ensure_built(self, query, value, key):
        if not self.built:
            # Whatever graph is being traced, the weights are made outside it.
            with tf.init_scope():
                self.build(query.shape, value.shape, (value if key is None else key).shape)

    # Symbolic shapes, and masks.

    def compute_mask(self, inputs, previous_mask):
        if previous_mask is None or self.active_call_mode != "regular" or not self._single_output:
            return previous_mask
        return previous_mask[:, -1:]

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        lead = tuple(query_shape[:-1])
        if self.active_call_mode == "regular" and self._single_output:
            lead = (lead[0], 1)
        return lead + tuple(self._output_shape or query_shape[-1:])

    def compute_output_spec(
        self, query, value=None, key=None, *args, return_attention_scores=False, **kwargs
    ):
        shape = self.compute_output_shape(query.shape)
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        heads = (query.shape[0], self._num_heads)
        if self.active_call_mode == "regular":
            value = query if value is None else value
            scores = (*heads, shape[1], value.shape[1])
        else:
            scores = (*heads, *query.shape[1:-1], self._seq_len)
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)

    @property
    def ready(self):
        """bool tensor `[S]`: which of the streams held have a full window."""
        return self._stream_state.ready
