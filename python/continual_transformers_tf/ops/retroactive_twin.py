"""The plain-TensorFlow twin of the fused op: the same results, every row computed anew.

What `single_output_twin` says of itself holds here too. Of the rows' softmax it keeps nothing, and
marks what the fused op has kept as made with nobody's arithmetic, so that this begins anew.
"""

import tensorflow as tf

from continual_transformers_tf.ops.delay import minimum, put_steps, sizes, steps_before
from continual_transformers_tf.ops.single_output_twin import (
    check_static,
    check_values,
    heads_first,
    softmax,
)

# Windows are gathered for so many steps at a time that together they have about as many rows: the
# memory of a call of many steps is that of so many rows, and their scores over the window.
ROWS_PER_CHUNK = 2048


def attend_all_steps(
    query,
    key,
    value,
    key_cache,
    value_cache,
    key_mask_cache,
    position,
    query_cache,
    made_with,
    streams,
    scale,
    key_mask,
    update_state,
    attention_mask=None,
    return_attention_scores=False,
    dropout=None,
    advance_position=True,
):
    """See `ContinualTransformers>RetroactiveAttention` in cc/tensorflow/retroactive_op.cc.

    Differs in what it takes for the cache: variables, not their handles, and only those that it
    uses; in `attention_mask`, bool `[M, H, T, N, N]` whose first three axes may be 1; and in
    `dropout`, which is applied to the scores before they weight the values.

    Returns:
        (output, scores `[M, H, T, N, N]` or None where not wanted, steps_taken).
    """
    check_static(query, key, value, key_cache, value_cache, streams)
    key_mask = key_mask[0] if key_mask else tf.ones(sizes(query, 2), bool)
    with tf.control_dependencies(
        check_values(query, key, value, streams, position, attention_mask, key_mask, key_cache)
    ):
        streams = tf.identity(streams)  # What comes after waits for the checks.
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
    outputs, scores = [], []
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
            *(tf.gather(x, columns, axis=2) for x in (queries, keys, values)),
            tf.expand_dims(taken, 1),
            tf.expand_dims(taken & tf.gather(has_key, columns, axis=1), 1),
            mask,
            scale,
            dropout,
        )
        outputs.append(output)
        if return_attention_scores:
            scores.append(weights)

    output = tf.concat(outputs, 1)
    scores = tf.concat(scores, 2) if return_attention_scores else None
    steps_taken = start + tf.cast(sizes(query, 2)[1], tf.int64)
    if update_state:
        # In a graph, what is read is read before the state changes, and what fails has failed.
        with tf.control_dependencies([queries, keys, values, output]):
            for ring, new in news:
                put_steps(ring, new, streams, start)
            indices = tf.expand_dims(streams, 1)
            nobodys = tf.zeros([*sizes(streams, 1), 2], made_with.dtype)
            made_with.scatter_nd_update(indices, nobodys)
            if advance_position:
                position.scatter_nd_update(indices, steps_taken)
    return output, scores, steps_taken


def _attend(queries, keys, values, taken, attended, mask, scale, dropout):
    """queries, keys and values [M, H, t, N, D or Dv], taken and attended [M, 1, t, N]."""
    # Selected, not multiplied by zero: what no step has written, or must not be attended to, can be
    # NaN.
    taken = tf.expand_dims(taken, -1)
    queries = tf.where(taken, queries, 0)
    keys, values = (tf.where(tf.expand_dims(attended, -1), x, 0) for x in (keys, values))
    logits = tf.cast(scale, queries.dtype) * tf.einsum("mhtrd,mhtnd->mhtrn", queries, keys)
    attended = tf.expand_dims(attended, -2) & taken
    weights = softmax(logits, attended if mask is None else attended & mask)
    dropped = weights if dropout is None else dropout(weights)
    return tf.einsum("mhtrn,mhtnd->mthrd", dropped, values), weights
