"""The numbers of streams that a user passes to a call, and the checks of them."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

LARGEST = int(np.iinfo(np.int32).max)


def check_streams(streams: np.ndarray, held: int) -> None:
    """Raise ValueError unless every stream is held, and none is named twice.

    Args:
        streams: The streams of a call.
        held: S, the number of streams held.
    """
    outside = streams[(streams < 0) | (streams >= held)]
    if outside.size:
        raise ValueError(
            f"Expected streams in [0, {held}), the streams that are held, but got {outside[0]}. "
            "(`ensure_streams` makes room for more.)"
        )
    numbers, counts = np.unique(streams, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"Expected each stream once in a call, but got {numbers[counts > 1][0]} twice"
        )


def stream_assertions(streams: tf.Tensor, held: tf.Tensor) -> list[tf.Operation]:
    """Return ops for a graph that fail, when they run, if `check_streams` would raise.

    Args:
        streams: int32 tensor `[M]`.
        held: int32 scalar tensor, the number of streams held.
    """
    in_order = tf.sort(streams)
    return [
        tf.debugging.assert_non_negative(streams, "Expected streams >= 0"),
        tf.debugging.assert_less(streams, held, "Expected streams that are held"),
        tf.debugging.assert_less(
            in_order[:-1], in_order[1:], "Expected each stream once in a call"
        ),
    ]


def stream_tensor(streams: Any) -> tf.Tensor:
    """Return streams, as a user gives them, as an int32 tensor `[M]`.

    Args:
        streams: Integers `[M]`: a tensor, an array or a list.

    Raises:
        ValueError: If they are not a vector of integers, or do not fit into int32.
    """
    if tf.is_tensor(streams):
        if not streams.dtype.is_integer:
            raise ValueError(f"Expected streams to be integers, but got {streams.dtype.name}")
        if streams.dtype != tf.int32:
            # A number beyond int32 must not wrap around to a stream that is held.
            streams = tf.cast(tf.clip_by_value(tf.cast(streams, tf.int64), -1, LARGEST), tf.int32)
    else:
        streams = np.asarray(streams)
        if streams.dtype.kind not in "iu" and streams.size:
            raise ValueError(f"Expected streams to be integers, but got {streams.dtype} {streams}")
        if streams.size and not (streams.min() >= -LARGEST and streams.max() <= LARGEST):
            raise ValueError(f"Expected streams to fit into int32, but got {streams}")
        streams = tf.constant(streams, tf.int32)
    if streams.shape.rank not in (None, 1):
        raise ValueError(f"Expected streams of shape [M], but got {tuple(streams.shape)}")
    return streams


def first_streams(rows: int | tf.Tensor) -> tf.Tensor:
    """Return the streams 0 to rows - 1: an int32 tensor `[M]`.

    Args:
        rows: M: an int, or in a graph an int32 scalar tensor.
    """
    return _kept_streams(rows) if tf.executing_eagerly() else tf.range(rows)


# A tf.range would cost every eager step one more op.
@functools.lru_cache(maxsize=16)
def _kept_streams(rows: int) -> tf.Tensor:
    return tf.range(rows)
