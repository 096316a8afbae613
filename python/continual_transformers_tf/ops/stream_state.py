"""What streams keep between calls: variables with one row a stream."""

import functools
import threading

import numpy as np
import tensorflow as tf

from continual_transformers_tf.ops.scatter import scatter_nd_update

_LARGEST = np.iinfo(np.int32).max


class StreamState(tf.Module):
    """Variables whose first axis is the stream, and the number of steps each stream has taken.

    Streams are numbered from 0. More can come, and none goes: those that are held keep their state.

    Eager calls from several threads take turns, by `lock`. A graph knows no such lock: while one
    runs in another thread, make no room for streams and set no state.

    Args:
        streams: S, how many streams are held at first.
        rows: dict from a name to (the shape of a stream's row, dtype): what is kept beside the
            position. Each becomes an attribute, a `tf.Variable [S, ...]`.

    Attributes:
        position: tf.Variable int64 `[S]`, the steps each stream has taken.
        lock: held by every eager call that reads or writes the variables.

    Raises:
        ValueError: if `streams` is not an integer >= 0.
    """

    def __init__(self, streams, rows=None, name=None):
        super().__init__(name=name)
        check_integer("streams", streams, at_least=0)
        self._names = ()
        for row_name, (shape, dtype) in {**(rows or {}), "position": ([], tf.int64)}.items():
            self._add_variable(row_name, streams, shape, dtype)
        self.lock = threading.RLock()
        # At least so many streams are held, unless a checkpoint has restored fewer.
        self._known_streams = streams

    def add_row(self, name, shape, dtype):
        """Keeps one thing more of each stream, for layers that learn its shape when they are built.

        Args:
            name: of the new attribute, a `tf.Variable [S, *shape]` of zeros.
            shape: of a stream's row.
            dtype: of the variable.
        """
        with self.lock, tf.init_scope():
            self._add_variable(name, tf.shape(self.position)[0], shape, dtype)

    def _add_variable(self, name, streams, shape, dtype):
        # The number of streams is left open in the variables' shapes, so that they can grow without
        # becoming other variables, which traced functions would not know.
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
    def _variables(self):
        return {name: getattr(self, name) for name in self._names}

    def ensure_streams(self, streams):
        """Makes room for streams 0, ..., streams - 1.

        Args:
            streams: int, or in a graph an int32 scalar tensor.

        Raises:
            ValueError: if it is an int beyond int32.
        """
        if isinstance(streams, (int, np.integer)) and streams > _LARGEST:
            raise ValueError(f"Expected streams to fit into int32, but got {streams}")
        if not isinstance(streams, (int, np.integer)):
            held = tf.shape(self.position)[0]
            tf.cond(streams > held, lambda: self._grow(streams), lambda: held)
            return
        with tf.init_scope():
            # Ask the variable itself: a graph may have made room, or a checkpoint may have restored
            # fewer streams.
            shape = tf.raw_ops.VariableShape(input=self.position.handle)
            if not tf.executing_eagerly() or streams > shape.numpy()[0]:
                with self.lock:
                    self._grow(streams)
            self._known_streams = streams

    def ensure_rows(self, rows):
        """Make room for the rows of a call: streams 0, ..., rows - 1.

        Unlike `ensure_streams`, this runs no op if the room is known to be there, so that an eager
        step stays one op. After a checkpoint of fewer streams, call `ensure_streams` first.

        Args:
            rows: As in `ensure_streams`.
        """
        if not isinstance(rows, int) or rows > self._known_streams:
            self.ensure_streams(rows)

    def _grow(self, streams):
        missing = tf.maximum(streams - tf.shape(self.position)[0], 0)
        for variable in self._variables.values():
            rest = tf.zeros(tf.concat([[missing], tf.shape(variable)[1:]], 0), variable.dtype)
            variable.assign(tf.concat([variable, rest], 0))
        return streams

    def streams_of_call(self, streams, rows):
        """The streams that a call's rows belong to, with room made for them if it names none.

        Args:
            streams: integers `[M]`, as the user gave them; or None: row i is stream i.
            rows: M, an int, or in a graph an int32 scalar tensor.

        Returns:
            int32 tensor `[M]`. Whether named streams are held, and each named once, is for the op
            to check.

        Raises:
            ValueError: if `streams` is not a vector of integers.
        """
        if streams is not None:
            return stream_tensor(streams)
        self.ensure_rows(rows)
        if not tf.executing_eagerly():
            return tf.range(rows)
        return _first_streams(rows)

    def checked(self, streams, rows=None):
        """`stream_tensor(streams)`, of which each is known to be held, and named once.

        Args:
            streams: integers `[M]`, as the user gave them.
            rows: M, where it is known from elsewhere: an int, or in a graph an int32 scalar tensor.

        Raises:
            ValueError: if one is not, or they are not M; in a graph
                tf.errors.InvalidArgumentError, when it runs.
        """
        streams = stream_tensor(streams)
        held = tf.shape(self.position)[0]
        if isinstance(rows, int) and not streams.shape.is_compatible_with([rows]):
            raise ValueError(f"Expected {rows} streams, one a row, but got {streams.shape[0]}")
        if tf.executing_eagerly():
            check_streams(streams.numpy(), int(held))
            return streams
        assertions = stream_assertions(streams, held)
        if rows is not None:
            message = "Expected as many streams as there are rows"
            assertions.append(tf.debugging.assert_equal(tf.shape(streams)[0], rows, message))
        with tf.control_dependencies(assertions):
            return tf.identity(streams)

    def clean_state(self, streams=None):
        """Forgets everything that streams have seen: they begin again.

        Args:
            streams: integers `[M]`, which ones; None: all.

        Raises:
            ValueError: if a stream is not held, or is named twice.
        """
        # A row that no step has written since is never read, so all but single numbers, such as the
        # position, may stay.
        numbers = [v for v in self._variables.values() if v.shape.rank == 1]
        with self.lock:
            if streams is not None:
                streams = self.checked(streams)
            for number in numbers:
                if streams is None:
                    number.assign(tf.zeros_like(number))
                else:
                    zeros = tf.zeros_like(streams, dtype=number.dtype)
                    number.scatter_nd_update(streams[:, tf.newaxis], zeros)

    def get_state(self, streams=None):
        """The state of streams, as plain data. Eager mode only.

        Args:
            streams: integers `[M]`, which ones, in this order; None: all.

        Returns:
            A dict of NumPy arrays, one for each variable, of M rows.

        Raises:
            ValueError: if a stream is not held, or is named twice.
        """
        with self.lock:
            if streams is None:
                return {name: variable.numpy() for name, variable in self._variables.items()}
            # Reads no other stream's rows.
            streams = self.checked(streams)
            return {
                name: tf.gather(variable, streams).numpy()
                for name, variable in self._variables.items()
            }

    def set_state(self, state, streams=None):
        """Puts back what `get_state` gave, here or elsewhere, of streams of the same sizes.

        Args:
            state: what `get_state` gave, of M streams.
            streams: integers `[M]`, which streams take it; None: streams 0, ..., M - 1, for which
                there is made room, and others that are held begin again.

        Raises:
            ValueError: if the state does not fit; this state then stays as it was.
        """
        variables = self._variables
        if not isinstance(state, dict) or set(state) != set(variables):
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {sorted(variables)}, but got {got}")
        state = {
            name: _as_kept(state[name], variable.dtype.as_numpy_dtype)
            for name, variable in variables.items()
        }
        rows = np.size(state["position"]) if streams is None else stream_tensor(streams).shape[0]
        for name, variable in variables.items():
            expected = (variable.dtype.as_numpy_dtype, (rows, *variable.shape[1:]))
            got = (state[name].dtype, state[name].shape)
            if got != expected:
                raise ValueError(
                    f"Expected the state's {name} to be {variable.dtype.name} "
                    f"{list(expected[1])}, but got {got[0]} {list(got[1])}"
                )
        if (state["position"] < 0).any():
            raise ValueError(f"Expected positions >= 0, but got {state['position'].tolist()}")
        with self.lock:
            if streams is None:
                self.ensure_streams(rows)
                self.clean_state()
                streams = np.arange(rows)
            indices = self.checked(streams)[:, tf.newaxis]
            for name, variable in variables.items():
                scatter_nd_update(variable, indices, state[name])


def _as_kept(array, dtype):
    """An array of the state, which may come from a file of NumPy's: these know no bfloat16."""
    array = np.asarray(array)
    if np.dtype(dtype).kind == "V" and array.dtype == np.dtype((np.void, np.dtype(dtype).itemsize)):
        return array.view(dtype)
    return array


# A tf.range would cost every eager step one more op.
@functools.lru_cache(maxsize=16)
def _first_streams(rows):
    return tf.range(rows)


def check_integer(name, value, at_least):
    """Raises ValueError unless `value` is an integer, and not below `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"Expected {name} to be an integer >= {at_least}, but got {value!r}")


def check_streams(streams, held):
    """Raises ValueError unless `streams`, a NumPy array, names streams that are held, each once."""
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


def stream_assertions(streams, held):
    """`check_streams` for a graph: ops that fail, when they run, where it would raise."""
    in_order = tf.sort(streams)
    return [
        tf.debugging.assert_non_negative(streams, "Expected streams >= 0"),
        tf.debugging.assert_less(streams, held, "Expected streams that are held"),
        tf.debugging.assert_less(
            in_order[:-1], in_order[1:], "Expected each stream once in a call"
        ),
    ]


def stream_tensor(streams):
    """Numbers of streams, as a user gives them, as an int32 tensor `[M]`.

    Raises:
        ValueError: if they are not a vector of integers, or are beyond int32.
    """
    if tf.is_tensor(streams):
        if not streams.dtype.is_integer:
            raise ValueError(f"Expected streams to be integers, but got {streams.dtype.name}")
        if streams.dtype != tf.int32:
            # A number beyond int32 must not come round to a stream that is held.
            streams = tf.cast(tf.clip_by_value(tf.cast(streams, tf.int64), -1, _LARGEST), tf.int32)
    else:
        streams = np.asarray(streams)
        if streams.dtype.kind not in "iu" and streams.size:
            raise ValueError(f"Expected streams to be integers, but got {streams.dtype} {streams}")
        if streams.size and not (streams.min() >= -_LARGEST and streams.max() <= _LARGEST):
            raise ValueError(f"Expected streams to fit into int32, but got {streams}")
        streams = tf.constant(streams, tf.int32)
    if streams.shape.rank not in (None, 1):
        raise ValueError(f"Expected streams of shape [M], but got {tuple(streams.shape)}")
    return streams
