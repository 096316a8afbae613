"""The state that a layer keeps of each stream between calls."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import tensorflow as tf

from continual_transformers_tf.ops.stream_numbers import stream_tensor
from continual_transformers_tf.ops.streams import Streams

__all__ = ["StreamState", "check_integer", "stream_tensor"]


class StreamState(tf.Module):
    """Variables whose first axis is the stream, and the number of steps each stream has taken.

    Streams are numbered from 0. Their number can grow, but not shrink.
    A layer has one `StreamState`. The states of all layers of a model share one `Streams`, and so
    one position and one lock.

    Args:
        streams: S, the number of streams held at first.
        rows: What is kept beside the position: a dict from a name to (the shape of a stream's
            row, dtype). Each becomes an attribute, a `tf.Variable [S, ...]`.

    Attributes:
        position: tf.Variable int64 `[S]`, the steps each stream has taken.
        streams: The `Streams` that this state shares with the other layers of its model.

    Raises:
        ValueError: If `streams` is not an integer >= 0.
    """

    def __init__(
        self,
        streams: int,
        rows: dict[str, tuple[Any, Any]] | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        check_integer("streams", streams, at_least=0)
        self._names: tuple[str, ...] = ()
        for row_name, (shape, dtype) in {**(rows or {}), "position": ([], tf.int64)}.items():
            self._add_variable(row_name, streams, shape, dtype)
        self.streams = Streams(self, streams)

    def add_row(self, name: str, shape: Any, dtype: Any) -> None:
        """Add a variable. This is for layers that learn its shape when they are built.

        Args:
            name: The name of the new attribute, a `tf.Variable [S, *shape]` of zeros.
            shape: The shape of a stream's row.
            dtype: The variable's dtype.
        """
        with tf.init_scope(), self.turn():
            self._add_variable(name, tf.shape(self.position)[0], shape, dtype)

    def _add_variable(self, name: str, streams: int | tf.Tensor, shape: Any, dtype: Any) -> None:
        # The variables' shapes leave the number of streams open. So they can grow in place, and
        # traced functions still know them.
        with tf.init_scope():
            variable = tf.Variable(
                tf.zeros([streams, *shape], dtype),
                shape=[None, *shape],
                trainable=False,
                name=name,
            )
        setattr(self, name, variable)
        self._names += (name,)

    @property
    def variables_by_name(self) -> dict[str, tf.Variable]:
        """The variables, the position among them: a dict from names to variables."""
        return {name: getattr(self, name) for name in self._names}

    # These act on all layers that share the streams.

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """See `Streams.turn`."""
        return self.streams.turn()

    def ensure_streams(self, streams: int | tf.Tensor) -> None:
        """See `Streams.ensure`."""
        self.streams.ensure(streams)

    def clean_state(self, streams: Any = None) -> None:
        """See `Streams.clean`."""
        self.streams.clean(streams)

    # These read and write the rows of this layer.

    def get_state(self, streams: Any = None) -> dict[str, np.ndarray]:
        """Return the state of streams as plain data. Eager mode only.

        Args:
            streams: Integers `[M]`: which ones, in this order; None: all.

        Returns:
            A dict of NumPy arrays, one for each variable, of M rows.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        with self.turn():
            if streams is None:
                return {name: x.numpy() for name, x in self.variables_by_name.items()}
            # Reads no other stream's rows.
            streams = self.streams.checked(streams)
            return {
                name: tf.gather(x, streams).numpy() for name, x in self.variables_by_name.items()
            }

    def set_state(self, state: Any, streams: Any = None) -> None:
        """Put back what `get_state` returned, here or in a state of the same sizes.

        Args:
            state: What `get_state` returned, of M streams.
            streams: Integers `[M]`: which streams take it; None: streams 0, ..., M - 1. Room is
                made for them, and all other streams are reset.

        Raises:
            ValueError: If the state does not fit; this state then stays as it was.
        """
        self.streams.set_state([(self, state)], streams)

    def arrays_of(self, state: Any, rows: int | None = None) -> dict[str, np.ndarray]:
        """Check a state that `get_state` returned, here or elsewhere, and return its arrays.

        Args:
            state: What the user gave.
            rows: M, the number of streams that it must have; None: any number.

        Returns:
            A dict from the name of each variable to an array of its dtype, `[M, ...]`.

        Raises:
            ValueError: If the state does not fit.
        """
        variables = self.variables_by_name
        if not isinstance(state, dict) or set(state) != set(variables):
            given = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {sorted(variables)}, but got {given}")
        arrays = {
            name: _as_kept(state[name], variable.dtype.as_numpy_dtype)
            for name, variable in variables.items()
        }
        rows = np.size(arrays["position"]) if rows is None else rows
        for name, variable in variables.items():
            expected = (variable.dtype.as_numpy_dtype, (rows, *variable.shape[1:]))
            got = (arrays[name].dtype, arrays[name].shape)
            if got != expected:
                raise ValueError(
                    f"Expected the state's {name} to be {variable.dtype.name} "
                    f"{list(expected[1])}, but got {got[0]} {list(got[1])}"
                )
        if (arrays["position"] < 0).any():
            raise ValueError(f"Expected positions >= 0, but got {arrays['position'].tolist()}")
        return arrays


def _as_kept(array: Any, dtype: Any) -> np.ndarray:
    """Return an array of a state with its dtype: NumPy's files do not know bfloat16."""
    array = np.asarray(array)
    if np.dtype(dtype).kind == "V" and array.dtype == np.dtype((np.void, np.dtype(dtype).itemsize)):
        return array.view(dtype)
    return array


def check_integer(name: str, value: Any, at_least: int) -> None:
    """Raise ValueError unless `value` is an integer and at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"Expected {name} to be an integer >= {at_least}, but got {value!r}")
