"""Continual retroactive multi-head attention."""

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.co_re_steps import take_all_steps
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.from_regular import co_si_from_regular
from continual_transformers_tf.layers.inputs import WARM_UPS, expect_given, without_keras_mask
from continual_transformers_tf.ops.retroactive import check_algorithm
from continual_transformers_tf.ops.retroactive_cache import RetroactiveCache
from continual_transformers_tf.ops.stream_state import check_integer

TIME_AXES = ((1,), (-2,))


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoReMultiHeadAttention(ContinualLayer, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` whose every output each step of a stream updates.

    On a window it is exactly Keras' layer. Step by step it gives the same numbers for the window of
    the newest `seq_len` steps, all N rows of it, at a cost that grows with N and not with N²: each
    kept row gains the new key and loses the oldest. Weights are those of
    `keras.layers.MultiHeadAttention`, in the same order; the streams' state is not among them. The
    algorithm is that of Hedegaard & Iosifidis, "Continual Transformers" (ICLR 2023, arXiv
    2201.06268), made stable for logits of any size (docs/co_re_mha.md).

    Args:
        seq_len: N, the window: the newest steps, which attend to each other. A regular call takes
            windows of any length.
        num_heads, ..., seed: as `keras.layers.MultiHeadAttention` has them. `attention_axes` other
            than time, axis 1, are for regular calls only. With a `sliding_window` narrower than
            seq_len a step computes all rows anew, in plain TensorFlow. `flash_attention` plays no
            part in a step.
        warm_up: what a step gives, in eager mode, while the window fills. "none": None, as long as
            no stream of the call has a full window. "partial": attention among the steps seen so
            far, in the newest rows; the others, of steps that were never taken, are zeros. A graph
            cannot give None: there it is always "partial".
        algorithm: of a step: "update", "recompute" (each row anew, from the rings), or "auto":
            whichever is faster at these sizes. The results are equal but for rounding.
        call_mode: what calling the layer does: "regular", "step" or "steps".
        **kwargs: `name`, `dtype` and the like. Layers of 16-bit dtypes keep their streams and
            attend in float32, and return their own dtype.

    Call arguments:
        As `keras.layers.MultiHeadAttention` has them, but `value` may be left out for
        self-attention. In the modes "step" and "steps" see `call_step` and `call_steps`.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if a size is not a positive integer, or `warm_up`, `algorithm`
            or `call_mode` is none of those above; if there is a `cache_dtype`; or if `call_mode` is
            not "regular" and `attention_axes` is not time.
    """

    gives_windows = True

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
        warm_up="none",
        algorithm="auto",
        call_mode="regular",
        **kwargs,
    ):
        check_integer("seq_len", seq_len, at_least=1)
        check_algorithm(algorithm)
        if kwargs.pop("cache_dtype", None) is not None:
            raise ValueError(
                "Expected no cache_dtype, which CoSiMultiHeadAttention has: beside its rings "
                "retroactive attention keeps sums, in float64, that would outweigh them"
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
        self._warm_up = warm_up
        self._algorithm = algorithm
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        along_time = attention_axes is None or tuple(np.atleast_1d(attention_axes)) in TIME_AXES
        # Why no step can be taken, where the layer is only Keras' own.
        self._no_steps = None if along_time else f"attention_axes={attention_axes!r}"
        if not along_time and call_mode != "regular":
            raise ValueError(
                f'Expected call_mode to be "regular" with {self._no_steps}: a step adds to the '
                f"window along time, axis 1; but got {call_mode!r}"
            )
        gate = ((max(1, seq_len - 1), num_heads, self._value_dim), self.compute_dtype)
        self._stream_state = RetroactiveCache(
            0,
            num_heads,
            seq_len,
            key_dim,
            self._value_dim,
            "float64" if self.compute_dtype == "float64" else "float32",
            name="state",
            extra_rows={"gate": gate} if use_gate else None,
        )

    @property
    def seq_len(self):
        """N, the window: the newest steps, which attend to each other."""
        return self._seq_len

    @property
    def warm_up(self):
        """What a step gives while the window fills: "none" or "partial"."""
        return self._warm_up

    @property
    def algorithm(self):
        """What a step computes its rows by: "auto", "update" or "recompute"."""
        return self._algorithm

    @property
    def receptive_field(self):
        return self._seq_len

    @property
    def input_features(self):
        return dict(zip(("query", "value", "key"), self._features, strict=True))

    @property
    def ready(self):
        """bool tensor `[S]`: which of the streams held have a full window."""
        return self._stream_state.ready

    def get_config(self):
        return {
            **super().get_config(),
            "seq_len": self._seq_len,
            "flash_attention": self._flash_attention,
            "warm_up": self._warm_up,
            "algorithm": self._algorithm,
        }

    @classmethod
    def from_regular(cls, layer, seq_len, **options):
        """A layer that streams with the weights of a `keras.layers.MultiHeadAttention`.

        The arguments, and what is refused, are those of `CoSiMultiHeadAttention.from_regular`.
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
            if len(shape) != 3:
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
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
        )
        masks = dict(value_mask=value_mask, key_mask=key_mask, training=training)
        if self.active_call_mode == "regular":
            return self.call_regular(query, value, key, **masks, **arguments)
        call = self.call_step if self.active_call_mode == "step" else self.call_steps
        return call(
            query, value, key, **masks, **arguments, streams=streams, update_state=update_state
        )

    def call_regular(self, query, value=None, key=None, **arguments):
        """Attention on whole windows, as Keras' layer; the streams' state plays no part.

        A mask that Keras put on the query's tensor is left out: only mask arguments count.

        Args:
            query: `(B, T, E)`, windows, oldest step first.
            value, key: likewise; None: the query, and the value.
            **arguments: as `keras.layers.MultiHeadAttention` has them.

        Returns:
            `(B, T, E)`. With return_attention_scores also the scores, `(B, H, T, S)`.
        """
        expect_given("query", query)
        # Keras reads the query's mask from the tensor; a step has none.
        query = without_keras_mask(keras.ops.convert_to_tensor(query))
        value = query if value is None else keras.ops.convert_to_tensor(value)
        self._ensure_built(query, value, key)
        return super().call(query, value, key, **arguments)

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

        With `attention_mask`, `use_causal_mask` or `return_attention_scores`, all rows are computed
        anew, in plain TensorFlow: what holds for one call alone cannot be added to a row's sums.

        Args:
            query: `(M, E)`, the newest step of each stream.
            value, key: `(M, Ev)`, `(M, Ek)`; None: the query, and the value.
            attention_mask: bool, which steps of the window (last axis) the query of each (the axis
                before) may attend to, oldest first: `[N, N]`, `[M, N, N]` or `[M, H, N, N]`.
            return_attention_scores: whether to return the scores too.
            training: whether dropout acts. Training, and whatever else is differentiated, is in
                plain TensorFlow. A graph that is differentiated from outside is to be called with
                True.
            query_mask: refused, with the reason.
            value_mask, key_mask: bool `[M]`; where either is False, the step is never attended to,
                now or later, but its query attends: a gap in a recording.
            use_causal_mask: whether no query attends to a later step than its own.
            streams: integers `[M]`, which stream each row belongs to, in any order, each once.
                None: row i is stream i, and there is made room for M streams.
            update_state: if False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, N, E)`, the outputs of the window, oldest step first, zeros for steps that were
            never taken; or None while the window fills (see `warm_up`). With
            return_attention_scores a pair with the scores, `(M, H, N, N)`, or None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit. The
                streams then go on as if the call had not been made.
        """
        outputs = take_all_steps(
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
            attention_mask: as `call_step` has it, the same for every step; or `[M, H, T, N, N]`.
            value_mask, key_mask: bool `[M, T]`, as `call_step` has them.
            return_attention_scores, training, query_mask, use_causal_mask, streams, update_state:
                as `call_step` has them.

        Returns:
            `(M, T', N, E)`: in eager mode with `warm_up="none"` the outputs of the T' newest steps,
            those with a full window in the stream that has come furthest, or None where there is
            none; otherwise T' = T. With return_attention_scores a pair with the scores,
            `(M, H, T', N, N)`, or None.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        outputs = take_all_steps(
            self, 3, query, value, key, attention_mask, query_mask, value_mask, key_mask,
            use_causal_mask, return_attention_scores, training, streams, update_state,
        )  # fmt: skip
        return outputs if return_attention_scores else outputs[0]

    def _ensure_built(self, query, value, key):
        if not self.built:
            # Whatever graph is being traced, the weights are made outside it.
            with tf.init_scope():
                self.build(query.shape, value.shape, (value if key is None else key).shape)

    # Symbolic shapes, and masks.

    def compute_mask(self, inputs, previous_mask):
        # Of the window's rows only the newest's mask is this call's.
        return previous_mask if self.active_call_mode == "regular" else None

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        value_shape = query_shape if value_shape is None else value_shape
        super().compute_output_shape(query_shape, value_shape, key_shape)  # Its checks.
        lead = tuple(query_shape[:-1])
        if self.active_call_mode != "regular":
            lead = (*lead, self._seq_len)
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
            scores = (*heads, query.shape[1], value.shape[1])
        else:
            scores = (*heads, *query.shape[1:-1], self._seq_len, self._seq_len)
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)
