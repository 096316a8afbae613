"""Put rows into variables, and take them out, on every device."""

import tensorflow as tf

from continual_transformers_tf.ops.library import in_xla


def scatter_nd_update(variable: tf.Variable, indices: tf.Tensor, values: tf.Tensor) -> None:
    """Call `variable.scatter_nd_update(indices, values)`, also for bool on a GPU.

    TensorFlow has no kernel for bool on GPUs.

    Args:
        variable: A `tf.Variable [S, ...]`.
        indices: int32 tensor `[M, 1]`. For a variable with two axes also `[M, T, 2]`, in which all
            entries of a row m have the same index of the variable's first axis. Each index once.
        values: Tensor `[M, ...]` or `[M, T]` of the variable's dtype.
    """
    if variable.dtype != tf.bool:
        variable.scatter_nd_update(indices, values)
        return
    # For whole rows there is a kernel.
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


def gather_nd(variable: tf.Variable, indices: tf.Tensor) -> tf.Tensor:
    """Return `tf.gather_nd(variable, indices)`, also for bool on a GPU, and under XLA.

    TensorFlow has no kernel for these.

    Args:
        variable: A `tf.Variable [S, D, ...]`.
        indices: int32 tensor `[M, T, 2]`, as in `scatter_nd_update`.
    """
    if variable.dtype != tf.bool and not in_xla():
        return tf.gather_nd(variable, indices)
    # This copies whole rings.
    return tf.gather(tf.gather(variable, indices[:, 0, 0]), indices[..., 1], axis=1, batch_dims=1)
