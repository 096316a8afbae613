"""Turns: one thread or one graph at a time uses the streams of a model.

Eager calls take turns by a lock of Python's. Graphs take turns by a resource of TensorFlow's, which
a SavedModel has too. Once a graph of the same streams was traced, eager calls take both.
"""

import contextlib
import threading
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from continual_transformers_tf.ops import library
from continual_transformers_tf.ops.graph_order import last_ops, stateful_ops, wait_for

_ACQUIRE = "ContinualTransformers>AcquireStreamLock"

# The op that ends the newest turn in each graph.
_ends: weakref.WeakKeyDictionary[tf.Graph, weakref.ref[tf.Operation]] = weakref.WeakKeyDictionary()


class GraphLock(tf.saved_model.experimental.TrackableResource):
    """The lock by which graphs take turns. The loader of a SavedModel makes it again."""

    def __init__(self) -> None:
        super().__init__()
        self._shared_name = f"continual_transformers_streams_{uuid.uuid4()}"


class FusedLock(GraphLock):
    """A lock of the op library. A SavedModel with it needs the library.

    It costs a graph a third of what `PlainLock` costs: TensorFlow's mutex hands every request to
    another thread.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self._fused = fused

    def _create_resource(self) -> tf.Tensor:
        with tf.device("CPU:0"):
            return self._fused.continual_transformers_stream_lock_handle(
                shared_name=self._shared_name
            )

    def acquire(self, handle: tf.Tensor) -> tf.Tensor:
        """Wait for the lock, and return a tensor that holds it: until `release`, or as it goes."""
        return self._fused.continual_transformers_acquire_stream_lock(handle)

    def release(self, held: tf.Tensor) -> tf.Operation | None:
        """Free the lock."""
        return self._fused.continual_transformers_release_stream_lock(held)


class PlainLock(GraphLock):
    """A mutex of TensorFlow's, for graphs without the op library."""

    def _create_resource(self) -> tf.Tensor:
        with tf.device("CPU:0"):
            return tf.raw_ops.MutexV2(shared_name=self._shared_name)

    def acquire(self, handle: tf.Tensor) -> tf.Tensor:
        """See `FusedLock.acquire`."""
        return tf.raw_ops.MutexLock(mutex=handle)

    def release(self, held: tf.Tensor) -> tf.Operation | None:
        """See `FusedLock.release`."""
        return tf.raw_ops.ConsumeMutexLock(mutex_lock=held)


def new_graph_lock() -> FusedLock | PlainLock:
    """Make the lock that suits CONTINUAL_TRANSFORMERS_BACKEND and the libraries."""
    with tf.init_scope():
        fused = library.fused_ops("CPU", _ACQUIRE)
        lock = PlainLock() if fused is None else FusedLock(fused)
        _ = lock.resource_handle  # Made here, and not in a graph that asks for it first.
    return lock


class EagerTurn:
    """The turn of an eager call: a context, which may be nested."""

    def __init__(self) -> None:
        # The thread that holds the gate comes next. Without the gate, a thread that steps in a loop
        # would take the lock again before the threads that wait for it.
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None  # The thread that has the turn.
        self._depth = 0
        self._graph_lock: FusedLock | PlainLock | None = None
        self._held: tf.Tensor | None = None

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if self._owner != thread:
            with self._gate:
                self._lock.acquire()
            if self._graph_lock is not None:
                try:
                    self._held = self._graph_lock.acquire(self._graph_lock.resource_handle)
                except BaseException:
                    self._lock.release()
                    raise
            self._owner = thread
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        held, self._held, self._owner = self._held, None, None
        try:
            if held is not None and self._graph_lock is not None:
                self._graph_lock.release(held)
        finally:
            self._lock.release()

    @property
    def graph_lock(self) -> FusedLock | PlainLock:
        """The lock of graphs. From the first use on, eager calls take it too."""
        if self._graph_lock is None:
            with self:
                if self._graph_lock is None:
                    self._graph_lock = new_graph_lock()
        return self._graph_lock


@contextlib.contextmanager
def graph_turn(lock: FusedLock | PlainLock, variables: list[tf.Variable]) -> Iterator[None]:
    """Give the ops that are traced within this context a turn of their own.

    Ops with state wait for the turn. Ops that only compute, and reads of weights, do not: they may
    run before it, and TensorFlow can fold constants.

    Args:
        lock: The lock of graphs.
        variables: The variables that the turn is about.
    """
    graph = tf.compat.v1.get_default_graph()
    with tf.init_scope():
        handle = lock.resource_handle
    # One turn after the other: a graph that held the streams of two models at once could wait for
    # another graph that took them in the other order.
    with tf.control_dependencies(_end_of_newest_turn(graph)):
        held = lock.acquire(handle)
    first = len(graph.get_operations())
    yield
    for op in stateful_ops(graph, first, [variable.handle for variable in variables]):
        wait_for(op, held.op)
    # If an op of this turn fails, the turn's tensors are freed, and with them the lock.
    with tf.control_dependencies(last_ops(graph, first)):
        _ends[graph] = weakref.ref(lock.release(held))


def _end_of_newest_turn(graph: tf.Graph) -> list[tf.Operation]:
    """Return the op that ends the newest turn in a graph, in a list; empty: there is none."""
    end = _ends[graph]() if graph in _ends else None
    same = graph._get_control_flow_context()
    return [end] if end is not None and end._get_control_flow_context() is same else []
