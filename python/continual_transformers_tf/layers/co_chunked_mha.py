"""Attention within chunks of steps and to the chunks before, so with a bounded look-ahead."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf._keras_registration import registered
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import (
    TensorLike,
    check_features,
    check_same_rows,
    expect_given,
    in_blocks,
    rows_and_steps,
    step_input,
    without_keras_mask,
)
from continual_transformers_tf.layers.plain_layers import cast, precise, project
from continual_transformers_tf.layers.warm_up import check_warm_up
from continual_transformers_tf.ops.delay import put_steps, sequence_before
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState, check_integer


@registered
class CoChunkedMultiHeadAttention(ContinualLayer, keras.layers.MultiHeadAttention):
    """Multi-head attention within chunks of C steps, and to the L chunks before each.

    A query attends to all steps of its own chunk, also to later ones, and to those of the
    `left_chunks` chunks before. So a stream looks ahead by less than C steps, and its outputs never
    change: they are exactly those of a regular call on the whole sequence. This is the mask of
    block processing in Emformer (Shi et al., arXiv 2010.10759), of NeMo's "chunked_limited" style
    and of WeNet's chunks.

    A step takes the C steps of a chunk at once: `block` is C. Weights are those of
    `keras.layers.MultiHeadAttention`, in the same order.

    Args:
        chunk: C, the steps of a chunk.
        left_chunks: L, how many chunks before its own a query attends to.
        num_heads, key_dim, value_dim: As in `keras.layers.MultiHeadAttention`.
        warm_up: "none": in eager mode, steps return None until a stream has taken L + 1 chunks.
            "partial": they return the outputs of fewer.
        call_mode: What calling the layer does: "regular", "step" or "steps".
        **kwargs: `dropout`, `use_bias`, `output_shape`, the initializers, regularizers and
            constraints, `seed`, `name` and `dtype`, as in `keras.layers.MultiHeadAttention`.

    Returns:
        The result of `call_regular`, `call_step` or `call_steps`, as the call mode says.

    Raises:
        ValueError: At construction, if `chunk` is not an integer >= 1, `left_chunks` not one >= 0,
            or an argument is one that chunks have no meaning for.
    """

    def __init__(
        self,
        chunk: int,
        left_chunks: int,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        warm_up: str = "none",
        call_mode: str = "regular",
        **kwargs: Any,
    ) -> None:
        check_integer("chunk", chunk, at_least=1)
        check_integer("left_chunks", left_chunks, at_least=0)
        for name in ("attention_axes", "sliding_window", "use_gate", "flash_attention"):
            if kwargs.pop(name, None):
                raise ValueError(f"Expected no {name}: attention in chunks has none. Leave it out")
        super().__init__(num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, **kwargs)
        self._chunk, self._left_chunks = int(chunk), int(left_chunks)
        self._warm_up = check_warm_up(warm_up)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        heads, rows = self._num_heads, self._chunk * self._left_chunks
        kept = {"keys": [heads, self._key_dim], "values": [heads, self._value_dim]}
        self._stream_state = StreamState(
            0,
            {name: ([rows, *row], self.compute_dtype) for name, row in kept.items() if rows},
            name="state",
        )

    @property
    def chunk(self) -> int:
        """C, the steps of a chunk."""
        return self._chunk

    @property
    def left_chunks(self) -> int:
        """L, how many chunks before its own a query attends to."""
        return self._left_chunks

    @property
    def block(self) -> int:
        return self._chunk

    @property
    def receptive_field(self) -> int:
        return self._chunk * (1 + self._left_chunks)

    @property
    def input_features(self) -> dict[str, Any]:
        return {
            name: (self._chunk, size) if self._chunk > 1 else size
            for name, size in zip(("query", "value", "key"), self._features, strict=True)
        }

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        for name in ("attention_axes", "sliding_window", "use_gate", "flash_attention"):
            config.pop(name, None)
        own = {"chunk": self._chunk, "left_chunks": self._left_chunks, "warm_up": self._warm_up}
        return {**config, **own}

    def build(
        self,
        query_shape: tuple[int | None, ...],
        value_shape: tuple[int | None, ...] | None = None,
        key_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        value_shape = query_shape if value_shape is None else value_shape
        key_shape = value_shape if key_shape is None else key_shape
        shapes = (query_shape, value_shape, key_shape)
        for name, shape in zip(("query", "value", "key"), shapes, strict=True):
            if len(shape) != 3:
                raise ValueError(f"Expected {name} of shape (B, T, E), but got {tuple(shape)}")
        super().build(*shapes)
        self._features = tuple(shape[-1] for shape in shapes)

    # Calls.

    def call(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        training: bool | None = None,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        return self._call_by_mode(
            query, value, key, training=training, streams=streams, update_state=update_state
        )

    def call_regular(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        training: bool | None = None,
    ) -> tf.Tensor:
        """Return attention on whole sequences. This does not use the streams' state.

        Args:
            query: `(B, T, E)`. The first chunk begins with its first step; the last may be shorter.
            value, key: `(B, T, Ev)`, `(B, T, Ek)`. None: the query, and the value.
            training: Whether dropout acts.

        Returns:
            `(B, T, E)`.
        """
        expect_given("query", query)
        query, value, key = self._without_masks(query, value, key)
        self._ensure_built(query, value, key)
        size = query.shape[1]
        chunk = tf.range(tf.shape(query)[1] if size is None else size) // self._chunk
        before = chunk[:, tf.newaxis] - chunk
        mask = (before >= 0) & (before <= self._left_chunks)
        return super().call(query, value, key, attention_mask=mask[tf.newaxis], training=training)

    def call_step(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> tf.Tensor | None:
        """Take the steps of a chunk of M streams.

        Args:
            query: `(M, C, E)`, oldest step first.
            value, key: `(M, C, Ev)`, `(M, C, Ek)`. None: the query, and the value.
            training: Whether dropout acts.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, C, E)`, or None while the receptive field fills (see `warm_up`).

        Raises:
            ValueError: If shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then continue as if the call had not
                been made.
        """
        expect_given("query", query)
        rows = np.shape(query)[1:2] if not tf.is_tensor(query) else tuple(query.shape[1:2])
        if rows != (self._chunk,):
            raise ValueError(
                f"Expected query of shape (M, {self._chunk}, E), a chunk of M streams, but got "
                f"{tuple(query.shape) if tf.is_tensor(query) else np.shape(query)}"
            )
        return self._take_steps(query, value, key, training, streams, update_state)

    def call_steps(
        self,
        query: TensorLike,
        value: TensorLike | None = None,
        key: TensorLike | None = None,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> tf.Tensor | None:
        """Take T steps of M streams, with the outputs and state of T / C calls of `call_step`.

        Gradients flow to the steps of this call. Those of earlier calls are constants.

        Args:
            query: `(M, T, E)`, oldest step first. T is a multiple of C.
            value, key: `(M, T, Ev)`, `(M, T, Ek)`. None: the query, and the value.
            training, streams, update_state: As in `call_step`.

        Returns:
            `(M, T', E)`: the outputs of those chunks that have L before them if `warm_up="none"` in
            eager mode, or None if there are none. Otherwise T' = T.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        return self._take_steps(query, value, key, training, streams, update_state)

    def compute_output_spec(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if args else kwargs.get("value")
        return keras.KerasTensor(
            self.compute_output_shape(query.shape, query.shape if value is None else value.shape),
            dtype=self.compute_dtype,
        )

    # Steps.

    def _without_masks(self, query: Any, value: Any, key: Any) -> tuple[Any, Any, Any]:
        query = without_keras_mask(keras.ops.convert_to_tensor(query))
        value = query if value is None else without_keras_mask(keras.ops.convert_to_tensor(value))
        key = value if key is None else without_keras_mask(keras.ops.convert_to_tensor(key))
        return query, value, key

    def _take_steps(
        self,
        query: TensorLike,
        value: TensorLike | None,
        key: TensorLike | None,
        training: bool | None,
        streams: TensorLike | None,
        update_state: bool,
    ) -> tf.Tensor | None:
        """Take the steps `(M, T, E)`, and return `(M, T', E)` or None."""
        self._check_policy()
        query = step_input("query", query, "steps", self.compute_dtype)
        value = query if value is None else step_input("value", value, "steps", self.compute_dtype)
        key = value if key is None else step_input("key", key, "steps", self.compute_dtype)
        check_same_rows(query=query, value=value, key=key)
        self._ensure_built(query, value, key)
        given = {"query": query, "value": value, "key": key}
        for (name, x), size in zip(given.items(), self._features, strict=True):
            check_features(name, x, size or 0)
        steps = query.shape[1]
        if steps is not None and (steps == 0 or steps % self._chunk):
            raise ValueError(
                f"Expected a multiple of {self._chunk} steps, whole chunks, but got "
                f"{tuple(query.shape)}"
            )
        query = in_blocks(query, self._chunk)
        rows, steps = rows_and_steps(query)

        def compute(step: Step) -> tf.Tensor | None:
            attended = self._attend(step, query, value, key, training)
            output = project(attended, self._output_dense, self.compute_dtype, training, axes=2)
            return self._ready_outputs(step, output)

        return self._streams.take_steps(
            self, compute, streams, rows, steps // self._chunk, update_state
        )

    def _attend(
        self, step: Step, query: tf.Tensor, value: tf.Tensor, key: tf.Tensor, training: bool | None
    ) -> tf.Tensor:
        """Return what the queries attend to, `(M, T, H, Dv)`, and keep what later chunks read."""
        dtype, size, kept = self.compute_dtype, self._chunk, self._stream_state
        queries = project(query, self._query_dense, dtype, training)
        keys = project(key, self._key_dense, dtype, training)
        values = project(value, self._value_dense, dtype, training)
        taken, before = tf.shape(query)[1], size * self._left_chunks
        position, number = step.rows_before(taken), step.numbers_of(taken)
        there = number >= 0
        if before > 0:
            first = max(0, step.rows_of_input.lag)
            new = {"keys": keys, "values": values}

            def keep() -> None:
                for name, rows in new.items():
                    put_steps(getattr(kept, name), rows, step.numbers, position)

            step.at_the_end(keep)
            past_keys, were_there = sequence_before(
                kept.keys, step.numbers, position, before, first
            )
            past_values, _ = sequence_before(kept.values, step.numbers, position, before, first)
            keys = tf.concat([past_keys, keys], 1)
            values = tf.concat([past_values, values], 1)
            there = tf.concat([were_there, there], 1)
        chunks = taken // size
        # The rows that each chunk attends to.
        attended = tf.range(chunks)[:, tf.newaxis] * size + tf.range(size + before)
        keys, values, there = (tf.gather(x, attended, axis=1) for x in (keys, values, there))
        rows = tf.shape(queries)[0]
        queries = tf.reshape(queries, [rows, chunks, size, self._num_heads, self._key_dim])
        wide = precise(dtype)
        logits = tf.einsum("mnchd,mnshd->mnhcs", cast(queries, wide), cast(keys, wide))
        hidden = tf.constant(-np.inf, wide)
        logits = tf.where(
            there[:, :, tf.newaxis, tf.newaxis], self._inverse_sqrt_key_dim * logits, hidden
        )
        # Rows before the sequence's first may see nothing at all.
        scores = tf.math.multiply_no_nan(
            tf.nn.softmax(logits), cast(there, wide)[:, :, tf.newaxis, tf.newaxis]
        )
        if self._dropout > 0:
            scores = self._dropout_layer(scores, training=training)
        result = tf.einsum("mnhcs,mnshd->mnchd", scores, cast(values, wide))
        result = tf.reshape(result, [rows, taken, self._num_heads, self._value_dim])
        return cast(result, dtype)
