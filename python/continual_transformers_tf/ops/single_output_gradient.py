"""The gradient of continual single-output attention, by matrix products.

The call as a whole has one row of N - 1 + T keys, and each step's query attends to N columns of it.
So the gradient of many steps is that of attention with a band as its mask. It is computed for as
many queries at a time as a window is long: at most twice the work, all of it in large products.
"""

from typing import Any

import tensorflow as tf

# At least so many queries are computed at a time, however short the window is.
LEAST_QUERIES = 64

NO_GRADIENT = (
    "Expected no gradient of this step, a graph's single one, which kept nothing for it: enter "
    "tf.GradientTape within the tf.function, or call with training=True, or take several steps"
)


def op_gradient(
    op: tf.Operation, output_gradient: tf.Tensor, scores_gradient: tf.Tensor, *_: Any
) -> list[tf.Tensor | None]:
    """Return the gradient of `ContinualTransformers>SingleOutputAttention` to each of its inputs.

    Only the query, key, value and scale have one: the rings are constants. The op has returned the
    steps in the rings, and has then overwritten them. If it has not returned them, there is no
    gradient. Then this fails with tf.errors.InvalidArgumentError when it runs, and not here:
    TensorFlow also prepares gradients that nobody asks for.
    """
    if not op.get_attr("return_window"):
        with tf.control_dependencies([tf.debugging.Assert(False, [NO_GRADIENT])]):
            of_inputs = [tf.identity(tf.zeros_like(x)) for x in op.inputs[:3]]
        return of_inputs + [None] * (len(op.inputs) - 3)
    query, key, value, *_, scale = op.inputs[:9]
    has_attention_mask = op.get_attr("num_attention_masks") == 1
    has_key_mask = op.get_attr("num_key_masks") == 1
    _, _, steps_taken, window_key, window_value, window_key_mask = op.outputs
    keys, values = (
        tf.concat([old, _heads_first(new)], 2)
        for old, new in ((window_key, key), (window_value, value))
    )
    of_query, of_key, of_value, of_scale = _gradients(
        query,
        keys,
        values,
        tf.concat(
            [window_key_mask, op.inputs[-1] if has_key_mask else tf.ones(tf.shape(key)[:2], bool)],
            1,
        ),
        steps_taken - tf.shape(query, tf.int64)[1],
        op.inputs[9] if has_attention_mask else None,
        scale,
        output_gradient,
        scores_gradient if op.get_attr("return_attention_scores") else None,
    )
    of_inputs = [of_query, of_key, of_value, *[None] * 5, of_scale]
    return of_inputs + [None] * (len(op.inputs) - len(of_inputs))


def _gradients(
    query: tf.Tensor,
    keys: tf.Tensor,
    values: tf.Tensor,
    has_key: tf.Tensor,
    position: tf.Tensor,
    mask: tf.Tensor | None,
    scale: tf.Tensor,
    d_output: tf.Tensor,
    d_scores: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the gradients to query, key, value and scale.

    Args:
        query: `[M, T, H, D]`.
        keys, values: `[M, H, N - 1 + T, D | Dv]`; column c is step position - (N - 1) + c.
        has_key: bool `[M, N - 1 + T]`: which of these columns have a key.
        position: int64 `[M]`: the number of steps taken before.
        mask: bool `[M | 1, H | 1, T | 1, N]` or None.
        scale: float64 scalar.
        d_output, d_scores: The gradients of the outputs, `[M, T, H, Dv]` and `[M, H, T, N]` or
            None.
    """
    dtype, cache_dtype = query.dtype, keys.dtype
    query, d_output = _heads_first(query), _heads_first(d_output)
    keys, values = tf.cast(keys, dtype), tf.cast(values, dtype)
    scale = tf.cast(scale, dtype)
    num_steps, num_columns = tf.shape(query)[2], tf.shape(keys)[2]
    before = num_columns - num_steps  # N - 1
    columns = tf.range(num_columns)
    step = position[:, tf.newaxis] + tf.cast(columns - before, tf.int64)
    has_key &= step >= 0

    at_once = query.shape[2]
    if at_once is not None and keys.shape[2] is not None:
        at_once = max(LEAST_QUERIES, keys.shape[2] - at_once + 1)
    of_query: list[tf.Tensor] = []
    # These sums become tensors with the first chunk.
    of_keys: tf.Tensor = 0.0
    of_values: tf.Tensor = 0.0
    of_scale: tf.Tensor = 0.0
    for first in range(0, query.shape[2] or 1, at_once or 1):
        last = num_steps if at_once is None else tf.minimum(first + at_once, num_steps)
        chunk = slice(first, last)
        span = slice(first, last + before)  # The columns of the chunk's queries.
        age = columns[span] - tf.range(num_steps)[chunk, tf.newaxis]  # 0: the window's oldest step.
        attended = ((age >= 0) & (age <= before)) & has_key[:, tf.newaxis, tf.newaxis, span]
        if mask is not None:
            attended &= _by_age(mask if mask.shape[2] == 1 else mask[:, :, chunk], age)
        q, k, v = query[:, :, chunk], keys[:, :, span], values[:, :, span]
        products = tf.where(attended, tf.matmul(q, k, transpose_b=True), 0)
        weights = _softmax(scale * products, attended)
        # Masked steps and queries may be NaN, and zero times NaN is NaN. A NaN that was attended
        # to has by now made the weights NaN, or the loss.
        q, k, v = (tf.where(tf.math.is_finite(x), x, 0) for x in (q, k, v))
        d_weights = tf.matmul(d_output[:, :, chunk], v, transpose_b=True)
        if d_scores is not None:
            d_weights += tf.where(attended, _by_age(d_scores[:, :, chunk], age), 0)
        d_logits = weights * (d_weights - tf.reduce_sum(weights * d_weights, -1, keepdims=True))
        of_query.append(scale * tf.matmul(d_logits, k))
        around = [[0, 0], [0, 0], [first, num_steps - last], [0, 0]]
        of_keys += tf.pad(scale * tf.matmul(d_logits, q, transpose_a=True), around)
        of_values += tf.pad(tf.matmul(weights, d_output[:, :, chunk], transpose_a=True), around)
        of_scale += tf.reduce_sum(d_logits * products)

    of_key, of_value = (_heads_first(x[:, :, before:]) for x in (of_keys, of_values))
    return (
        _heads_first(tf.concat(of_query, 2)),
        tf.cast(of_key, cache_dtype),
        tf.cast(of_value, cache_dtype),
        tf.cast(of_scale, tf.float64),
    )


def _softmax(logits: tf.Tensor, attended: tf.Tensor) -> tf.Tensor:
    logits = tf.where(attended, logits, -float("inf"))
    highest = tf.reduce_max(logits, -1, keepdims=True)
    weights = tf.exp(logits - tf.where(highest == -float("inf"), tf.zeros_like(highest), highest))
    return tf.math.divide_no_nan(weights, tf.reduce_sum(weights, -1, keepdims=True))


def _by_age(x: tf.Tensor, age: tf.Tensor) -> tf.Tensor:
    """Return the entries of x `[M, H, t | 1, N]` at these ages `[t, C]`: `[M, H, t, C]`."""
    age = tf.clip_by_value(age, 0, tf.shape(x)[3] - 1)
    if x.shape[2] == 1 and age.shape[0] != 1:
        return tf.gather(x[:, :, 0], age, axis=2)
    shape = tf.concat([tf.shape(x)[:2], tf.shape(age)], 0)
    return tf.gather(x, tf.broadcast_to(age, shape), axis=3, batch_dims=3)


def _heads_first(x: tf.Tensor) -> tf.Tensor:
    """Turn `[M, T, H, D]` into `[M, H, T, D]`, or back."""
    return tf.transpose(x, (0, 2, 1, 3))
