"""Continual single-output multi-head attention."""

import math
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.fused_step import FusedStepLayer, optional_input
from continual_transformers_tf.layers.inputs import (
    TensorLike,
    checked_cache_dtype,
    checked_weights_dtype,
    expect_given,
    rows_and_steps,
    without_keras_mask,
)
from continual_transformers_tf.layers.narrow_kernels import NarrowKernels
from continual_transformers_tf.layers.plain_layers import cast, precise, project, rms_norm
from continual_transformers_tf.layers.position_bias import PositionBias, position_bias_of
from continual_transformers_tf.layers.rotary import Rotary, rotary_of
from continual_transformers_tf.layers.streaming_attention import StepMasks, StreamingAttention
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.delay import delayed_steps, put_steps
from continual_transformers_tf.ops.layer_step import MHA_STEP
from continual_transformers_tf.ops.single_output import attend_steps, put_window
from continual_transformers_tf.ops.single_output_twin import LogitTerms
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import check_integer

# The arguments of `keras.layers.GroupQueryAttention` that have other names here.
GROUPED_NAMES = {"head_dim": "key_dim", "num_query_heads": "num_heads"}


@registered
class CoSiMultiHeadAttention(FusedStepLayer, StreamingAttention):
    """`keras.layers.MultiHeadAttention` that also answers at every step of an endless stream.

    On a window it returns the row of the newest query. Step by step it returns the same numbers at
    a fraction of the cost: it keeps the keys and values of the newest `seq_len` steps in a ring,
    and a step computes only what it adds. Weights are those of `keras.layers.MultiHeadAttention`,
    in the same order. The streams' state is not among them. The algorithm is that of Hedegaard et
    al., "Continual Transformers" (ICLR 2023, arXiv 2201.06268).

    Args:
        seq_len: N, the window: how many of the newest steps a step's query attends to. A regular
            call attends to its whole window, of any length.
        num_heads, ..., seed: As in `keras.layers.MultiHeadAttention`. `attention_axes` can only be
            time, axis 1, unless `single_output=False` and `call_mode="regular"`.
            `sliding_window` narrows the window of a step as it narrows that of a regular call.
            `flash_attention` has no effect on a step.
        query_index: The query whose output a step returns, as an index into the window, in
            [-N, N - 1]. -1: that of the newest step. The output of an older step takes the steps
            after it into account. Its query is kept until then.
        single_output: Whether a regular call returns only the row of the query at `query_index`,
            `(B, 1, E)`. If False, it is exactly a call of `keras.layers.MultiHeadAttention`.
        warm_up: What a step returns, in eager mode, while the window fills. "none": None, as long
            as no stream of the call has a full window. (Other streams' rows are then as with
            "partial"; `ready` tells which they are.) "partial": attention over the steps seen so
            far, equal to regular attention on the shorter sequence, as soon as this has a query at
            `query_index`. A graph cannot return None. It is always "partial", and before the first
            such query it returns the output of an attention to nothing.
        cache_dtype: The dtype of the kept keys and values. None: the compute dtype. With a compute
            dtype of float32, "bfloat16" or "float16" halve the ring and round every new key and
            value. With keys and values of order one, outputs moved by at most 0.3 % and 0.04 %
            (`tests/test_co_si_mha_dtypes.py` holds 1 % and 0.15 %).
        weights_dtype: The dtype of the kernels that a step reads if it is one fused op; everything
            else reads the layer's own. None: the layer's own too. With float32, "bfloat16" halves
            what a step reads of them. The first such step makes a copy. It is written again by
            `set_weights` of this layer or of a layer of this package around it, when Keras loads a
            file of weights, and by `convert_weights` (`ct.convert_weights` of a model). Call the
            latter after anything else that changes weights: training, a Keras model's
            `set_weights`, the restore of a `tf.train.Checkpoint`. Functions traced before see the
            new copy too. With projections of order one, outputs moved by at most 0.23 %
            (`tests/test_co_si_mha_step.py` holds 0.4 %).
        call_mode: What calling the layer does: "regular", "step" or "steps".
        num_key_value_heads: Hk, the number of heads of keys and values, a divisor of `num_heads`:
            num_heads / Hk successive queries share a head, as in
            `keras.layers.GroupQueryAttention`. The layer then has the weights of that layer, in the
            same order. None: num_heads.
        rotary: A `ct.Rotary`, which turns queries and keys by the numbers of their steps, and in a
            regular call by their places in the window: both give the same. None: no such positions.
        query_key_norm: Whether an `RMSNormalization` normalizes each head's queries, and another
            its keys, before they are turned.
        norm_epsilon: The epsilon of these norms.
        logit_soft_cap: The bound c of c * tanh(logit / c), which replaces each scaled logit, as in
            Gemma 2. None: none.
        position_bias: A `ct.ALiBi` or a `ct.RelativePositionBias`. It adds to each logit a number
            that depends on how many steps lie between query and key. None: no bias.
        use_sinks: Whether each head has a learned logit that only adds to the sum of its softmax,
            as in gpt-oss. A head can then attend to nothing.
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`.

    Keras' layer does not have the arguments from `num_key_value_heads` on. Their weights come after
    those of Keras, in the order of the arguments. A `ct.Session` computes them in its own kernels.
    In TensorFlow, a step with any of them is several ops. With only `rotary` and `query_key_norm`,
    one of these ops is the fused attention. With any other, all of them are plain TensorFlow.

    Call arguments:
        As in `keras.layers.MultiHeadAttention`, but `value` may be left out for self-attention. For
        the modes "step" and "steps" see `call_step` and `call_steps`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if a size is not a positive integer, `attention_axes` is not
            time, `query_index` is outside the window, or another argument is none of those above.
    """

    _fused_op = MHA_STEP
    _regular_kinds: ClassVar = {
        **StreamingAttention._regular_kinds,
        keras.layers.GroupQueryAttention: "GroupQueryAttention",
    }

    def __init__(
        self,
        seq_len: int,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        attention_axes: Any = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        query_index: int = -1,
        single_output: bool = True,
        warm_up: str = "none",
        cache_dtype: str | None = None,
        weights_dtype: str | None = None,
        call_mode: str = "regular",
        num_key_value_heads: int | None = None,
        rotary: Rotary | None = None,
        query_key_norm: bool = False,
        norm_epsilon: float = 1e-6,
        logit_soft_cap: float | None = None,
        position_bias: PositionBias | None = None,
        use_sinks: bool = False,
        **kwargs: Any,
    ) -> None:
        check_integer("seq_len", seq_len, at_least=1)
        check_integer("query_index", query_index, at_least=-seq_len)
        if query_index >= seq_len:
            raise ValueError(
                f"Expected query_index in [-seq_len, seq_len - 1], an index into the window of "
                f"{seq_len} steps, but got {query_index}"
            )
        super().__init__(
            seq_len, num_heads, key_dim, value_dim, dropout, use_bias, output_shape, attention_axes,
            sliding_window, flash_attention, kernel_initializer, bias_initializer,
            kernel_regularizer, bias_regularizer, activity_regularizer, kernel_constraint,
            bias_constraint, use_gate, seed, single_output=single_output, warm_up=warm_up,
            call_mode=call_mode, **kwargs,
        )  # fmt: skip
        self._query_index = int(query_index)
        self._cache_dtype = checked_cache_dtype(cache_dtype, self.compute_dtype)
        self._weights_dtype = checked_weights_dtype(weights_dtype, self.compute_dtype)
        self._narrow_kernels = NarrowKernels()
        self._key_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        check_integer("num_key_value_heads", self._key_heads, at_least=1)
        if num_heads % self._key_heads:
            raise ValueError(
                f"Expected num_key_value_heads to divide num_heads, {num_heads}, but got "
                f"{self._key_heads}"
            )
        self._rotary = rotary_of(rotary)
        if self._rotary is not None:
            self._rotary.turns(key_dim)  # For its checks.
        self._query_key_norm = bool(query_key_norm)
        self._norm_epsilon = float(norm_epsilon)
        if logit_soft_cap is not None and not 0 < logit_soft_cap < math.inf:
            raise ValueError(
                f"Expected logit_soft_cap to be a positive number or None, but got {logit_soft_cap}"
            )
        self._logit_soft_cap = None if logit_soft_cap is None else float(logit_soft_cap)
        self.position_bias = position_bias_of(position_bias)
        self._use_sinks = bool(use_sinks)
        if self._no_steps is not None and not self._is_plain:
            raise ValueError(
                f"Expected attention along time, but got {self._no_steps} and an argument that "
                "keras.layers.MultiHeadAttention does not have: leave one of them out"
            )
        self._stream_state = AttentionCache(
            0,
            self._key_heads,
            seq_len,
            key_dim,
            self._value_dim,
            self._cache_dtype or self.compute_dtype,
            name="state",
            extra_rows=self._waiting_rows() if self.delay > 0 else None,
        )

    def _waiting_rows(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the rows of queries that wait for their turn: `delay` steps of each stream."""
        heads, dtype = (self.delay, self._num_heads), self.compute_dtype
        rows = {"query": ((*heads, self._key_dim), dtype), "query_mask": ((self.delay,), "bool")}
        if self._use_gate:
            rows["gate"] = ((*heads, self._value_dim), dtype)
        return rows

    @property
    def weights_dtype(self) -> str | None:
        return self._weights_dtype

    @property
    def _is_plain(self) -> bool:
        """Whether this computes what `keras.layers.MultiHeadAttention` does."""
        return (
            self._key_heads == self._num_heads
            and self._rotary is None
            and not self._query_key_norm
            and not self._has_logit_terms
        )

    @property
    def _has_logit_terms(self) -> bool:
        terms = (self._logit_soft_cap, self.position_bias)
        return self._use_sinks or any(x is not None for x in terms)

    @property
    def delay(self) -> int:
        return (self._seq_len - 1 if self._query_index >= 0 else -1) - self._query_index

    def get_config(self) -> dict[str, Any]:
        grouped = self._key_heads
        return {
            **super().get_config(),
            "query_index": self._query_index,
            "single_output": self._single_output,
            "cache_dtype": self._cache_dtype,
            "weights_dtype": self._weights_dtype,
            "num_key_value_heads": None if grouped == self._num_heads else grouped,
            "rotary": keras.saving.serialize_keras_object(self._rotary),
            "query_key_norm": self._query_key_norm,
            "norm_epsilon": self._norm_epsilon,
            "logit_soft_cap": self._logit_soft_cap,
            "position_bias": keras.saving.serialize_keras_object(self.position_bias),
            "use_sinks": self._use_sinks,
        }

    @classmethod
    def _renamed(cls, config: dict[str, Any]) -> dict[str, Any]:
        return {GROUPED_NAMES.get(name, name): x for name, x in config.items()}

    def _build_parts(self, query_shape: Any, value_shape: Any, key_shape: Any) -> None:
        if self._no_steps is not None and not self._is_plain:
            raise ValueError(f"Expected inputs of shape (B, T, E), but got {self._no_steps}")
        if self._key_heads == self._num_heads:
            super()._build_parts(query_shape, value_shape, key_shape)
        else:
            self._build_grouped(query_shape, value_shape, key_shape)
        if self._query_key_norm:
            options = dict(epsilon=self._norm_epsilon, dtype=self.dtype_policy)
            self.query_norm = keras.layers.RMSNormalization(name="query_norm", **options)
            self.key_norm = keras.layers.RMSNormalization(name="key_norm", **options)
            for norm in (self.query_norm, self.key_norm):
                norm.build((None, None, None, self._key_dim))
        if self.position_bias is not None and not self.position_bias.built:
            self.position_bias.build((None, self._num_heads, None, None))
        if self._use_sinks:
            self.sinks = self.add_weight(
                shape=(self._num_heads,), initializer="zeros", name="sinks"
            )

    def _build_grouped(self, query_shape: Any, value_shape: Any, key_shape: Any) -> None:
        """Make the dense layers, in the order of `keras.layers.GroupQueryAttention`."""

        def projection(name: str, shape: Any, heads: int, size: int, **options: Any) -> Any:
            layer = keras.layers.EinsumDense(
                "abc,cde->abde",
                output_shape=(None, heads, size),
                bias_axes="de" if self._use_bias else None,
                name=name,
                **options,
                **self._get_common_kwargs_for_sublayer(),
            )
            layer.build(shape)
            return layer

        heads, key_heads = self._num_heads, self._key_heads
        self._query_dense = projection("query", query_shape, heads, self._key_dim)
        self._key_dense = projection("key", key_shape, key_heads, self._key_dim)
        if self._use_gate:
            self._gate_dense = projection(
                "gate", query_shape, heads, self._value_dim, activation="sigmoid"
            )
        self._value_dense = projection("value", value_shape, key_heads, self._value_dim)
        self._build_attention(4)  # The rank of projected queries.
        self._output_dense = self._make_output_dense(
            query_shape, self._get_common_kwargs_for_sublayer(), "attention_output"
        )
        self._output_dense.build((None, None, heads, self._value_dim))

    # Windows.

    def call_regular(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        query_mask: TensorLike | None = None,
        value_mask: TensorLike | None = None,
        key_mask: TensorLike | None = None,
        attention_mask: TensorLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Return attention on whole windows. This does not use the streams' state.

        Args:
            query: `(B, T, E)`, windows, oldest step first.
            value, key, ..., use_causal_mask: As in `keras.layers.MultiHeadAttention`.

        Returns:
            `(B, 1, E)`, the row of the query at `query_index`. With `single_output=False` all rows,
            `(B, T, E)`. With return_attention_scores also the scores, `(B, H, 1, S)` or
            `(B, H, T, S)`.
        """
        expect_given("query", query)
        query = keras.ops.convert_to_tensor(query)
        value = query if value is None else keras.ops.convert_to_tensor(value)
        if self._single_output:
            # Keras reads the query's mask from the tensor. A step has no such mask.
            query = without_keras_mask(query)
            for name, x in (("query", query), ("value", value)):
                if len(x.shape) != 3:
                    raise ValueError(
                        f"Expected {name} of shape (B, T, E), but got {tuple(x.shape)}"
                    )
        self._ensure_built(query, value, value if key is None else key)
        # If nothing depends on the query's place among the others, the others are left out: N times
        # less attention.
        leave_out = self._single_output and not (
            use_causal_mask
            or query_mask is not None
            or attention_mask is not None
            or self._sliding_window is not None
        )
        result = self.call_regular_rows(
            self._chosen_row(query, 1) if leave_out else query,
            value,
            key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
            only_query=leave_out,
        )
        if not self._single_output or leave_out:
            return result
        if return_attention_scores:
            return self._chosen_row(result[0], 1), self._chosen_row(result[1], 2)
        return self._chosen_row(result, 1)

    def call_regular_rows(
        self, query: Any, value: Any, key: Any = None, only_query: bool = False, **arguments: Any
    ) -> Any:
        """Return all rows of attention on windows, as `call_regular` with `single_output=False`.

        Args:
            query, value, key: `(B, T, E)`.
            only_query: Whether the query is only the row at `query_index`, `(B, 1, E)`.
            **arguments: As in `call_regular`.
        """
        if self._is_plain:
            return super().call_regular_rows(query, value, key, **arguments)
        key = value if key is None else key
        first = 0
        if only_query:
            size = _length(value)
            first = self._query_index + (size if self._query_index < 0 else 0)
        positions = [
            tf.cast(tf.range(begin, begin + _length(x)), tf.int64)[tf.newaxis]
            for begin, x in ((first, query), (0, value))
        ]
        return self._attend_windows(query, value, key, *positions, **arguments)

    def _attend_windows(
        self,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor,
        query_position: tf.Tensor,
        key_position: tf.Tensor,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Do what Keras' `call` does, with the arguments that Keras does not have.

        Args:
            query, value, key: `(B, T, E)`.
            query_position, key_position: int64 `(1, T)`, the steps that they are.
            query_mask, ..., use_causal_mask: As in `call_regular`.
        """
        mask_of_query = getattr(query, "_keras_mask", None)
        mask = self._compute_attention_mask(
            query,
            value,
            query_mask=mask_of_query if query_mask is None else query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
        )
        gate = self._gate_dense(query) if self._use_gate else None
        query, key, value = self._query_dense(query), self._key_dense(key), self._value_dense(value)
        query = self._placed("query", query, query_position)
        key = self._placed("key", key, key_position)
        group = self._num_heads // self._key_heads
        if group > 1:
            key, value = (tf.repeat(x, group, axis=2) for x in (key, value))
        if not self._has_logit_terms:
            attended, scores = self._compute_attention(
                query, key, value, mask, training, return_attention_scores
            )
        else:
            distance = query_position[0, :, tf.newaxis] - key_position[0]
            attended, scores = self._attend_with_terms(query, key, value, distance, mask, training)
        output = self._output_dense(attended if gate is None else attended * gate)
        if mask_of_query is not None:
            output._keras_mask = mask_of_query
        return (output, scores) if return_attention_scores else output

    def _attend_with_terms(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        value: tf.Tensor,
        distance: tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Attend among rows: query `(B, T, H, D)`, key, value `(B, S, H, D)`, distance `(T, S)`.

        Returns:
            `(B, T, H, Dv)` and the scores `(B, H, T, S)`.
        """
        dtype, terms = precise(self.compute_dtype), self._logit_terms(distance)
        assert terms is not None
        if mask is not None:
            for _ in range(4 - mask.shape.rank):
                mask = tf.expand_dims(mask, -3)
        logits = tf.einsum("bthd,bshd->bhts", cast(query, dtype), cast(key, dtype))
        scores = terms.weights(self._inverse_sqrt_key_dim * logits, mask)
        dropped = self._dropout_layer(scores, training=training) if self._dropout > 0 else scores
        attended = tf.einsum("bhts,bshd->bthd", cast(dropped, dtype), cast(value, dtype))
        return cast(attended, self.compute_dtype), cast(scores, self.compute_dtype)

    def _placed(self, name: str, x: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """Normalize and turn queries or keys as the layer's options say.

        Args:
            name: "query" or "key".
            x: `(..., T, heads, D)`.
            position: int64 `(..., T)`, the steps that they are.
        """
        if self._query_key_norm:
            norm = self.query_norm if name == "query" else self.key_norm
            x = rms_norm(x, norm, self.compute_dtype)
        return x if self._rotary is None else self._rotary.rotate(x, position)

    def _logit_terms(self, distance: Any) -> LogitTerms | None:
        """Return the changes of logits of these distances from key to query; None: no changes."""
        if not self._has_logit_terms:
            return None
        bias = None if self.position_bias is None else self.position_bias.call(distance)
        sink = tf.convert_to_tensor(self.sinks) if self._use_sinks else None
        return LogitTerms(self._logit_soft_cap, bias, sink)

    def _chosen_row(self, x: tf.Tensor, axis: int) -> tf.Tensor:
        """Return the row of windows at `query_index` along an axis, which stays with size 1."""
        index, size = self._query_index, x.shape[axis]
        expected = f"Expected windows that have a step {index}, query_index, but got"
        if size is not None and not -size <= index < size:
            raise ValueError(f"{expected} {size} steps")
        if size is None and tf.is_tensor(x):  # Symbolic tensors of Keras have no sizes to check.
            size = tf.shape(x)[axis]
            fits = tf.debugging.Assert((-size <= index) & (index < size), [expected, size, "steps"])
            with tf.control_dependencies([fits]):
                x = tf.identity(x)
        lead = (slice(None),) * axis
        return x[(*lead, slice(index, None))][(*lead, slice(1))]

    # Steps. `StreamingAttention` checks inputs and masks, and projects the output.

    def _take_steps(
        self,
        mode: str,
        query: TensorLike,
        value: TensorLike | None,
        key: TensorLike | None,
        *,
        return_attention_scores: bool,
        training: bool | None,
        streams: TensorLike | None,
        update_state: bool,
        **masks: Any,
    ) -> tuple[Any, Any]:
        fused_step = self._step_as_one_op(training, query) if mode == "step" else None
        if fused_step is None:
            return super()._take_steps(
                mode,
                query,
                value,
                key,
                return_attention_scores=return_attention_scores,
                training=training,
                streams=streams,
                update_state=update_state,
                **masks,
            )
        query_given, value_given, key_given = self._step_inputs(mode, query, value, key)
        step_masks = self._step_masks(query_given, one_step=True, **masks)
        output, scores = fused_step(
            self,
            (
                query_given,
                optional_input(None if value is None else value_given),
                optional_input(None if key is None else key_given),
            ),
            (
                optional_input(step_masks.attention),
                *(
                    optional_input(None if mask is None else mask[:, 0])
                    for mask in (step_masks.query, step_masks.key)
                ),
            ),
            self._first_output if tf.executing_eagerly() else 0,
            streams,
            update_state,
            num_scores=int(return_attention_scores),
        )
        return (None, None) if output is None else (output, scores[0] if scores else None)

    def _attend(
        self,
        step: Step,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor,
        masks: StepMasks,
        return_attention_scores: bool,
        training: bool | None,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        cache, dtype = self._stream_state, self.compute_dtype
        position = step.rows_before(rows_and_steps(query)[1])
        keys = project(key, self._key_dense, dtype, training)
        values = cast(project(value, self._value_dense, dtype, training), cache.dtype)
        queries = project(query, self._query_dense, dtype, training)
        if not self._is_plain:
            # A query that waits was turned by its own step, like the keys in the ring.
            numbers = tf.expand_dims(position, 1) + tf.range(tf.shape(query, tf.int64)[1])
            queries = self._placed("query", queries, numbers)
            keys = self._placed("key", keys, numbers)
        keys = cast(keys, cache.dtype)
        asking = {"query": queries}
        if self._use_gate:
            asking["gate"] = project(query, self._gate_dense, dtype, training)
        if masks.query is not None:
            asking["query_mask"] = masks.query
        if self.delay > 0:
            asking = self._exchange_queries(asking, step, position)
        attention_mask = masks.attention
        if "query_mask" in asking:
            asks = asking["query_mask"][:, tf.newaxis, :, tf.newaxis]  # [M, 1, T, 1]
            everything = tf.ones([1, 1, 1, self._seq_len], bool)
            attention_mask = asks & (everything if attention_mask is None else attention_mask)
        attended, scores, _ = attend_steps(
            cast(asking["query"], cache.compute_dtype),
            keys,
            values,
            cache,
            streams=step.numbers,
            attention_mask=attention_mask,
            key_mask=masks.key,
            scale=self._inverse_sqrt_key_dim,
            return_attention_scores=return_attention_scores,
            update_state=step.update_state and step.has_one_row,
            advance_position=False,
            position=position if step.rows_of_input.each > 1 else None,
            training=training,
            dropout=self._scores_dropout(training),
            terms=self._logit_terms(self._seq_len - 1 - self.delay - np.arange(self._seq_len)),
        )
        if not step.has_one_row:
            step.at_the_end(lambda: put_window(cache, keys, values, masks.key, step, position))
        attended = cast(attended, dtype)
        return attended * asking["gate"] if self._use_gate else attended, scores

    def _exchange_queries(
        self, new: dict[str, tf.Tensor], step: Step, position: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Keep this call's queries, and return those of `delay` steps before.

        Args:
            new: "query" `[M, T, H, D]`, and if there are any, "gate" and "query_mask".
            step: The `Step`.
            position: int64 `[M]`, how many queries the streams had before.

        Returns:
            The same names, and "query_mask" in any case.
        """
        cache = self._stream_state
        shape = tf.shape(new["query"])[:2]
        new = {"query_mask": tf.ones(shape, bool), **new}
        due = {
            name: delayed_steps(getattr(cache, name), steps, step.numbers, position)
            for name, steps in new.items()
        }
        # The first `delay` steps of a stream have no query whose turn it is.
        number = tf.expand_dims(position, 1) + tf.range(tf.cast(shape[1], tf.int64))
        waited = number >= self.delay
        due["query_mask"] &= waited
        if "gate" in due:  # tf.where, because what an earlier stream left there may be NaN.
            due["gate"] = tf.where(waited[:, :, tf.newaxis, tf.newaxis], due["gate"], 0)

        def keep() -> None:
            for name, steps in new.items():
                put_steps(getattr(cache, name), steps, step.numbers, position)

        step.at_the_end(keep)
        return due

    # The fused op of a step.

    def _dense_layers(self) -> tuple[keras.layers.Layer, ...]:
        gate = (self._gate_dense,) if self._use_gate else ()
        return (self._query_dense, self._key_dense, self._value_dense, *gate, self._output_dense)

    def _fused_state(self) -> list[tf.Variable]:
        cache, waiting = self._stream_state, []
        if self.delay > 0:
            waiting = [cache.query, cache.query_mask]
            waiting += [cache.gate] if self._use_gate else []
        return super()._fused_state() + waiting

    def _fused_attributes(self) -> dict[str, Any] | None:
        if self._no_steps is not None or not self._is_plain:
            return None
        return dict(use_bias=self._use_bias, use_gate=self._use_gate, use_delay=self.delay > 0)

    # Masks.

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        mask = super().compute_mask(inputs, previous_mask)
        return self._chosen_row(mask, 1) if self._single_output and mask is not None else mask

    def _put_mask(self, mask: tf.Tensor | None, output: tf.Tensor | None) -> None:
        # The mask of a delayed output came with a step of an earlier call, and was not kept.
        if mask is None or output is None or self.delay > 0:
            return
        if mask.shape.rank == 2:
            mask = mask[:, -tf.shape(output)[1] :]
        output._keras_mask = mask


def _length(x: tf.Tensor) -> int | tf.Tensor:
    """Return T of windows `(B, T, E)`."""
    return tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
