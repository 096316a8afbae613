"""What streams keep between calls: variables with one row a stream, and whose turn it is."""

import contextlib
import functools
import threading
import uuid

import numpy as np
import tensorflow as tf

from continual_transformers_tf.ops.library import in_xla
from continual_transformers_tf.ops.scatter import scatter_nd_update

_LARGEST = np.iinfo(np.int32).max


class StreamState(tf.Module):
    """Variables whose first axis is the stream, and the number of steps each stream has taken.

    Streams are numbered from 0. More can come, and none goes: those that are held keep their state.
    A layer has one `StreamState`. The states of all layers of a model share one `Streams`, and so
    one position and one lock.

    Args:
        streams: S, how many streams are held at first.
        rows: Dict from a name to (the shape of a stream's row, dtype): what is kept beside the
            position. Each becomes an attribute, a `tf.Variable [S, ...]`.

    Attributes:
        position: tf.Variable int64 `[S]`, the steps each stream has taken.
        streams: The `Streams` that this state shares with the other layers of its model.

    Raises:
        ValueError: If `streams` is not an integer >= 0.
    """

    def __init__(self, streams, rows=None, name=None):
        super().__init__(name=name)
        check_integer("streams", streams, at_least=0)
        self._names = ()
        for row_name, (shape, dtype) in {**(rows or {}), "position": ([], tf.int64)}.items():
            self._add_variable(row_name, streams, shape, dtype)
        self.streams = Streams(self, streams)

    def add_row(self, name, shape, dtype):
        """Keep one thing more of each stream, for layers that learn its shape when they are built.

        Args:
            name: The name of the new attribute, a `tf.Variable [S, *shape]` of zeros.
            shape: The shape of a stream's row.
            dtype: The variable's dtype.
        """
        with tf.init_scope(), self.turn():
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
    def variables_by_name(self):
        """Dict from the name of each variable to the variable, the position among them."""
        return {name: getattr(self, name) for name in self._names}

    # What follows acts on all layers that share these streams.

    def turn(self):
        """See `Streams.turn`."""
        return self.streams.turn()

    def ensure_streams(self, streams):
        """See `Streams.ensure`."""
        self.streams.ensure(streams)

    def clean_state(self, streams=None):
        """See `Streams.clean`."""
        self.streams.clean(streams)

    # What follows reads and writes the rows of this layer.

    def get_state(self, streams=None):
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

    def set_state(self, state, streams=None):
        """Put back what `get_state` gave, here or elsewhere, of streams of the same sizes.

        Args:
            state: What `get_state` gave, of M streams.
            streams: Integers `[M]`: which streams take it; None: streams 0, ..., M - 1. Room is
                made for them, and other streams that are held begin again.

        Raises:
            ValueError: If the state does not fit; this state then stays as it was.
        """
        self.streams.set_state([(self, state)], streams)

    def arrays_of(self, state, rows=None):
        """Check a state that `get_state` gave, here or elsewhere.

        Args:
            state: What the user gave.
            rows: M, how many streams it must be of; None: as many as it has positions.

        Returns:
            A dict from the name of each variable to an array of its dtype, `[M, ...]`.

        Raises:
            ValueError: If the state does not fit.
        """
        variables = self.variables_by_name
        if not isinstance(state, dict) or set(state) != set(variables):
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {sorted(variables)}, but got {got}")
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


class Streams:
    """The streams that one layer, or all layers of a model, step together.

    They have one number of streams, one position and one lock. Whoever steps, reads, writes, cleans
    or makes room for them takes a turn. Eager calls of several threads take turns by a lock of
    Python's, and graphs by a mutex of TensorFlow's, which a SavedModel has too. A function that XLA
    compiles can take no mutex: do nothing else with its streams while it runs.

    Args:
        state: The `StreamState` whose streams these are at first.
        held: How many streams it holds.

    Attributes:
        position: tf.Variable int64 `[S]`, the steps that each stream has taken.
        members: The `StreamState`s that share these streams.
        wholes: The layers and models that step all members. While there is one, no member steps by
            itself.
    """

    def __init__(self, state, held):
        self.position = state.position
        self.members = [state]
        self.wholes = []
        self._turn = _EagerTurn()
        self._now = threading.local()  # Its `step`: the step that this thread is taking.
        # At least so many streams are held, unless a checkpoint has restored fewer.
        self._known = held

    # Whose turn it is.

    def turn(self):
        """A context within which nobody else reads or changes these streams. It may be nested."""
        if tf.executing_eagerly():
            return self._turn
        if in_xla() or getattr(self._now, "graphs", 0):
            return contextlib.nullcontext()
        return self._graph_turn()

    @contextlib.contextmanager
    def _graph_turn(self):
        graph = tf.compat.v1.get_default_graph()
        with tf.init_scope():
            mutex = self.mutex
            for state in self.members:  # So that a SavedModel knows it.
                state.mutex = mutex
            handle = mutex.resource_handle
        # If an op of this turn fails, the turn's tensors go, and with them the lock.
        token = tf.raw_ops.MutexLock(mutex=handle)
        before = len(graph.get_operations())
        self._now.graphs = 1
        try:
            with tf.control_dependencies([token]):
                yield
        finally:
            self._now.graphs = 0
        with tf.control_dependencies(_last_ops(graph, before)):
            tf.raw_ops.ConsumeMutexLock(mutex_lock=token)

    @property
    def mutex(self):
        """What graphs take turns by, for a SavedModel to track."""
        return self._turn.mutex

    # Steps.

    @property
    def step(self):
        """The `Step` that this thread is taking; None: none."""
        return getattr(self._now, "step", None)

    def expect_to_step(self, layer):
        """Raise ValueError if a layer is about to step by itself although it is part of a whole."""
        if self.wholes and not any(layer is whole for whole in self.wholes):
            raise ValueError(
                f"Expected a step of {self.wholes[-1].name}, but got one of {layer.name} alone, "
                f"whose streams are those of {self.wholes[-1].name}: the other layers would miss "
                "the step. Step the whole, or make the layer anew (keras.models.clone_model copies "
                "a model)"
            )

    def take_steps(self, layer, compute, streams, rows, steps, update_state):
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
            graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
            before = 0 if graph is None else len(graph.get_operations())
            step = self._now.step = Step(self, layer, streams, rows, steps, update_state)
            try:
                outputs = compute(step)
            finally:
                self._now.step = None
            if not update_state:
                return outputs
            if graph is None:
                step.commit()
                return outputs
            with tf.control_dependencies(_last_ops(graph, before)):
                done = step.commit()
            with tf.control_dependencies(done):
                return tf.nest.map_structure(
                    lambda y: tf.identity(y) if tf.is_tensor(y) else y, outputs
                )

    # Room.

    def ensure(self, streams):
        """Make room for streams 0, ..., streams - 1 in all members.

        Args:
            streams: An int, or in a graph an int32 scalar tensor.

        Raises:
            ValueError: If it is an int beyond int32.
        """
        if isinstance(streams, (int, np.integer)) and streams > _LARGEST:
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

    def ensure_rows(self, rows):
        """Make room for the rows of a call: streams 0, ..., rows - 1.

        Unlike `ensure`, this runs no op if the room is known to be there, so that an eager step
        stays one op. After a checkpoint of fewer streams, call `ensure` first.

        Args:
            rows: As in `ensure`.
        """
        if not isinstance(rows, int) or rows > self._known:
            self.ensure(rows)

    def _grow(self, streams):
        # All that takes memory comes before the first change. The position, whose length is the
        # number of streams, changes last.
        grown = []
        for variable in self._variables():
            missing = tf.maximum(streams - tf.shape(variable)[0], 0)
            rest = tf.zeros(tf.concat([[missing], tf.shape(variable)[1:]], 0), variable.dtype)
            grown.append((variable, tf.concat([variable, rest], 0)))
        with tf.control_dependencies([rows for _, rows in grown]):
            for variable, rows in grown:
                variable.assign(rows)
        return streams

    def _variables(self):
        """The variables of all members, the position once and last."""
        return [
            variable
            for state in self.members
            for name, variable in state.variables_by_name.items()
            if name != "position"
        ] + [self.position]

    # What is asked of a call's streams.

    def numbers(self, streams, rows):
        """The numbers of a call's streams: an int32 tensor `[M]`.

        Args:
            streams: Such a tensor; or None: row i is stream i.
            rows: M: an int, or in a graph an int32 scalar tensor.
        """
        if streams is not None:
            return streams
        return _first_streams(rows) if tf.executing_eagerly() else tf.range(rows)

    def checked(self, streams, rows=None):
        """`stream_tensor(streams)`, of which each is known to be held, and named once.

        Args:
            streams: Integers `[M]`, as the user gave them.
            rows: M, where it is known from elsewhere: an int, or in a graph an int32 scalar tensor.

        Raises:
            ValueError: If one is not, or they are not M; in a graph
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

    def clean(self, streams=None):
        """Forget everything that streams have seen: they begin again.

        Args:
            streams: Integers `[M]`: which ones; None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        # A row that no step has written since is never read, so all but single numbers, such as the
        # position, may stay.
        numbers = [v for v in self._variables() if v.shape.rank == 1]
        with self.turn():
            if streams is not None:
                streams = self.checked(streams)
            for number in numbers:
                if streams is None:
                    number.assign(tf.zeros_like(number))
                else:
                    zeros = tf.zeros_like(streams, dtype=number.dtype)
                    number.scatter_nd_update(streams[:, tf.newaxis], zeros)

    def set_state(self, states, streams=None):
        """Put back the state of all members; see `StreamState.set_state`.

        Args:
            states: Pairs of a member and what its `get_state` gave, one pair for each member.
            streams: As there.

        Raises:
            ValueError: If a state does not fit its member, there is none for a member, or their
                positions differ. All states then stay as they were.
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
        # All that takes memory comes before the first change.
        changes = [
            (variable, tf.constant(arrays[name], variable.dtype))
            for member, arrays in states
            for name, variable in member.variables_by_name.items()
            if name != "position"
        ] + [(self.position, tf.constant(taken[0]))]
        with self.turn():
            if streams is None:
                self.ensure(len(taken[0]))
                streams = np.arange(len(taken[0]))
                indices = self.checked(streams)[:, tf.newaxis]
                self.clean()
            else:
                indices = self.checked(streams)[:, tf.newaxis]
            for variable, rows in changes:
                scatter_nd_update(variable, indices, rows)

    def join(self, others, whole):
        """Make one set of streams of several, which a whole steps from now on.

        Args:
            others: The `Streams` of the other layers of the whole.
            whole: The layer or model that steps all members.

        Raises:
            ValueError: If one of the streams belongs to another whole that is no part of this one,
                or streams have taken other steps in one layer than in another. Of the state then
                nothing has changed, but room may have been made.
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


class Step:
    """T steps of M streams that are being taken; made by `Streams.take_steps`.

    Args:
        all_streams: The `Streams`.
        whole: The layer or model that takes the steps.
        streams: int32 tensor `[M]`; or None: row i is stream i.
        rows, steps, update_state: As in `Streams.take_steps`.

    Attributes:
        whole, streams, rows, steps, update_state: As above.
        one: Whether this is known to be one step of each stream.
        op_advances: Whether the op that takes the step of the next layer is the last that can fail,
            and so may itself advance the position.
    """

    def __init__(self, all_streams, whole, streams, rows, steps, update_state):
        self._all = all_streams
        self.whole = whole
        self.streams = streams
        self.rows = rows
        self.steps = steps
        self.update_state = update_state
        self.one = isinstance(steps, int) and steps == 1
        self.op_advances = False
        self._advanced = False
        self._changes = []

    @functools.cached_property
    def numbers(self):
        """int32 tensor `[M]`: the number of each row's stream."""
        return self._all.numbers(self.streams, self.rows)

    @functools.cached_property
    def position(self):
        """int64 tensor `[M]`: the steps that each row's stream had taken before."""
        return tf.gather(self._all.position, self.numbers)

    @property
    def writes_rings(self):
        """Whether an attention op may write its rings itself.

        The ring's row that one step overwrites holds a step that has left the window, so an attempt
        that fails has overwritten nothing that is read again. Several steps overwrite more: they
        are put into the rings at the end.
        """
        return self.update_state and self.one

    def advancing(self):
        """Whether the next op advances the position, which it may do as the step's last change."""
        if not (self.op_advances and self.update_state) or self._changes:
            return False
        self._advanced = True
        return True

    def at_the_end(self, change):
        """Have a function without arguments change variables when all has been computed."""
        if self.update_state:
            self._changes.append(change)

    def commit(self):
        """Change the state, the position last. Return the ops to wait for, in a graph."""
        if self._advanced:
            return []
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        before = 0 if graph is None else len(graph.get_operations())
        position, indices = self.position, tf.expand_dims(self.numbers, 1)
        after = position + tf.cast(self.steps, tf.int64)
        for change in self._changes:
            change()
        with tf.control_dependencies([] if graph is None else _last_ops(graph, before)):
            self._all.position.scatter_nd_update(indices, after)
        return [] if graph is None else _last_ops(graph, before)


class _EagerTurn:
    """The turn of an eager call, a context that may be nested; see `Streams.turn`."""

    def __init__(self):
        # Who has the gate comes next. Without it a thread that steps in a loop would take the lock
        # again before those that wait for it.
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._owner = None  # The thread that has the turn.
        self._depth = 0
        self._mutex = None
        self._token = None

    def __enter__(self):
        thread = threading.get_ident()
        if self._owner != thread:
            with self._gate:
                self._lock.acquire()
            if self._mutex is not None:
                try:
                    self._token = tf.raw_ops.MutexLock(mutex=self._mutex.resource_handle)
                except BaseException:
                    self._lock.release()
                    raise
            self._owner = thread
        self._depth += 1

    def __exit__(self, *_):
        self._depth -= 1
        if self._depth > 0:
            return
        token, self._token, self._owner = self._token, None, None
        try:
            if token is not None:
                tf.raw_ops.ConsumeMutexLock(mutex_lock=token)
        finally:
            self._lock.release()

    @property
    def mutex(self):
        """The mutex of graphs, which eager calls take too from now on."""
        with self:
            if self._mutex is None:
                self._mutex = _Mutex()
            return self._mutex


class _Mutex(tf.saved_model.experimental.TrackableResource):
    """A mutex of TensorFlow's, which a SavedModel's loader makes anew."""

    def __init__(self):
        super().__init__()
        self._shared_name = f"continual_transformers_streams_{uuid.uuid4()}"

    def _create_resource(self):
        with tf.device("CPU:0"):
            return tf.raw_ops.MutexV2(shared_name=self._shared_name)


def _last_ops(graph, first):
    """The ops of a graph from the first-th on that nothing waits for, or that change something."""
    return [
        op
        for op in graph.get_operations()[first:]
        if op._is_stateful or not any(output.consumers() for output in op.outputs)
    ]


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
