"""Rows put into variables, and taken out of them, on every device."""

import tensorflow as tf

from continual_transformers_tf.ops.library import in_xla


def scatter_nd_update(variable, indices, values):
    """`variable.scatter_nd_update(indices, values)`, which for bool TensorFlow has on no GPU.

    Args:
        variable: a `tf.Variable [S, ...]`.
        indices: int32 tensor `[M, 1]`, or of a variable of two axes `[M, T, 2]`, in which each row
            `m` of the former is of one index of the variable's first axis. Each once.
        values: tensor `[M, ...]` or `[M, T]` of the variable's dtype.
    """
    if variable.dtype != tf.bool:
        variable.scatter_nd_update(indices, values)
        return
    # Of whole rows there is a kernel.
    if indices.shape.rank == 2:
        first = indices[:, 0]
    else:
        first, shape = indices[:, 0, 0], tf.shape(indices)[:2]
        row = tf.broadcast_to(tf.expand_dims(tf.range(shape[0]), 1), shape)
        rows = tf.cast(tf.gather(variable, first), tf.int64)
        values = tf.tensor_scatter_nd_update(
            rows, tf.stack([row, indices[..., 1]], -1), tf.cast(values, tf.int64)
        )
    variable.scatter_update(tf.IndexedSlices(tf.cast(values, tf.bool), first))


def gather_nd(variable, indices):
    """`tf.gather_nd(variable, indices)`, which for bool TensorFlow has on no GPU, nor XLA at all.

    Args:
        variable: a `tf.Variable [S, D, ...]`.
        indices: int32 tensor `[M, T, 2]`, as `scatter_nd_update` has them.
    """
    if variable.dtype != tf.bool and not in_xla():
        return tf.gather_nd(variable, indices)
    # Whole rings are then copied.
    return tf.gather(tf.gather(variable, indices[:, 0, 0]), indices[..., 1], axis=1, batch_dims=1)
