"""Rings of the newest steps of streams: put steps into them, and read earlier steps.

A ring is a `tf.Variable [S, D, ...]` with D >= 1. Step number p of a stream lies in row p mod D.
"""

import tensorflow as tf

from continual_transformers_tf.ops.scatter import gather_nd, scatter_nd_update


def delayed_steps(
    ring: tf.Variable, steps: tf.Tensor, streams: tf.Tensor, position: tf.Tensor
) -> tf.Tensor:
    """Return the steps that came D steps before this call's.

    Args:
        ring: The steps before this call.
        steps: This call's steps: a tensor `[M, T, ...]` of the ring's dtype.
        streams: int32 tensor `[M]`: streams that are held, each once.
        position: int64 tensor `[M]`: the number of steps that each of these streams has taken
            before.

    Returns:
        `[M, T, ...]`: steps position - D, ..., position - D + T - 1. For numbers below
        0, which no stream has taken, the values have no meaning.
    """
    taken = tf.shape(steps)[1]
    older = tf.minimum(taken, ring.shape[1])
    rows = _rows(ring, streams, position, older)
    return tf.concat([gather_nd(ring, rows), steps[:, : taken - older]], 1)


def steps_before(
    ring: tf.Variable, streams: tf.Tensor, position: tf.Tensor, count: int
) -> tf.Tensor:
    """Return the `count` newest steps before this call, oldest first: `[M, count, ...]`.

    Args:
        ring, streams, position: As in `delayed_steps`.
        count: At most D. For steps that no stream has taken, the values have no meaning.
    """
    rows = _rows(ring, streams, position - count, count)
    return gather_nd(ring, rows)


def sequence_before(
    ring: tf.Variable, streams: tf.Tensor, position: tf.Tensor, count: int, first: int = 0
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the `count` newest steps before this call, and which of them are in the sequence.

    Args:
        ring, streams, position, count: As in `steps_before`.
        first: The number of the sequence's first step.

    Returns:
        (`[M, count, ...]`, oldest first, zeros for steps before the first; bool `[M, count]`: which
        are not before it).
    """
    steps = steps_before(ring, streams, position, count)
    there = tf.expand_dims(position - count, 1) + tf.range(count, dtype=tf.int64) >= first
    return mask_rows(steps, there), there


def windows_of(
    ring: tf.Variable, steps: tf.Tensor, streams: tf.Tensor, position: tf.Tensor, seq_len: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the window of each of this call's steps: the seq_len steps that end with it.

    Args:
        ring, steps, streams, position: As in `delayed_steps`. The ring's D is seq_len - 1, but at
            least 1.
        seq_len: N, the window.

    Returns:
        (`[M, T, N, ...]`, oldest step first, zeros for steps that no stream has taken; bool
        `[M, T, N]`: which steps were taken).
    """
    taken = tf.shape(steps)[1]
    before, were_there = sequence_before(ring, streams, position, seq_len - 1)
    there = tf.concat([were_there, tf.ones(tf.shape(steps)[:2], tf.bool)], 1)
    # Row i of the window of step t.
    row = tf.range(taken)[:, tf.newaxis] + tf.range(seq_len)
    return (
        tf.gather(tf.concat([before, steps], 1), row, axis=1),
        tf.gather(there, row, axis=1),
    )


def mask_rows(x: tf.Tensor, there: tf.Tensor, fill: float | None = None) -> tf.Tensor:
    """Return x `[M, T, ...]` with `fill`, or zeros, in rows where `there`, bool `[M, T]`, is False.

    It selects, where a product would keep NaN: an earlier stream may have left that in a ring.
    """
    last_axes = tf.ones([x.shape.rank - 2], tf.int32)
    there = tf.reshape(there, tf.concat([tf.shape(there), last_axes], 0))
    other = tf.zeros([], x.dtype) if fill is None else tf.constant(fill, x.dtype)
    return tf.where(there, x, other)


def put_steps(ring: tf.Variable, steps: tf.Tensor, streams: tf.Tensor, position: tf.Tensor) -> None:
    """Put the newest steps of streams into a ring; the arguments are those of `delayed_steps`."""
    taken = sizes(steps, 2)[1]
    kept = minimum(taken, ring.shape[1])
    if kept is taken:  # All steps are kept: this saves an eager call two ops.
        scatter_nd_update(ring, _rows(ring, streams, position, kept), steps)
        return
    first = position + tf.cast(taken - kept, tf.int64)
    scatter_nd_update(ring, _rows(ring, streams, first, kept), steps[:, taken - kept :])


# In eager mode an index x[:, 0] takes as long as ten other ops, and a known size takes none.


def sizes(x: tf.Tensor, count: int) -> list[int] | list[tf.Tensor]:
    """Return the sizes of a tensor's first axes: ints if all are known, or else tensors."""
    known = x.shape[:count]
    return known.as_list() if known.is_fully_defined() else tf.unstack(tf.shape(x)[:count])


def minimum(a: int | tf.Tensor, b: int | tf.Tensor) -> int | tf.Tensor:
    """Return the smaller of two ints or tensors, an int if both are."""
    return tf.minimum(a, b) if tf.is_tensor(a) or tf.is_tensor(b) else min(a, b)


def _rows(
    ring: tf.Variable, streams: tf.Tensor, first_step: tf.Tensor, count: int | tf.Tensor
) -> tf.Tensor:
    """Return the (stream, row) of `count` steps from first_step `[M]` on: int32 `[M, count, 2]`."""
    steps = tf.expand_dims(first_step, 1) + tf.range(tf.cast(count, tf.int64))
    rows = tf.cast(tf.math.floormod(steps, tf.constant(ring.shape[1], tf.int64)), tf.int32)
    return tf.stack([tf.broadcast_to(tf.expand_dims(streams, 1), tf.shape(rows)), rows], -1)
