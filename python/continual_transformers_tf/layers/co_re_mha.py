"""Continual retroactive multi-head attention."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.inputs import TensorLike, expect_given, without_keras_mask
from continual_transformers_tf.layers.plain_layers import cast, precise, project
from continual_transformers_tf.layers.streaming_attention import StepMasks, StreamingAttention
from continual_transformers_tf.ops.delay import put_steps, windows_of
from continual_transformers_tf.ops.retroactive import (
    attend_all_steps,
    check_algorithm,
    put_whole_window,
)
from continual_transformers_tf.ops.retroactive_cache import RetroactiveCache
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import check_integer


@registered
class CoReMultiHeadAttention(StreamingAttention):
    """`keras.layers.MultiHeadAttention` whose outputs are all updated by every step of a stream.

    On a window it is exactly Keras' layer. Step by step it returns the same numbers for the window
    of the newest `seq_len` steps, all N rows of it. The cost grows with N and not with N²: each
    kept row gains the new key and loses the oldest. Weights are those of
    `keras.layers.MultiHeadAttention`, in the same order. The streams' state is not among them. The
    algorithm is that of Hedegaard et al., "Continual Transformers" (ICLR 2023, arXiv
    2201.06268), made stable for logits of any size (docs/co_re_mha.md).

    Args:
        seq_len: N, the window: the newest steps, which attend to each other. A regular call takes
            windows of any length.
        num_heads, ..., seed: As in `keras.layers.MultiHeadAttention`. `attention_axes` other than
            time, axis 1, are for regular calls only. With a `sliding_window` narrower than seq_len
            a step computes all rows again, in plain TensorFlow. `flash_attention` has no effect on
            a step.
        warm_up: What a step returns, in eager mode, while the window fills. "none": None, as long
            as no stream of the call has a full window. "partial": attention among the steps seen so
            far, in the newest rows. The other rows, of steps that were never taken, are zeros. A
            graph cannot return None. It is always "partial".
        algorithm: How a step computes its rows: "update", "recompute" (each row again, from the
            rings), or "auto", whichever is faster at these sizes. The results differ only by
            rounding.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        **kwargs: `name`, `dtype` and other arguments of `keras.layers.Layer`. Layers of 16-bit
            dtypes keep their streams and attend in float32, and return their own dtype.

    Call arguments:
        As in `keras.layers.MultiHeadAttention`, but `value` may be left out for self-attention. For
        the modes "step" and "steps" see `call_step` and `call_steps`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if a size is not a positive integer, or `warm_up`, `algorithm`
            or `call_mode` is none of those above; if there is a `cache_dtype`; or if `call_mode` is
            not "regular" and `attention_axes` is not time.
    """

    gives_windows = True

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
        warm_up: str = "none",
        algorithm: str = "auto",
        call_mode: str = "regular",
        **kwargs: Any,
    ) -> None:
        check_integer("seq_len", seq_len, at_least=1)
        check_algorithm(algorithm)
        if kwargs.pop("cache_dtype", None) is not None:
            raise ValueError(
                "Expected no cache_dtype, which CoSiMultiHeadAttention has: beside its rings "
                "retroactive attention keeps sums, in float64, that would outweigh them"
            )
        super().__init__(
            seq_len, num_heads, key_dim, value_dim, dropout, use_bias, output_shape, attention_axes,
            sliding_window, flash_attention, kernel_initializer, bias_initializer,
            kernel_regularizer, bias_regularizer, activity_regularizer, kernel_constraint,
            bias_constraint, use_gate, seed, warm_up=warm_up, call_mode=call_mode, **kwargs,
        )  # fmt: skip
        self._algorithm = algorithm
        gate = ((max(1, seq_len - 1), num_heads, self._value_dim), self.compute_dtype)
        self._stream_state = RetroactiveCache(
            0,
            num_heads,
            seq_len,
            key_dim,
            self._value_dim,
            precise(self.compute_dtype),
            name="state",
            extra_rows={"gate": gate} if use_gate else None,
        )

    @property
    def algorithm(self) -> str:
        """How a step computes its rows: "auto", "update" or "recompute"."""
        return self._algorithm

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "algorithm": self._algorithm}

    def call_regular(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        **arguments: Any,
    ) -> Any:
        """Return attention on whole windows, as Keras' layer. This does not use the streams' state.

        Only mask arguments count. A mask that Keras has put on the query's tensor does not.

        Args:
            query: `(B, T, E)`, windows, oldest step first.
            value, key: Likewise. None: the query, and the value.
            **arguments: As in `keras.layers.MultiHeadAttention`.

        Returns:
            `(B, T, E)`. With return_attention_scores also the scores, `(B, H, T, S)`.
        """
        expect_given("query", query)
        # Keras reads the query's mask from the tensor. A step has no such mask.
        query = without_keras_mask(keras.ops.convert_to_tensor(query))
        value = query if value is None else keras.ops.convert_to_tensor(value)
        self._ensure_built(query, value, value if key is None else key)
        return self.call_regular_rows(query, value, key, **arguments)

    # Steps. `StreamingAttention` checks inputs and masks, and projects the output.

    def _step_masks(
        self, query: tf.Tensor, one_step: bool, *, query_mask: Any, **masks: Any
    ) -> StepMasks:
        if query_mask is not None:
            raise ValueError(
                "Expected no query_mask in a step, but got one: a query stays in the window for N "
                "steps, in whose calls its mask would be forgotten. Leave its row of the output "
                "out instead, or give its row of attention_mask as False"
            )
        return super()._step_masks(query, one_step, query_mask=None, **masks)

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
        queries, keys, values = (
            cast(project(x, dense, dtype, training), cache.dtype)
            for x, dense in (
                (query, self._query_dense),
                (key, self._key_dense),
                (value, self._value_dense),
            )
        )
        if self._use_gate:
            # Before the attention, so that a gate that fails has changed nothing.
            gate = project(query, self._gate_dense, dtype, training)
            gates, _ = windows_of(cache.gate, gate, step.numbers, step.position, self._seq_len)
            step.at_the_end(lambda: put_steps(cache.gate, gate, step.numbers, step.position))
        dropout = self._scores_dropout(training)
        attended, scores, _ = attend_all_steps(
            queries,
            keys,
            values,
            cache,
            streams=step.numbers,
            attention_mask=masks.attention,
            key_mask=masks.key,
            scale=self._inverse_sqrt_key_dim,
            return_attention_scores=return_attention_scores,
            algorithm=self._algorithm,
            update_state=step.update_state and step.has_one_row,
            advance_position=False,
            training=training,
            dropout=None if dropout is None else lambda x: cast(dropout(x), cache.dtype),
        )
        if not step.has_one_row:
            step.at_the_end(lambda: put_whole_window(cache, queries, keys, values, masks.key, step))
        attended = tf.transpose(cast(attended, dtype), (0, 1, 3, 2, 4))  # [M, T, N, H, Dv]
        if self._use_gate:
            attended *= gates
        return attended, scores

    def _project_output(self, step: Step, attended: tf.Tensor, training: bool | None) -> tf.Tensor:
        output = super()._project_output(step, attended, training)  # [M, T', N, ...]
        # The rows of steps that were never taken are zeros, not the projection's bias.
        if tf.executing_eagerly():
            filled = self._seq_len - 1 + output.shape[1] - step.steps

            def are_full(positions: np.ndarray) -> bool:
                return bool((positions >= filled).all())

            if are_full(step.known_position(are_full)):
                return output
        shape = tf.shape(output)
        newest = step.position + tf.cast(step.steps, tf.int64)
        steps = newest[:, tf.newaxis] + tf.cast(tf.range(shape[1]) - (shape[1] - 1), tf.int64)
        rows = tf.range(self._seq_len, dtype=tf.int64) - self._seq_len + 1  # 0: the newest step's.
        taken = steps[:, :, tf.newaxis] + rows > 0  # [M, T', N]
        taken = tf.reshape(taken, tf.concat([shape[:3], [1] * (output.shape.rank - 3)], 0))
        return tf.where(taken, output, 0)
