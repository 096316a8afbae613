"""Continual single-output multi-head attention."""

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.co_si_regular import at_query_index, attend_windows
from continual_transformers_tf.layers.co_si_step import OneOpStep, one_op_step
from continual_transformers_tf.layers.co_si_steps import take_steps
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.from_regular import co_si_from_regular
from continual_transformers_tf.layers.inputs import (
    WARM_UPS,
    checked_cache_dtype,
    checked_weights_dtype,
)
from continual_transformers_tf.layers.narrow_kernels import NarrowKernels
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.stream_state import check_integer

TIME_AXES = ((1,), (-2,))


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
            only be time, axis 1, but where no step is meant, with `single_output=False` and
            `call_mode="regular"`. `sliding_window` narrows the window of a step as it does that of
            a regular call. `flash_attention` plays no part in a step.
        query_index: whose output a step gives, as an index into the window, in [-N, N - 1]. -1: the
            newest step's. Any other is that of an older step, which so sees what came after it;
            its query is kept until then.
        single_output: whether a regular call gives only the row of the query at `query_index`,
            `(B, 1, E)`. If False, it is exactly a call of `keras.layers.MultiHeadAttention`.
        warm_up: what a step gives, in eager mode, while the window fills. "none": None, as long as
            no stream of the call has a full window (rows of streams that have not are those of
            "partial"; `ready` tells them). "partial": attention over the steps seen so far, equal
            to regular attention on the shorter sequence, as soon as that has a query at
            `query_index`. A graph cannot give None: there it is always "partial", and gives the
            output of an attention to nothing where there is no such query yet.
        cache_dtype: what keys and values are kept in. None: the compute dtype. Under a compute
            dtype of float32, "bfloat16" or "float16" halve the ring and round every key and value
            as it comes: with those of order one, outputs moved by 0.3 % and by 0.04 % at the most
            (`tests/test_co_si_mha_dtypes.py` holds 1 % and 0.15 %).
        weights_dtype: what kernels are kept in for a step that is one fused op. None: the layer's
            own variables. Under float32, "bfloat16" halves what a step reads of them: a copy is
            made at the first such step. It is written again by `set_weights` of this layer or of a
            layer of this package around it, when Keras loads a file of weights, and by
            `convert_weights` (of a model `ct.convert_weights`). Call the last after anything else
            that changes weights: training, a Keras model's `set_weights`, the restore of a
            `tf.train.Checkpoint`. Functions traced before see the new copy too. With projections
            of order one, outputs moved by 0.23 % at the most (`tests/test_co_si_mha_step.py` holds
            0.4 %). All else uses the layer's own.
        call_mode: what calling the layer does: "regular", "step" or "steps".
        **kwargs: `name`, `dtype` and the like.

    Call arguments:
        As `keras.layers.MultiHeadAttention` has them, but `value` may be left out for
        self-attention. In the modes "step" and "steps" see `call_step` and `call_steps`.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if a size is not a positive integer, `attention_axes` is not
            time, `query_index` is outside the window, or `warm_up`, `cache_dtype` or `call_mode` is
            none of those above.
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
        query_index=-1,
        single_output=True,
        warm_up="none",
        cache_dtype=None,
        weights_dtype=None,
        call_mode="regular",
        **kwargs,
    ):
        check_integer("seq_len", seq_len, at_least=1)
        check_integer("query_index", query_index, at_least=-seq_len)
        if query_index >= seq_len:
            raise ValueError(
                f"Expected query_index in [-seq_len, seq_len - 1], an index into the window of "
                f"{seq_len} steps, but got {query_index}"
            )
        along_time = attention_axes is None or tuple(np.atleast_1d(attention_axes)) in TIME_AXES
        if not along_time and (single_output or call_mode != "regular"):
            raise ValueError(
                "Expected attention_axes to be None or 1, time: a step adds to the window along "
                f"time, and no other axis grows with the stream; but got {attention_axes!r}. (With "
                'single_output=False and call_mode="regular" other axes are as in Keras.)'
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
        self._query_index = int(query_index)
        self._single_output = bool(single_output)
        self._warm_up = warm_up
        self._cache_dtype = checked_cache_dtype(cache_dtype, self.compute_dtype)
        self._weights_dtype = checked_weights_dtype(weights_dtype, self.compute_dtype)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._one_op_step = None  # Gathered at the first step that needs it.
        self._narrow_kernels = NarrowKernels()
        # Why no step can be taken, where the layer is only Keras' own.
        self._no_steps = None if along_time else f"attention_axes={attention_axes!r}"
        self._stream_state = AttentionCache(
            0,
            num_heads,
            seq_len,
            key_dim,
            self._value_dim,
            self._cache_dtype or self.compute_dtype,
            name="state",
            extra_rows=self._waiting_rows() if self.delay > 0 else None,
        )

    def _waiting_rows(self):
        """What is kept of queries that wait for their turn: of each stream, `delay` steps."""
        heads, dtype = (self.delay, self._num_heads), self.compute_dtype
        rows = {"query": ((*heads, self._key_dim), dtype), "query_mask": ((self.delay,), "bool")}
        if self._use_gate:
            rows["gate"] = ((*heads, self._value_dim), dtype)
        return rows

    @property
    def seq_len(self):
        """N, the window: how many of the newest steps a query attends to."""
        return self._seq_len

    @property
    def weights_dtype(self):
        """What a step's kernels are kept in: None for the layer's own, or "bfloat16"."""
        return self._weights_dtype

    @property
    def warm_up(self):
        """What a step gives while the window fills: "none" or "partial"."""
        return self._warm_up

    @property
    def receptive_field(self):
        return self._seq_len

    @property
    def delay(self):
        return (self._seq_len - 1 if self._query_index >= 0 else -1) - self._query_index

    @property
    def input_features(self):
        return dict(zip(("query", "value", "key"), self._features, strict=True))

    def get_config(self):
        return {
            **super().get_config(),
            "seq_len": self._seq_len,
            "flash_attention": self._flash_attention,
            "query_index": self._query_index,
            "single_output": self._single_output,
            "warm_up": self._warm_up,
            "cache_dtype": self._cache_dtype,
            "weights_dtype": self._weights_dtype,
        }

    @classmethod
    def from_regular(cls, layer, seq_len, **options):
        """A layer that streams with the weights of a `keras.layers.MultiHeadAttention`.

        Args:
            layer: the Keras layer; built, or there are no weights to take.
            seq_len: N, the window.
            **options: further arguments of the constructor. Those that Keras' layer has too are its
                own where they are left out, its name among them.

        Returns:
            A `CoSiMultiHeadAttention`. Its weights are copies.

        Raises:
            ValueError: if the layer is not a built `keras.layers.MultiHeadAttention`, or one whose
                weights or computation are others than Keras': quantized, with low-rank additions,
                or a subclass with an attention of its own.
        """
        return co_si_from_regular(cls, layer, seq_len, options)

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
            if len(shape) == 3:
                continue
            if self._single_output:
                raise ValueError(
                    f"Expected {name} of shape (B, T, E), or (B, E) for a step, but got {shape}"
                )
            self._no_steps = self._no_steps or f"{name} of shape {shape}"
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
        mask = getattr(query, "_keras_mask", None)
        if value is None and value_mask is None:
            # Keras fills in the masks that come with its arguments, and value is none of them.
            value_mask = mask
        if query_mask is mask:
            # Keras' mask of a step hides its key. The row of its query is that of the others.
            query_mask = None
        arguments = dict(
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )
        if self.active_call_mode == "regular":
            return self.call_regular(query, value, key, **arguments)
        call = self.call_step if self.active_call_mode == "step" else self.call_steps
        outputs = call(query, value, key, **arguments, streams=streams, update_state=update_state)
        self._put_mask(mask, outputs[0] if return_attention_scores else outputs)
        return outputs

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
            `(B, 1, E)`, the row of the query at `query_index`; with `single_output=False` all,
            `(B, T, E)`. With return_attention_scores also the scores, `(B, H, 1, S)` or
            `(B, H, T, S)`.
        """
        return attend_windows(
            self,
            super().call,
            query,
            value,
            key,
            return_attention_scores,
            training,
            use_causal_mask,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
        )

    def call_step(
        self,
        query,
        value=None,
        key=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        *,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        use_causal_mask=False,
        streams=None,
        update_state=True,
    ):
        """Takes one step of M streams.

        Args:
            query: `(M, E)`, the newest step of each stream.
            value, key: `(M, Ev)`, `(M, Ek)`; None: the query, and the value.
            attention_mask: bool over the window, oldest step first: `[N]`, `[M, N]` or `[M, H, N]`.
            return_attention_scores: whether to return the scores too.
            training: whether this is training: dropout then acts on the scores, in plain
                TensorFlow. A graph that is differentiated from outside is to be called with True.
            query_mask: bool `[M]`; where False, the query attends to nothing.
            value_mask, key_mask: bool `[M]`; where either is False, the stream advances, but the
                step is never attended to, now or later: a gap in a recording.
            use_causal_mask: whether a query attends to no later step; of the newest there is none.
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
        step = one_op_step(self, training, query)
        if step is not None:
            outputs = step(
                return_attention_scores, query, value, key, attention_mask, query_mask,
                value_mask, key_mask, use_causal_mask, streams, update_state,
            )  # fmt: skip
        else:
            outputs = take_steps(
                self, 2, query, value, key, attention_mask, query_mask, value_mask, key_mask,
                use_causal_mask, return_attention_scores, training, streams, update_state,
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
        query_mask=None,
        value_mask=None,
        key_mask=None,
        use_causal_mask=False,
        streams=None,
        update_state=True,
    ):
        """Takes T steps of M streams: the same outputs and state as T calls of `call_step`.

        Args:
            query: `(M, T, E)`, the T newest steps of each stream, oldest first.
            value, key: `(M, T, Ev)`, `(M, T, Ek)`; None: the query, and the value.
            attention_mask: as `call_step` has it, the same for every step; or `[M, H, T, N]`.
            query_mask, value_mask, key_mask: bool `[M, T]`, as `call_step` has them.
            return_attention_scores, training, use_causal_mask, streams, update_state: as
                `call_step` has them.

        Returns:
            `(M, T', E)`: in eager mode with `warm_up="none"` the outputs of the T' newest steps,
            those with a full window in the stream that has come furthest, or None where there is
            none; otherwise T' = T. With return_attention_scores a pair with the scores,
            `(M, H, T', N)`, or None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        outputs = take_steps(
            self, 3, query, value, key, attention_mask, query_mask, value_mask, key_mask,
            use_causal_mask, return_attention_scores, training, streams, update_state,
        )  # fmt: skip
        return outputs if return_attention_scores else outputs[0]

    def convert_weights(self):
        """Takes the kernels as they are now for steps in `weights_dtype`: after training, say."""
        if self.built:
            self._narrow_kernels.convert(OneOpStep.dense_layers(self))

    def _ensure_built(self, query, value, key):
        if not self.built:
            # Whatever graph is being traced, the weights are made outside it.
            with tf.init_scope():
                self.build(query.shape, value.shape, (value if key is None else key).shape)

    # Symbolic shapes, and masks.

    def compute_mask(self, inputs, previous_mask):
        # Keras puts it on whatever a call has returned. Of steps that may be None, or fewer than
        # there were: `call` does it.
        if previous_mask is None or self.active_call_mode != "regular":
            return None
        return at_query_index(self, previous_mask, 1) if self._single_output else previous_mask

    def _put_mask(self, mask, output):
        """Puts Keras' mask of this call's steps on their output."""
        # A delayed output's mask came with a step of an earlier call, and was not kept.
        if mask is None or output is None or self.delay > 0:
            return
        if mask.shape.rank == 2:
            mask = mask[:, -tf.shape(output)[1] :]
        output._keras_mask = mask

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        value_shape = query_shape if value_shape is None else value_shape
        super().compute_output_shape(query_shape, value_shape, key_shape)  # Its checks.
        lead = tuple(query_shape[:-1])
        if self.active_call_mode == "regular" and self._single_output:
            lead = (lead[0], 1)
        return lead + tuple(self._output_shape or query_shape[-1:])

    def compute_output_spec(
        self, query, value=None, key=None, *args, return_attention_scores=False, **kwargs
    ):
        inputs = [x.shape if x is not None else None for x in (query, value, key)]
        shape = self.compute_output_shape(*inputs)
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
