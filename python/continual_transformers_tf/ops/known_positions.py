"""Lower bounds of streams' positions, which the host can read without waiting for a GPU."""

import numpy as np
import tensorflow as tf


class KnownPositions:
    """Lower bounds of the positions of streams.

    A position in a GPU's memory can be read only after the GPU has done all work before. But a
    position only grows, until its stream is cleaned or gets another state. So a position that was
    read is a lower bound until then.

    Args:
        position: The variable, int64 `[S]`. Only this package and checkpoints may change it.

    Attributes:
        is_far: Whether the host has to wait to read it.
    """

    def __init__(self, position: tf.Variable):
        self._position = position
        self.is_far = tf.DeviceSpec.from_string(position.device).device_type not in (None, "CPU")
        self._bounds = np.zeros(0, np.int64)
        self._restored = self._last_restore()
        self._graphs_forget = False

    def forget(self) -> None:
        """Take note that positions become smaller; in a graph, that they do whenever it runs."""
        self._bounds = np.zeros(0, np.int64)
        if not tf.executing_eagerly():
            self._graphs_forget = True

    def bounds(self, streams: tf.Tensor | None, rows: int) -> np.ndarray:
        """Return lower bounds of the positions of a call's streams, without waiting for the GPU.

        Args:
            streams: int32 tensor `[M]`; None: row i is stream i.
            rows: M.

        Returns:
            int64 `[M]`; 0 for a stream of which nothing is known.
        """
        if self._restored != self._last_restore():
            self._bounds, self._restored = np.zeros(0, np.int64), self._last_restore()
        numbers = _numbers(streams, rows)
        bounds = np.zeros(len(numbers), np.int64)
        if not self._graphs_forget:
            known = (numbers >= 0) & (numbers < len(self._bounds))
            bounds[known] = self._bounds[numbers[known]]
        return bounds

    def read(self, streams: tf.Tensor | None, rows: int) -> np.ndarray:
        """Wait for the GPU, and return the positions: int64 `[M]`.

        Args:
            streams, rows: As in `bounds`. The streams are held.
        """
        numbers = _numbers(streams, rows)
        positions = tf.gather(self._position, numbers).numpy()
        missing = numbers.max(initial=-1) + 1 - len(self._bounds)
        if missing > 0:
            self._bounds = np.append(self._bounds, np.zeros(missing, np.int64))
        self._bounds[numbers] = positions
        return positions

    def _last_restore(self) -> int:
        """Return a number that TensorFlow changes when a checkpoint writes the variable."""
        return getattr(self._position, "_update_uid", -1)  # It has none before the first one.


def _numbers(streams: tf.Tensor | None, rows: int) -> np.ndarray:
    return np.arange(rows) if streams is None else streams.numpy()
