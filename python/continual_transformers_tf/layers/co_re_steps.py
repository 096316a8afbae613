"""What a step of `CoReMultiHeadAttention` does: project, attend in one op, project back."""

import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.co_si_steps import (
    both_masks,
    scores_dropout,
    step_inputs,
    unready_steps,
)
from continual_transformers_tf.layers.inputs import rows_and_steps
from continual_transformers_tf.layers.step_ops import cast, project
from continual_transformers_tf.ops.delay import put_steps, windows_of
from continual_transformers_tf.ops.retroactive import attend_all_steps, put_whole_window
from continual_transformers_tf.ops.single_output import expand_key_mask, expand_mask


def take_all_steps(
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
    if query_mask is not None:
        raise ValueError(
            "Expected no query_mask in a step, but got one: a query stays in the window for N "
            "steps, in whose calls its mask would be forgotten; leave its row of the output out "
            "instead, or give its row of attention_mask as False"
        )
    query, value, key = step_inputs(layer, rank, query, value, key)
    cache, dtype = layer._stream_state, layer.compute_dtype
    mask = window_mask(layer, use_causal_mask)
    if attention_mask is not None:
        given = expand_mask(attention_mask, *query.shape[:2], cache, all_rows=True)
        mask = given if mask is None else mask & given
    value_mask, key_mask = (
        expand_key_mask(name, given, query, rank == 2)
        for name, given in (("value_mask", value_mask), ("key_mask", key_mask))
    )
    rows, steps = rows_and_steps(query)
    dropout = scores_dropout(layer, training)

    def compute(step):
        queries, keys, values = (
            cast(project(x, dense, dtype, training), cache.dtype)
            for x, dense in (
                (query, layer._query_dense),
                (key, layer._key_dense),
                (value, layer._value_dense),
            )
        )
        if layer._use_gate:
            gate = project(query, layer._gate_dense, dtype, training)
            gates, _ = windows_of(cache.gate, gate, step.numbers, step.position, layer.seq_len)
            step.at_the_end(lambda: put_steps(cache.gate, gate, step.numbers, step.position))
        present = both_masks(value_mask, key_mask)
        attended, scores, steps_taken = attend_all_steps(
            queries,
            keys,
            values,
            cache,
            streams=step.numbers,
            attention_mask=mask,
            key_mask=present,
            scale=layer._inverse_sqrt_key_dim,
            return_attention_scores=return_attention_scores,
            algorithm=layer.algorithm,
            update_state=step.writes_rings,
            advance_position=False,
            training=training,
            dropout=None if dropout is None else lambda x: cast(dropout(x), cache.dtype),
        )
        if not step.one:
            step.at_the_end(lambda: put_whole_window(cache, queries, keys, values, present, step))
        unready = unready_steps(layer, query, steps_taken)
        if unready == query.shape[1]:
            return None, None
        attended = tf.transpose(cast(attended, dtype), (0, 1, 3, 2, 4))  # [M, T, N, H, Dv]
        if layer._use_gate:
            attended *= gates
        if unready > 0:
            attended = attended[:, unready:]
        output = project(attended, layer._output_dense, dtype, training, axes=2)
        output = _without_rows_never_taken(layer, output, steps_taken)
        if not return_attention_scores:
            return tf.squeeze(output, 1) if rank == 2 else output, None
        scores = cast(scores, dtype)[:, :, unready:]
        if rank == 2:
            output, scores = tf.squeeze(output, 1), tf.squeeze(scores, 2)
        return output, scores

    return cache.streams.take_steps(layer, compute, streams, rows, steps, update_state)


def window_mask(layer, use_causal_mask):
    """What the layer does not let the queries of its window attend to: `[1, 1, 1, N, N]`, or None.

    A causal query attends to what there still is in the window of the steps up to its own.
    """
    step = np.arange(layer.seq_len)
    age = step[:, np.newaxis] - step
    allowed = np.full(age.shape, True)
    if layer._sliding_window is not None:
        allowed &= np.abs(age) < layer._sliding_window
    if use_causal_mask:
        allowed &= age >= 0
    if allowed.all():
        return None
    return tf.constant(allowed[np.newaxis, np.newaxis, np.newaxis])


def _without_rows_never_taken(layer, output, steps_taken):
    """Of an output [M, T, N, ...] those rows are zeros, not the projection's bias."""
    if tf.executing_eagerly() and not (steps_taken.numpy() < _full_from(layer, output)).any():
        return output
    shape = tf.shape(output)
    steps = tf.cast(tf.range(shape[1]) - (shape[1] - 1), tf.int64) + steps_taken[:, tf.newaxis]
    rows = tf.range(layer.seq_len, dtype=tf.int64) - layer.seq_len + 1  # 0: the newest step's.
    taken = steps[:, :, tf.newaxis] + rows > 0  # [M, T, N]
    taken = tf.reshape(taken, tf.concat([shape[:3], [1] * (output.shape.rank - 3)], 0))
    return tf.where(taken, output, 0)


def _full_from(layer, output):
    """How many steps a stream has taken after these, where the first of them had a full window."""
    return layer.seq_len + output.shape[1] - 1
