"""What a step of `CoSiMultiHeadAttention` does: project, attend in one op, project back."""

import tensorflow as tf

from continual_transformers_tf.layers.co_si_step import fixed_mask
from continual_transformers_tf.layers.continual_layer import always_partial_here
from continual_transformers_tf.layers.inputs import (
    check_features,
    check_same_rows,
    rows_and_steps,
    step_input,
)
from continual_transformers_tf.layers.step_ops import cast, project
from continual_transformers_tf.ops.delay import delayed_steps, put_steps
from continual_transformers_tf.ops.single_output import (
    attend_steps,
    expand_key_mask,
    expand_mask,
    put_window,
)


def take_steps(
    layer,
    rank,
    query,
    value,
    key,
    attention_mask,
    query_mask,
    value_mask,
    key_mask,
    use_causal_mask,
    return_attention_scores,
    training,
    streams,
    update_state,
):
    """One step (rank 2) or several (rank 3); the arguments of `call_step` and `call_steps`.

    Returns:
        (outputs, scores or None), or (None, None) while the window fills.
    """
    query, value, key = step_inputs(layer, rank, query, value, key)
    cache, dtype = layer._stream_state, layer.compute_dtype
    mask = fixed_mask(layer, use_causal_mask)
    if attention_mask is not None:
        given = expand_mask(attention_mask, query.shape[0], query.shape[1], cache)
        mask = given if mask is None else mask & given
    query_mask, value_mask, key_mask = (
        expand_key_mask(name, given, query, rank == 2)
        for name, given in (
            ("query_mask", query_mask),
            ("value_mask", value_mask),
            ("key_mask", key_mask),
        )
    )
    rows, steps = rows_and_steps(query)

    def compute(step):
        keys = cast(project(key, layer._key_dense, dtype, training), cache.dtype)
        values = cast(project(value, layer._value_dense, dtype, training), cache.dtype)
        asks = {"query": project(query, layer._query_dense, dtype, training)}
        if layer._use_gate:
            asks["gate"] = project(query, layer._gate_dense, dtype, training)
        if query_mask is not None:
            asks["query_mask"] = query_mask
        if layer.delay > 0:
            new, asks = _exchange(layer, asks, step)
            step.at_the_end(lambda: put_all(cache, new, step))
        asked = mask
        if "query_mask" in asks:
            asking = tf.expand_dims(tf.expand_dims(asks["query_mask"], 1), 3)  # [M, 1, T, 1]
            everything = tf.ones([1, 1, 1, layer.seq_len], bool)
            asked = asking & (everything if mask is None else mask)
        present = both_masks(value_mask, key_mask)
        attended, scores, steps_taken = attend_steps(
            cast(asks["query"], cache.compute_dtype),
            keys,
            values,
            cache,
            streams=step.numbers,
            attention_mask=asked,
            key_mask=present,
            scale=layer._inverse_sqrt_key_dim,
            return_attention_scores=return_attention_scores,
            update_state=step.writes_rings,
            advance_position=False,
            training=training,
            dropout=scores_dropout(layer, training),
        )
        if not step.one:
            step.at_the_end(lambda: put_window(cache, keys, values, present, step))
        attended, scores = cast(attended, dtype), cast(scores, dtype)
        if layer._use_gate:
            attended *= asks["gate"]
        unready = unready_steps(layer, query, steps_taken)
        if unready == query.shape[1]:
            return None, None
        if unready > 0:
            attended, scores = attended[:, unready:], scores[:, :, unready:]
        output = project(attended, layer._output_dense, dtype, training, axes=2)
        if rank == 2:
            output, scores = tf.squeeze(output, 1), tf.squeeze(scores, 2)
        return output, scores if return_attention_scores else None

    return cache.streams.take_steps(layer, compute, streams, rows, steps, update_state)


def put_all(state, rows, step):
    """Put the rows (M, T, ...) of a step's tokens into the rings of these names."""
    for name, new in rows.items():
        put_steps(getattr(state, name), new, step.numbers, step.position)


def step_inputs(layer, rank, query, value, key):
    """query, value and key as tensors `(M, T, E)` that fit each other and the layer."""
    if layer._no_steps is not None:
        raise ValueError(
            f"Expected regular calls only: with {layer._no_steps} the layer is a "
            "keras.layers.MultiHeadAttention, and a step adds to windows (B, T, E) along time"
        )
    layer._check_policy()
    dtype, mode = layer.compute_dtype, "step" if rank == 2 else "steps"
    query = step_input("query", query, mode, dtype)
    value = query if value is None else step_input("value", value, mode, dtype)
    key = value if key is None else step_input("key", key, mode, dtype)
    check_same_rows(query=query, value=value, key=key)
    layer._ensure_built(query, value, key)
    for name, x, size in zip(
        ("query", "value", "key"), (query, value, key), layer._features, strict=True
    ):
        check_features(name, x, size)
    if rank == 3:
        return query, value, key
    # Self-attention is seen by its inputs being one and the same.
    steps = tf.expand_dims(query, 1)
    values = steps if value is query else tf.expand_dims(value, 1)
    if key is value:
        return steps, values, values
    return steps, values, steps if key is query else tf.expand_dims(key, 1)


def _exchange(layer, asks, step):
    """This call's queries, and what goes with them, for those whose turn it is.

    Returns:
        (what is to be put into the rings, what is asked now).
    """
    shape = tf.shape(asks["query"])[:2]
    new = {"query_mask": tf.ones(shape, bool), **asks}
    cache = layer._stream_state
    due = {
        name: delayed_steps(getattr(cache, name), steps, step.numbers, step.position)
        for name, steps in new.items()
    }
    # Before as many steps as it is delayed by there is no query.
    number = tf.expand_dims(step.position, 1) + tf.range(tf.cast(shape[1], tf.int64))
    waited = number >= layer.delay
    due["query_mask"] &= waited
    if "gate" in due:  # Selected: what an earlier stream left there may be NaN.
        due["gate"] = tf.where(waited[:, :, tf.newaxis, tf.newaxis], due["gate"], 0)
    return new, due


def both_masks(mask, other):
    """Where both are true; None for a mask that is left out."""
    if mask is None or other is None:
        return mask if other is None else other
    return mask & other


def scores_dropout(layer, training):
    """What is applied to attention's scores, or None where nothing is."""
    if not training or layer._dropout == 0:
        return None
    return lambda scores: layer._dropout_layer(scores, training=True)


def unready_steps(layer, query, steps_taken):
    """How many of a call's oldest steps give no output: all, while the window fills."""
    first = layer.seq_len if layer.active_warm_up == "none" else layer.delay + 1
    if first == 1 or not tf.executing_eagerly() or always_partial_here():
        return 0  # A whole of layers takes what there is, and says itself when it is ready.
    steps = query.shape[1]
    furthest = int(steps_taken.numpy().max(initial=0))
    return steps - max(0, min(steps, furthest - first + 1))
