"""The streams in a SavedModel that is a graph of TensorFlow's ops: those that have taken a step."""

import uuid

import numpy as np
import tensorflow as tf


class SavedStreams(tf.saved_model.experimental.TrackableResource):
    """Which rows of the variables are saved. The SavedModel's loader makes room for the others.

    A SavedModel's variables have the rows of these streams only. Empty rings would take as much
    room on disk as full ones. This is a resource because loaders initialize resources, in every
    language, after they have restored the variables. The resource itself, a mutex, has no use.

    Args:
        numbers: The streams that are saved: an int array, in ascending order.
        streams: S, how many streams the loaded SavedModel holds. The others are clean.
        variables: All variables `[S, ...]` of these streams' state.
    """

    def __init__(self, numbers: np.ndarray, streams: int, variables: list[tf.Variable]) -> None:
        super().__init__()
        self._numbers = numbers.astype(np.int32)
        self._streams = streams
        self._variables = variables
        self._shared_name = f"continual_transformers_saved_streams_{uuid.uuid4()}"

    def _create_resource(self) -> tf.Tensor:
        with tf.device("CPU:0"):
            return tf.raw_ops.MutexV2(shared_name=self._shared_name)

    def _initialize(self) -> None:
        saved = len(self._numbers)
        if saved == self._streams:
            return
        # A SavedModel that was loaded and saved again, as a part of another, has all rows already.
        # Only the choice of rows is in the tf.cond: TensorFlow 2.21 may drop an assignment of a
        # known shape from a tf.cond.
        held = tf.shape(self._variables[-1])[0]
        row_of_stream = tf.cond(held == saved, self._saved_rows, lambda: tf.range(held))
        for variable in self._variables:
            empty = tf.zeros([1, *variable.shape[1:]], variable.dtype)
            variable.assign(tf.gather(tf.concat([variable, empty], 0), row_of_stream))

    def _saved_rows(self) -> tf.Tensor:
        """Return the saved row of each stream; for clean streams the row after the last."""
        saved = len(self._numbers)
        numbers = self._numbers[:, np.newaxis]
        rows = np.arange(-saved, 0, dtype=np.int32)
        return saved + tf.scatter_nd(numbers, rows, [self._streams])
