"""What a step of `CoReMultiHeadAttention` does: project, attend in one op, project back."""

import tensorflow as tf

from continual_transformers_tf.layers.co_si_steps import (
    both_masks,
    scores_dropout,
    step_inputs,
    unready_steps,
)
from continual_transformers_tf.layers.step_ops import cast, project
from continual_transformers_tf.ops.retroactive import attend_all_steps
from continual_transformers_tf.ops.single_output import expand_key_mask

# What a regular call takes and a step does not.
REFUSED = {
    "attention_mask": (
        "a kept row has summed over what it attends to, and a mask of the window, which moves on "
        "at every step, would change that for all rows"
    ),
    "query_mask": "a kept row's query is in the window for N steps; mask its output instead",
    "use_causal_mask": (
        "a row then attends to nothing that comes after it, and none has anything to update: that "
        "is CoSiMultiHeadAttention"
    ),
    "return_attention_scores": ("they are N × N numbers a step, of which an update computes 2 N"),
}


def refuse(arguments):
    """Raises ValueError where an argument of a regular call is given to a step."""
    for name, value in arguments.items():
        if name not in REFUSED:
            raise TypeError(f"Expected no argument {name!r} of a step, but got {value!r}")
        if value is not None and value is not False:
            raise ValueError(f"Expected no {name} in a step, but got one: {REFUSED[name]}")


def take_all_steps(
    layer, rank, query, value, key, value_mask, key_mask, training, streams, update_state
):
    """One step (rank 2) or several (rank 3); the arguments of `call_step` and `call_steps`.

    Returns:
        The outputs, or None while the window fills.
    """
    query, value, key = step_inputs(layer, rank, query, value, key)
    cache, dtype = layer._stream_state, layer.compute_dtype
    value_mask, key_mask = (
        expand_key_mask(name, given, query, rank == 2)
        for name, given in (("value_mask", value_mask), ("key_mask", key_mask))
    )
    rows = tf.shape(query)[0] if query.shape[0] is None else query.shape[0]
    queries, keys, values = (
        cast(project(x, dense, dtype, training), cache.dtype)
        for x, dense in (
            (query, layer._query_dense),
            (key, layer._key_dense),
            (value, layer._value_dense),
        )
    )
    dropout = scores_dropout(layer, training)
    attended, steps_taken = attend_all_steps(
        queries,
        keys,
        values,
        cache,
        streams=cache.streams_of_call(streams, rows),
        key_mask=both_masks(value_mask, key_mask),
        scale=layer._inverse_sqrt_key_dim,
        algorithm=layer.algorithm,
        update_state=update_state,
        training=training,
        dropout=None if dropout is None else lambda x: cast(dropout(x), cache.dtype),
    )
    unready = unready_steps(layer, query, steps_taken)
    if unready == query.shape[1]:
        return None
    if unready > 0:
        attended = attended[:, unready:]
    attended = tf.transpose(cast(attended, dtype), (0, 1, 3, 2, 4))  # [M, T, N, H, Dv]
    output = project(attended, layer._output_dense, dtype, training, axes=2)
    output = _without_rows_never_taken(layer, output, steps_taken)
    return tf.squeeze(output, 1) if rank == 2 else output


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
