"""The streams that one layer, or all layers of a model, step together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from continual_transformers_tf.native import backend
from continual_transformers_tf.ops.known_positions import KnownPositions
from continual_transformers_tf.ops.library import in_xla
from continual_transformers_tf.ops.scatter import scatter_nd_update
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_numbers import (
    LARGEST,
    check_streams,
    first_streams,
    stream_assertions,
    stream_tensor,
)
from continual_transformers_tf.ops.turn import (
    EagerTurn,
    FusedLock,
    GraphLock,
    PlainLock,
    graph_turn,
)

if TYPE_CHECKING:
    from continual_transformers_tf.ops.stream_state import StreamState


class Streams:
    """The streams that one layer, or all layers of a model, step together.

    They have one number of streams, one position and one lock. Whoever steps, reads, writes, cleans
    or makes room for them takes a turn (see `ops/turn.py`). A function that XLA compiles can take
    no lock: do nothing else with its streams while it runs.

    Args:
        state: The `StreamState` whose streams these are at first.
        held: S, the number of streams that it holds.

    Attributes:
        position: tf.Variable int64 `[S]`, the steps that each stream has taken.
        known: What the host knows of `position`, `KnownPositions`.
        members: The `StreamState`s that share these streams.
        wholes: The layers and models that step all members. While there is one, no member steps by
            itself.
    """

    def __init__(self, state: StreamState, held: int):
        self.position = state.position
        self.known = KnownPositions(state.position)
        self.members = [state]
        self.wholes: list[Any] = []
        self._turn = EagerTurn()
        self._now = threading.local()  # Its `step`: the step that this thread is taking.
        # At least this many streams are held, unless a checkpoint has restored fewer.
        self._known: int | np.integer[Any] = held

    # Whose turn it is.

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Return a context, which may be nested, in which nobody else uses these streams."""
        if tf.executing_eagerly():
            return self._turn
        if in_xla() or getattr(self._now, "in_graph_turn", False):
            return contextlib.nullcontext()
        return self._graph_turn()

    @contextlib.contextmanager
    def _graph_turn(self) -> Iterator[None]:
        with tf.init_scope():
            lock = getattr(self._now, "lock_of_exports", None) or self.graph_lock
            for state in self.members:  # So that a SavedModel knows it.
                state.graph_lock = lock
        self._now.in_graph_turn = True
        try:
            with graph_turn(lock, self._variables()):
                yield
        finally:
            self._now.in_graph_turn = False

    @property
    def graph_lock(self) -> GraphLock:
        """The lock by which graphs take turns, for a SavedModel to track."""
        return self._turn.graph_lock

    @contextlib.contextmanager
    def lock_of_exports(self) -> Iterator[GraphLock]:
        """Give the lock of the graphs that this thread traces here, only to save them.

        With CONTINUAL_TRANSFORMERS_BACKEND=tensorflow it needs no op library, also if these streams
        were stepped by fused graphs before.
        """
        lock = self.graph_lock
        if backend() == "tensorflow" and isinstance(lock, FusedLock):
            lock = PlainLock()
        self._now.lock_of_exports = lock
        try:
            yield lock
        finally:
            self._now.lock_of_exports = None

    # Steps.

    @property
    def step(self) -> Step | None:
        """The `Step` that this thread is taking; None if it takes none."""
        return getattr(self._now, "step", None)

    def expect_to_step(self, layer: Any) -> None:
        """Raise ValueError if a layer is about to step by itself although it is part of a whole."""
        if self.wholes and not any(layer is whole for whole in self.wholes):
            raise ValueError(
                f"Expected a step of {self.wholes[-1].name}, but got one of {layer.name} alone, "
                f"whose streams are those of {self.wholes[-1].name}: the other layers would miss "
                "the step. Step the whole, or make the layer anew (keras.models.clone_model copies "
                "a model)"
            )

    def take_steps(
        self,
        layer: Any,
        compute: Callable[[Step], Any],
        streams: Any,
        rows: int | tf.Tensor,
        steps: int | tf.Tensor,
        update_state: bool,
    ) -> Any:
        """Take T steps of M streams: compute everything, then change the state.

        Nothing that a later attempt at these steps would read changes before `compute` has
        returned. In a graph nothing changes before all its ops have run. So a call that fails
        leaves every layer as it was.

        Within `compute` the layers of the same streams may call this too: they then take part in
        this step.

        Args:
            layer: The layer or model that takes the steps.
            compute: Function of a `Step`, which returns the outputs, nested tensors or Nones.
            streams: Integers `[M]`, as the user gave them; None: row i is stream i, and room is
                made for M streams.
            rows: M: an int, or in a graph an int32 scalar tensor.
            steps: T: an int, or in a graph an int32 scalar tensor.
            update_state: Whether the state changes.

        Returns:
            What `compute` returned. In a graph it depends on the change of the state.

        Raises:
            ValueError: If the layer is part of a whole, or `streams` does not fit; in a graph, for
                the streams' numbers, tf.errors.InvalidArgumentError, when it runs.
        """
        if self.step is not None:
            return compute(self.step)
        if update_state:
            self.expect_to_step(layer)
        with self.turn():
            if streams is None:
                self.ensure_rows(rows)
            else:
                streams = self.checked(streams, rows)
            eager = tf.executing_eagerly()
            before = 0 if eager else len(tf.compat.v1.get_default_graph().get_operations())
            step = self._now.step = Step(self, layer, streams, rows, steps, update_state)
            try:
                outputs = compute(step)
            finally:
                self._now.step = None
            if not update_state:
                return outputs
            done = step.commit(before)
            if eager or not done:
                return outputs
            with tf.control_dependencies(done):
                return tf.nest.map_structure(
                    lambda y: tf.identity(y) if tf.is_tensor(y) else y, outputs
                )

    # Room.

    def ensure(self, streams: int | tf.Tensor) -> None:
        """Make room for streams 0, ..., streams - 1 in all members.

        Args:
            streams: An int, or in a graph an int32 scalar tensor.

        Raises:
            ValueError: If it is an int beyond int32.
        """
        if isinstance(streams, (int, np.integer)) and streams > LARGEST:
            raise ValueError(f"Expected streams to fit into int32, but got {streams}")
        if not isinstance(streams, (int, np.integer)):
            with self.turn():
                held = tf.shape(self.position)[0]
                tf.cond(streams > held, lambda: self._grow(streams), lambda: held)
            return
        with tf.init_scope(), self.turn():
            # Ask the variable itself: a graph may have made room, or a checkpoint may have restored
            # fewer streams.
            shape = tf.raw_ops.VariableShape(input=self.position.handle)
            if not tf.executing_eagerly() or streams > shape.numpy()[0]:
                self._grow(streams)
            self._known = streams

    def ensure_rows(self, rows: int | tf.Tensor) -> None:
        """Make room for the rows of a call: streams 0, ..., rows - 1.

        Unlike `ensure`, this runs no op if the room is known to be there, so that an eager step
        stays one op. After a checkpoint of fewer streams, call `ensure` first.

        Args:
            rows: As in `ensure`.
        """
        if not isinstance(rows, int) or rows > self._known:
            self.ensure(rows)

    def _grow(self, streams: int | tf.Tensor) -> int | tf.Tensor:
        # Everything that takes memory comes before the first change. The position, whose length is
        # the number of streams, changes last.
        grown = []
        for variable in self._variables():
            missing = tf.maximum(streams - tf.shape(variable)[0], 0)
            rest = tf.zeros(tf.concat([[missing], tf.shape(variable)[1:]], 0), variable.dtype)
            grown.append((variable, tf.concat([variable, rest], 0)))
        with tf.control_dependencies([rows for _, rows in grown]):
            for variable, rows in grown:
                variable.assign(rows)
        return streams

    def _variables(self) -> list[tf.Variable]:
        """Return the variables of all members, the position once and last."""
        return [
            variable
            for state in self.members
            for name, variable in state.variables_by_name.items()
            if name != "position"
        ] + [self.position]

    # The streams of a call.

    def numbers(self, streams: tf.Tensor | None, rows: int | tf.Tensor) -> tf.Tensor:
        """Return the numbers of a call's streams: an int32 tensor `[M]`.

        Args:
            streams: Such a tensor; or None: row i is stream i.
            rows: M: an int, or in a graph an int32 scalar tensor.
        """
        if streams is not None:
            return streams
        return first_streams(rows)

    def checked(self, streams: Any, rows: int | tf.Tensor | None = None) -> tf.Tensor:
        """Return `stream_tensor(streams)`, checked: every stream is held and named once.

        Args:
            streams: Integers `[M]`, as the user gave them.
            rows: M, if it is known from elsewhere: an int, or in a graph an int32 scalar tensor.

        Raises:
            ValueError: If a stream is not held or named twice, or they are not M; in a graph
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

    # The state as a whole.

    def clean(self, streams: Any = None) -> None:
        """Reset streams: forget everything that they have seen.

        Args:
            streams: Integers `[M]`: which ones; None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        # A row that no step has written since is never read, so all but single numbers, such as the
        # position, may stay.
        numbers = [v for v in self._variables() if v.shape.rank == 1]
        with self.turn():
            self.known.forget()
            if streams is not None:
                streams = self.checked(streams)
            for number in numbers:
                if streams is None:
                    number.assign(tf.zeros_like(number))
                else:
                    zeros = tf.zeros_like(streams, dtype=number.dtype)
                    number.scatter_nd_update(streams[:, tf.newaxis], zeros)

    def set_state(self, states: list[tuple[StreamState, Any]], streams: Any = None) -> None:
        """Put back the state of all members; see `StreamState.set_state`.

        Args:
            states: Pairs of a member and what its `get_state` gave, one pair for each member.
            streams: As in `StreamState.set_state`.

        Raises:
            ValueError: If a state does not fit its member, a member has no state, or the positions
                differ. All states then stay as they were.
        """
        if len(states) != len(self.members):
            raise ValueError(
                f"Expected the state of all {len(self.members)} layers whose streams these are, "
                f"but got that of {len(states)}. Set the state of {self.wholes[-1].name}, the whole"
            )
        rows = None if streams is None else stream_tensor(streams).shape[0]
        states = [(member, member.arrays_of(state, rows)) for member, state in states]
        taken = [arrays["position"] for _, arrays in states]
        if not all(np.array_equal(x, taken[0]) for x in taken):
            raise ValueError(
                "Expected a state in which all layers have taken the same steps, but got positions "
                f"{[x.tolist() for x in taken]}"
            )
        # Everything that takes memory comes before the first change.
        changes = [
            (variable, tf.constant(arrays[name], variable.dtype))
            for member, arrays in states
            for name, variable in member.variables_by_name.items()
            if name != "position"
        ] + [(self.position, tf.constant(taken[0]))]
        with self.turn():
            self.known.forget()
            if streams is None:
                self.ensure(len(taken[0]))
                streams = np.arange(len(taken[0]))
                indices = self.checked(streams)[:, tf.newaxis]
                self.clean()
            else:
                indices = self.checked(streams)[:, tf.newaxis]
            for variable, rows in changes:
                scatter_nd_update(variable, indices, rows)

    @contextlib.contextmanager
    def reduced_to(self, streams: np.ndarray) -> Iterator[list[tf.Variable]]:
        """Keep only the rows of some streams in this context, to save them. Eager mode only.

        Nobody else uses the streams meanwhile. At the end everything is as it was.

        Args:
            streams: Integers `[M]`: streams that are held, each once.

        Yields:
            The variables of all members, the position once and last.
        """
        with self.turn():
            variables = self._variables()
            before = [variable.read_value() for variable in variables]
            try:
                for variable, rows in zip(variables, before, strict=True):
                    variable.assign(tf.gather(rows, streams))
                yield variables
            finally:
                for variable, rows in zip(variables, before, strict=True):
                    variable.assign(rows)

    def join(self, others: Iterable[Streams], whole: Any) -> None:
        """Merge other layers' streams into these. From now on a whole steps them.

        Args:
            others: The `Streams` of the other layers of the whole.
            whole: The layer or model that steps all members.

        Raises:
            ValueError: If another whole, which is no part of this one, owns some of the streams, or
                streams have taken different steps in different layers. The state is then as it
                was, but room may have been made.
        """
        every = list(dict.fromkeys([self, *others]))
        layers = whole._flatten_layers()
        inside = {id(layer) for layer in layers}
        states = {id(getattr(layer, "_stream_state", None)) for layer in layers}
        # Two wholes of the very same layers may share their streams.
        same = len(every) == 1 and all(id(state) in states for state in self.members)
        for streams in every:
            for other in streams.wholes:
                if id(other) not in inside and not same:
                    raise ValueError(
                        f"Expected layers of which no other model steps the streams, but got some "
                        f"of {other.name}. A layer's streams have one owner: give {whole.name} "
                        "layers of its own (keras.models.clone_model copies a model)"
                    )
        held = max(int(tf.shape(streams.position)[0]) for streams in every)
        for streams in every:
            streams.ensure(held)
        taken = [streams.position.numpy() for streams in every]
        if not all(np.array_equal(x, taken[0]) for x in taken):
            raise ValueError(
                f"Expected layers that have taken the same steps, to be stepped by {whole.name}, "
                f"but got layers whose streams have taken {[x.tolist() for x in taken]}. Call "
                "ct.clean_state(model) first"
            )
        self.wholes = [x for x in self.wholes if id(x) not in inside and x is not whole] + [whole]
        for streams in every[1:]:
            for state in streams.members:
                state.position = self.position
                state.streams = self
                self.members.append(state)
