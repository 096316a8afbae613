"""The plain-TensorFlow twin of the fused op: the same signature, the same results.

It gathers each query's window and attends to it. It runs in any TensorFlow, on any device, also
under XLA, and is written for clarity, not speed. Unlike the fused op it takes no lock in a graph:
its caller must see to it that no two threads step one cache at the same time. XLA leaves assertions
out, so under `jit_compile=True` the numbers of streams are not checked.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from continual_transformers_tf.ops.delay import minimum, put_steps, sizes, steps_before
from continual_transformers_tf.ops.stream_numbers import check_streams, stream_assertions

# Windows are gathered for at most this many steps at a time. So a call of many steps needs the
# memory of this many windows.
STEPS_PER_CHUNK = 64


class LogitTerms(NamedTuple):
    """Changes of attention's logits beside scaling and masking, in this order.

    Attributes:
        soft_cap: The bound c of c * tanh(logit / c), which replaces a scaled logit; None: none.
        bias: What is added to the logits: `[H, N]`, the window's oldest step first; in a regular
            call `[H, T, S]`. None: nothing.
        sink: `[H]`, the logit of a step without a value, which every query attends to: it only
            adds to the sum that the weights are divided by. None: none.
    """

    soft_cap: float | None = None
    bias: tf.Tensor | None = None
    sink: tf.Tensor | None = None

    def weights(self, logits: tf.Tensor, attended: tf.Tensor | None) -> tf.Tensor:
        """Return the softmax of scaled logits over the last axis; zeros if none are attended.

        Args:
            logits: `[M, H, T, N]`.
            attended: bool, broadcast to the logits: which are attended to. None: all.
        """
        if self.soft_cap is not None:
            logits = self.soft_cap * tf.tanh(logits / self.soft_cap)
        if self.bias is not None:
            bias = tf.cast(self.bias, logits.dtype)
            logits += bias[:, tf.newaxis] if bias.shape.rank == 2 else bias
        sink = None
        if self.sink is not None:
            sink = tf.cast(self.sink, logits.dtype)[:, tf.newaxis, tf.newaxis]
        return softmax(logits, attended, sink)


def attend_steps(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    key_cache: tf.Variable,
    value_cache: tf.Variable,
    key_mask_cache: tf.Variable,
    position: tf.Variable,
    streams: tf.Tensor,
    scale: tf.Tensor,
    attention_mask: list[tf.Tensor],
    key_mask: list[tf.Tensor],
    return_attention_scores: bool,
    update_state: bool,
    dropout: Callable[[tf.Tensor], tf.Tensor] | None = None,
    advance_position: bool = True,
    start: tf.Tensor | None = None,
    terms: LogitTerms | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Do what the op `ContinualTransformers>SingleOutputAttention` in cc/tensorflow does.

    The differences: this takes the cache's variables, not their handles; it takes `dropout`, a
    function that is applied to the scores before they weight the values; it takes `terms` of the
    logits; it takes `start`, int64 `[M]`, in place of the streams' positions; keys and values may
    have fewer heads than queries, a divisor; and it returns no window for its gradient.
    """
    terms = terms or LogitTerms()
    mask = attention_mask[0] if attention_mask else None
    check_static(query, key, value, key_cache, value_cache, streams)
    key_mask = key_mask[0] if key_mask else tf.ones(sizes(query, 2), bool)
    with tf.control_dependencies(
        check_values(query, key, value, streams, position, mask, key_mask, key_cache)
    ):
        streams = tf.identity(streams)  # All that follows waits for the checks.
    start = tf.gather(position, streams) if start is None else start  # [M]
    seq_len = key_cache.shape[1]

    # The N steps before this call and its own, in order: column c is step start - N + c.
    news = [(key_cache, key), (value_cache, value), (key_mask_cache, key_mask)]
    keys, values, has_key = (
        tf.concat([steps_before(ring, streams, start, seq_len), new], 1) for ring, new in news
    )
    keys, values = heads_first(keys), heads_first(values)  # [M, H, N + T, D or Dv]

    num_steps = query.shape[1]
    chunk = STEPS_PER_CHUNK if num_steps is not None else tf.shape(query)[1]
    first_column = tf.expand_dims(start, 1) - seq_len  # Its step.
    outputs, scores = [], []
    for first in range(0, num_steps if num_steps is not None else 1, STEPS_PER_CHUNK):
        steps = tf.range(first, minimum(first + chunk, sizes(query, 2)[1]))
        # Step t's window is columns t + 1, ..., t + N.
        columns = tf.expand_dims(steps, 1) + tf.range(1, seq_len + 1)  # [t, N]
        step_of = tf.expand_dims(first_column, 1) + tf.cast(columns, tf.int64)
        attended = (step_of >= 0) & tf.gather(has_key, columns, axis=1)
        attended = tf.expand_dims(attended, 1)  # [M, 1, t, N]
        if mask is not None:
            attended &= mask if mask.shape[2] == 1 else tf.gather(mask, steps, axis=2)
        output, weights = _attend(
            tf.gather(query, steps, axis=1),
            tf.gather(keys, columns, axis=2),
            tf.gather(values, columns, axis=2),
            attended,
            scale,
            dropout,
            terms,
        )
        outputs.append(output)
        scores.append(weights)

    output = tf.concat(outputs, 1)
    scores = tf.concat(scores, 2)
    if not return_attention_scores:
        scores = scores[..., :0]
    steps_taken = start + tf.cast(sizes(query, 2)[1], tf.int64)
    if update_state:
        # In a graph, all reads and all that can fail come before the first change.
        with tf.control_dependencies([keys, values, output, scores]):
            for ring, new in news:
                put_steps(ring, new, streams, start)
            if advance_position:
                position.scatter_nd_update(tf.expand_dims(streams, 1), steps_taken)
    return output, scores, steps_taken


def _attend(
    query: tf.Tensor,
    keys: tf.Tensor,
    values: tf.Tensor,
    attended: tf.Tensor,
    scale: tf.Tensor,
    dropout: Callable[[tf.Tensor], tf.Tensor] | None,
    terms: LogitTerms,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Attend: query [M, t, H, D], keys and values [M, Hk, t, N, D or Dv], attended [M, *, t, N]."""
    dtype = query.dtype  # Half precision is for the rings only.
    scale = tf.cast(scale, dtype)
    group = query.shape[2] // keys.shape[1]
    if group > 1:  # Successive queries share keys and values.
        keys, values = (tf.repeat(x, group, axis=1) for x in (keys, values))
    # Select instead of multiplying by zero: a masked step may be NaN.
    whole_rows = tf.expand_dims(attended, -1)
    keys = tf.where(whole_rows, tf.cast(keys, dtype), 0)
    values = tf.where(whole_rows, tf.cast(values, dtype), 0)
    weights = terms.weights(scale * tf.einsum("mthd,mhtnd->mhtn", query, keys), attended)
    dropped = weights if dropout is None else tf.cast(dropout(weights), dtype)
    return tf.einsum("mhtn,mhtnd->mthd", dropped, values), weights


def softmax(
    logits: tf.Tensor, attended: tf.Tensor | None, sink: tf.Tensor | None = None
) -> tf.Tensor:
    """Return the softmax of the attended logits over the last axis; zeros if there are none.

    Args:
        logits: `[M, H, T, N]`.
        attended: bool, broadcast to the logits; None: all.
        sink: A logit `[H, 1, 1]` that adds to the sum only; None: none.
    """
    if attended is not None:
        logits = tf.where(attended, logits, -float("inf"))
    highest = tf.reduce_max(logits, -1, keepdims=True)
    if sink is not None:
        highest = tf.maximum(highest, sink)
    highest = tf.where(tf.math.is_inf(highest) & (highest < 0), tf.zeros_like(highest), highest)
    weights = tf.exp(logits - highest)
    total = tf.reduce_sum(weights, -1, keepdims=True)
    if sink is not None:
        total += tf.exp(sink - highest)
    # A row that attends to nothing is zeros, not 0 / 0.
    return tf.math.divide_no_nan(weights, total)


def heads_first(x: tf.Tensor) -> tf.Tensor:
    """Return `[M, T, H, D]` as `[M, H, T, D]`."""
    return tf.transpose(x, (0, 2, 1, 3))


def check_static(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    key_cache: tf.Variable,
    value_cache: tf.Variable,
    streams: tf.Tensor,
) -> None:
    """Raise ValueError if known shapes do not fit, as the op's shape function does."""
    for name, tensor, axes in (
        ("query", query, "[M, T, H, D]"),
        ("key", key, "[M, T, Hk, D]"),
        ("value", value, "[M, T, Hk, Dv]"),
    ):
        if tensor.shape.rank != 4:
            raise ValueError(f"Expected {name} of rank 4, {axes}, but got {tensor.shape}")
    m, t, h, _ = query.shape
    _, _, held_heads, d = key_cache.shape
    dv = value_cache.shape[3]
    heads = held_heads if h is None or h % held_heads else h
    for name, tensor, expected in (
        ("query", query, [m, t, heads, d]),
        ("key", key, [m, t, held_heads, d]),
        ("value", value, [m, t, held_heads, dv]),
        ("streams", streams, [m]),
    ):
        if not tensor.shape.is_compatible_with(expected):
            raise ValueError(f"Expected {name} of shape {expected}, but got {tensor.shape}")
    if t == 0:
        raise ValueError(f"Expected at least one step, but got query {query.shape}")


def check_values(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    streams: tf.Tensor,
    position: tf.Variable,
    mask: tf.Tensor | None,
    key_mask: tf.Tensor,
    key_cache: tf.Variable,
) -> list[tf.Operation]:
    """Check the values: in eager mode at once, in a graph by the ops that it returns."""
    if tf.executing_eagerly():
        check_streams(streams.numpy(), int(tf.shape(position)[0]))
        return []
    shape = tf.shape(query)
    assertions = [
        tf.debugging.assert_positive(shape[1], "Expected at least one step, but got 0"),
        tf.debugging.assert_equal(
            tf.shape(key)[:2], shape[:2], "Expected key of the M and T of query"
        ),
        tf.debugging.assert_equal(
            tf.shape(value)[:2], shape[:2], "Expected value of the M and T of query"
        ),
        tf.debugging.assert_equal(
            tf.shape(streams)[0], shape[0], "Expected as many streams as query has rows"
        ),
        tf.debugging.assert_equal(
            tf.shape(key_mask), shape[:2], "Expected key_mask of the M and T of query"
        ),
        *stream_assertions(streams, tf.shape(position)[0]),
    ]
    if mask is not None:
        got = tf.shape(mask)
        full = tf.gather(shape, [0, 2, 1])
        axes = "[M, H, T, N]" if mask.shape.rank == 4 else "[M, H, T, N, N]"
        assertions += [
            tf.debugging.Assert(
                tf.reduce_all((got[:3] == 1) | (got[:3] == full))
                & tf.reduce_all(got[3:] == key_cache.shape[1]),
                [f"Expected attention_mask of shape {axes}, with M, H, T", full, "got", got],
            )
        ]
    return assertions
