"""One call's steps while they are being taken."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from continual_transformers_tf.ops.graph_order import last_ops, wait_for, writing_ops

if TYPE_CHECKING:
    from continual_transformers_tf.ops.streams import Streams


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the rows of a sequence that a stream makes are counted at one place of a model.

    Row number n comes at position n + lag.

    Attributes:
        lag: How many positions pass before row 0. Less than 0: so many rows, zeros, are there
            before the stream begins.
        delay: How many rows a regular call of the whole sequence has after the newest row that the
            stream has given.
        each: How many rows each step has.
    """

    lag: int = 0
    delay: int = 0
    each: int = 1


# The rows of a model's own inputs.
ALL_ROWS = Rows()


class Step:
    """T steps of M streams that are being taken. `Streams.take_steps` makes it.

    Args:
        all_streams: The `Streams`.
        whole: The layer or model that takes the steps.
        streams: int32 tensor `[M]`; None: row i is stream i.
        rows, steps, update_state: As in `Streams.take_steps`.

    Attributes:
        whole, streams, rows, steps, update_state: As above.
        one: Whether this is known to be one step of each stream.
        one_row: Whether a model takes this by its `call_step`, so that layers may be called on
            `(M, E)`.
        rows_of_input: The `Rows` of the input of the layer whose turn it is.
        op_advances: Whether the op that takes the step of the next layer is the last op that can
            fail. It may then advance the position itself.
    """

    def __init__(
        self,
        all_streams: Streams,
        whole: Any,
        streams: tf.Tensor | None,
        rows: int | tf.Tensor,
        steps: int | tf.Tensor,
        update_state: bool,
    ):
        self._all = all_streams
        self.whole = whole
        self.streams = streams
        self.rows = rows
        self.steps = steps
        self.update_state = update_state
        self.one = isinstance(steps, int) and steps == 1
        self.one_row = False
        self.rows_of_input = ALL_ROWS
        self.op_advances = False
        self._advanced = False
        self._changes: list[Callable[[], None]] = []

    @functools.cached_property
    def numbers(self) -> tf.Tensor:
        """The number of each row's stream: int32 `[M]`."""
        return self._all.numbers(self.streams, self.rows)

    @functools.cached_property
    def position(self) -> tf.Tensor:
        """The number of steps that each row's stream had taken before: int64 `[M]`."""
        return tf.gather(self._all.position, self.numbers)

    def known_position(self, are_enough: Callable[[np.ndarray], bool]) -> np.ndarray:
        """Return `position` as an array, or lower bounds that are enough. Eager mode only.

        Args:
            are_enough: Function of lower bounds, int64 `[M]`. If it returns False, the positions
                are read. Then the host waits for a GPU.
        """
        known = self._all.known
        if not known.is_far:
            return self.position.numpy()
        bounds = known.bounds(self.streams, int(self.rows))
        return bounds if are_enough(bounds) else known.read(self.streams, int(self.rows))

    def present(self, rows: int | tf.Tensor) -> tf.Tensor | None:
        """Return which rows of the layer's input belong to the sequence: bool `[M, rows]`.

        None: all. A layer that has no output yet gives rows that have no meaning.
        """
        lag = self.rows_of_input.lag
        if lag <= 0:
            return None
        return self.numbers_of(rows) >= 0

    def numbers_of(self, rows: int | tf.Tensor) -> tf.Tensor:
        """Return the numbers in the sequence of rows of the layer's input: int64 `[M, rows]`."""
        first = self.rows_before(rows) - self.rows_of_input.lag
        return first[:, tf.newaxis] + tf.range(tf.cast(rows, tf.int64))

    def rows_before(self, rows: int | tf.Tensor) -> tf.Tensor:
        """Return how many rows the layer had been given before this call: int64 `[M]`.

        Args:
            rows: How many rows it is given now. A step of a model with strides has several, at
                places before the last stride.
        """
        if isinstance(rows, int) and isinstance(self.steps, int):
            each = rows // self.steps
            return self.position if each == 1 else self.position * each
        return self.position * tf.cast(rows // self.steps, tf.int64)

    @property
    def has_one_row(self) -> bool:
        """Whether the layer is known to be given one row of each stream.

        An attention op then writes its rings itself. The ring's row that it overwrites holds a step
        that has left the window. So an attempt that fails has overwritten nothing that is read
        again. Several rows overwrite more: they are put into the rings at the end.
        """
        return self.one and self.rows_of_input.each == 1

    def advancing(self) -> bool:
        """Return whether the next op must advance the position, as the step's last change."""
        if not (self.op_advances and self.update_state) or self._changes:
            return False
        self._advanced = True
        return True

    def at_the_end(self, change: Callable[[], None]) -> None:
        """Have a function change variables when everything has been computed."""
        if self.update_state:
            self._changes.append(change)

    def commit(self, computed: int = 0) -> list[tf.Operation]:
        """Change the state, the position last.

        Args:
            computed: In a graph, how many ops the graph had before the step.

        Returns:
            In a graph, the ops to wait for; otherwise nothing.
        """
        if self._advanced:
            return []
        if tf.executing_eagerly():
            after = self._position_after()
            for change in self._changes:
                change()
            self._all.position.scatter_nd_update(tf.expand_dims(self.numbers, 1), after)
            return []
        graph = tf.compat.v1.get_default_graph()
        # The inputs of the changes are computed as early as they can be. Only the ops that change
        # something wait for the whole step, and they wait for one op: each control input of an op
        # costs the executor time.
        after, indices = self._position_after(), tf.expand_dims(self.numbers, 1)
        with tf.control_dependencies(last_ops(graph, computed)):
            everything = tf.no_op("computed")
        first = len(graph.get_operations())
        for change in self._changes:
            change()
        changing = writing_ops(graph, first)
        for op in changing:
            wait_for(op, everything)
        with tf.control_dependencies(last_ops(graph, first) or [everything]):
            self._all.position.scatter_nd_update(indices, after)
        return last_ops(graph, first)

    def _position_after(self) -> tf.Tensor:
        return self.position + tf.cast(self.steps, tf.int64)
