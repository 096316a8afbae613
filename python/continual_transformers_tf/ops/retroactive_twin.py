"""The plain-TensorFlow twin of the fused op: the same results, every row computed again.

As `single_output_twin` it is written for clarity and takes no lock. It keeps no softmax of the
rows. It marks the one that the fused op has kept as nobody's, so that the op computes it again.
"""

from collections.abc import Callable

import tensorflow as tf

from continual_transformers_tf.ops.delay import minimum, put_steps, sizes, steps_before
from continual_transformers_tf.ops.single_output_twin import (
    check_static,
    check_values,
    heads_first,
    softmax,
)

# Windows are gathered for so many steps at a time that together they have about this many rows. So
# a call of many steps needs the memory of this many rows, and of their scores over the window.
ROWS_PER_CHUNK = 2048


def attend_all_steps(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    key_cache: tf.Variable,
    value_cache: tf.Variable,
    key_mask_cache: tf.Variable,
    position: tf.Variable,
    query_cache: tf.Variable,
    made_with: tf.Variable,
    streams: tf.Tensor,
    scale: tf.Tensor,
    key_mask: list[tf.Tensor],
    update_state: bool,
    attention_mask: tf.Tensor | None = None,
    return_attention_scores: bool = False,
    dropout: Callable[[tf.Tensor], tf.Tensor] | None = None,
    advance_position: bool = True,
) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor]:
    """Do what the op `ContinualTransformers>RetroactiveAttention` in cc/tensorflow does.

    The differences: this takes the cache's variables, not their handles, and only those that it
    uses; it takes `attention_mask`, bool `[M, H, T, N, N]`, whose first three axes may be 1; and it
    takes `dropout`, a function that is applied to the scores before they weight the values.

    Returns:
        (output; scores `[M, H, T, N, N]`, or None if they are not wanted; steps_taken).
    """
    check_static(query, key, value, key_cache, value_cache, streams)
    key_mask = key_mask[0] if key_mask else tf.ones(sizes(query, 2), bool)
    with tf.control_dependencies(
        check_values(query, key, value, streams, position, attention_mask, key_mask, key_cache)
    ):
        streams = tf.identity(streams)  # All that follows waits for the checks.
    start = tf.gather(position, streams)  # [M]
    seq_len = key_cache.shape[1]

    # The N steps before this call and its own, in order: column c is step start - N + c.
    caches = (query_cache, key_cache, value_cache, key_mask_cache)
    news = list(zip(caches, (query, key, value, key_mask), strict=True))
    *rows, has_key = (
        tf.concat([steps_before(ring, streams, start, seq_len), new], 1) for ring, new in news
    )
    queries, keys, values = map(heads_first, rows)  # [M, H, N + T, D or Dv]

    num_steps = query.shape[1]
    chunk = max(1, ROWS_PER_CHUNK // seq_len) if num_steps is not None else tf.shape(query)[1]
    first_column = tf.expand_dims(start, 1) - seq_len  # Its step.
    outputs, weights_of_chunks = [], []
    for first in [0] if num_steps is None else range(0, num_steps, chunk):
        steps = tf.range(first, minimum(first + chunk, sizes(query, 2)[1]))
        # Step t's window is columns t + 1, ..., t + N.
        columns = tf.expand_dims(steps, 1) + tf.range(1, seq_len + 1)  # [t, N]
        step_of = tf.expand_dims(first_column, 1) + tf.cast(columns, tf.int64)
        taken = step_of >= 0
        mask = attention_mask
        if mask is not None and mask.shape[2] != 1 and num_steps is not None:
            mask = mask[:, :, first : first + chunk]
        output, weights = _attend(
            tf.gather(queries, columns, axis=2),
            tf.gather(keys, columns, axis=2),
            tf.gather(values, columns, axis=2),
            tf.expand_dims(taken, 1),
            tf.expand_dims(taken & tf.gather(has_key, columns, axis=1), 1),
            mask,
            scale,
            dropout,
        )
        outputs.append(output)
        if return_attention_scores:
            weights_of_chunks.append(weights)

    output = tf.concat(outputs, 1)
    scores = tf.concat(weights_of_chunks, 2) if return_attention_scores else None
    steps_taken = start + tf.cast(sizes(query, 2)[1], tf.int64)
    if update_state:
        # In a graph, all reads and all that can fail come before the first change.
        with tf.control_dependencies([queries, keys, values, output]):
            for ring, new in news:
                put_steps(ring, new, streams, start)
            indices = tf.expand_dims(streams, 1)
            nobodys = tf.zeros([*sizes(streams, 1), 2], made_with.dtype)
            made_with.scatter_nd_update(indices, nobodys)
            if advance_position:
                position.scatter_nd_update(indices, steps_taken)
    return output, scores, steps_taken


def _attend(
    queries: tf.Tensor,
    keys: tf.Tensor,
    values: tf.Tensor,
    taken: tf.Tensor,
    attended: tf.Tensor,
    mask: tf.Tensor | None,
    scale: tf.Tensor,
    dropout: Callable[[tf.Tensor], tf.Tensor] | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Attend: queries, keys, values [M, H, t, N, D or Dv], taken and attended [M, 1, t, N]."""
    # Select instead of multiplying by zero: a masked step, or one that was never taken, may be NaN.
    taken = tf.expand_dims(taken, -1)
    queries = tf.where(taken, queries, 0)
    keys, values = (tf.where(tf.expand_dims(attended, -1), x, 0) for x in (keys, values))
    logits = tf.cast(scale, queries.dtype) * tf.einsum("mhtrd,mhtnd->mhtrn", queries, keys)
    attended = tf.expand_dims(attended, -2) & taken
    weights = softmax(logits, attended if mask is None else attended & mask)
    dropped = weights if dropout is None else dropout(weights)
    return tf.einsum("mhtrn,mhtnd->mthrd", dropped, values), weights
