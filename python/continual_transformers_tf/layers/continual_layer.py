"""What all continual layers have: how they are called, and the state of their streams."""

import contextlib
import contextvars

import keras
import tensorflow as tf

from continual_transformers_tf.layers.inputs import expect_given
from continual_transformers_tf.ops.stream_state import check_integer

CALL_MODES = ("regular", "step", "steps")

_override = contextvars.ContextVar("continual_transformers_call_mode", default=None)
_always_partial = contextvars.ContextVar("continual_transformers_always_partial", default=False)


def _check(mode):
    if mode not in CALL_MODES:
        raise ValueError(f"Expected call_mode to be one of {CALL_MODES}, but got {mode!r}")
    return mode


@contextlib.contextmanager
def call_mode(mode):
    """Within it, every continual layer is called in `mode`, whatever its own call mode is.

    ```python
    with ct.call_mode("step"):
        y = model(x)
    ```

    It holds for the thread (or the asynchronous task) that entered it. A `tf.function` keeps the
    mode that it was traced in; so does `model.predict`, which traces one at its first call.

    Args:
        mode: "regular", "step" or "steps".

    Raises:
        ValueError: if `mode` is none of these.
    """
    token = _override.set(_check(mode))
    try:
        yield
    finally:
        _override.reset(token)


@contextlib.contextmanager
def always_partial():
    """Within it, layers warm up as with `warm_up="partial"`: a whole of layers warms up as one."""
    token = _always_partial.set(True)
    try:
        yield
    finally:
        _always_partial.reset(token)


def always_partial_here():
    """Whether `always_partial` is entered."""
    return _always_partial.get()


def ensure_streams(model, streams):
    """Makes room for streams 0, ..., streams - 1 in every continual layer of a model.

    Those that are held keep their state.

    Args:
        model: a `keras.Model` or `keras.layers.Layer`.
        streams: int.
    """
    for streams_of_layers in _streams_of(model):
        streams_of_layers.ensure(streams)


def convert_weights(model):
    """Takes the kernels of a model as they are now, in every layer that has a `weights_dtype`.

    Call it after `fit`, `keras.Model.set_weights`, `tf.train.Checkpoint.restore` and anything else
    that changes weights. It is not needed after `set_weights` of a layer of this package, or when
    Keras loads a file. Functions traced before see the new kernels too.

    Args:
        model: a `keras.Model` or `keras.layers.Layer`.
    """
    for layer in _continual_layers(model):
        if hasattr(layer, "convert_weights"):
            layer.convert_weights()


def clean_state(model, streams=None):
    """Forgets what streams have seen, in every continual layer of a Keras model or layer.

    Args:
        model: a `keras.Model` or `keras.layers.Layer`.
        streams: integers `[M]`, which ones; None: all.

    Raises:
        ValueError: if a stream is not held, or is named twice.
    """
    for streams_of_layers in _streams_of(model):
        streams_of_layers.clean(streams)
    if streams is None:
        for layer in _continual_layers(model):
            layer._restart()


@contextlib.contextmanager
def hold_streams(model):
    """Within it, other threads do not step, read or change the streams of a Keras model or layer.

    They wait. Use it round several reads that have to fit each other, such as the writing of a
    `tf.train.Checkpoint`. `get_state` and all other methods do so by themselves. Within it, do not
    call a `tf.function` that steps the same streams: it would wait for itself.

    Args:
        model: a `keras.Model` or `keras.layers.Layer`.
    """
    with contextlib.ExitStack() as held:
        for streams in _streams_of(model):
            held.enter_context(streams.turn())
        yield


def _streams_of(model):
    """All `Streams` of a model's layers, each once."""
    return dict.fromkeys(layer._streams for layer in _continual_layers(model))


def _continual_layers(model):
    if not isinstance(model, keras.Layer):
        raise ValueError(f"Expected a Keras model or layer, but got {model!r}")
    return [layer for layer in model._flatten_layers() if isinstance(layer, ContinualLayer)]


class ContinualLayer:
    """Mixed into a Keras layer: `call` does what the call mode says, and streams have a state.

    The streams' state is no variable of Keras: it is not among the weights, and `stateless_call`
    neither takes nor returns it. A step within `stateless_call` has the weights that are given, and
    moves the layer's own streams, but with `update_state=False`.

    The layer gives `call_regular`, `call_step` and `call_steps`, and `_stream_state`, its
    `StreamState`. A whole of several layers is a `CompositeLayer`.
    """

    gives_windows = False  # Whether a step gives all outputs of the window, and not one row.
    _made_for = None  # The compute dtype that the streams' state is for; None: any.

    def __call__(self, *args, **kwargs):
        if args:  # Keras would fail for want of a shape.
            expect_given(f"an input of {self.name}", args[0])
        return super().__call__(*args, **kwargs)

    @property
    def call_mode(self):
        """What calling the layer does: "regular", "step" or "steps"; see `ct.call_mode`."""
        return self._call_mode

    @call_mode.setter
    def call_mode(self, mode):
        self._call_mode = _check(mode)

    @property
    def active_call_mode(self):
        """The call mode in force: that of `ct.call_mode` where one is entered, or the layer's."""
        return _override.get() or self._call_mode

    @property
    def active_warm_up(self):
        """The warm-up in force: the layer's, but "partial" in a graph and within a whole."""
        if always_partial_here() or not tf.executing_eagerly():
            return "partial"
        return self.warm_up

    @property
    def position(self):
        """int64 tensor `[S]`: the steps that each of the streams held has taken."""
        return self._stream_state.position

    @property
    def receptive_field(self):
        """How many steps an output depends on."""
        return 1

    @property
    def delay(self):
        """Steps between an input and the output that belongs to it."""
        return 0

    @property
    def input_features(self):
        """The inputs of a step of a built layer, in order: a dict from names to sizes.

        A size is a number of features, or the shape of a row, a tuple.
        """
        raise NotImplementedError

    def _check_policy(self):
        """Raise ValueError if the layer computes in another dtype than its streams' state is for.

        Keras lets a dtype policy be set after construction, and goes on in the new dtype.
        """
        if self._made_for not in (None, self.compute_dtype):
            raise ValueError(
                f"Expected the compute dtype that {self.name} was made with, {self._made_for}, "
                f"which its streams' state is for, but got {self.compute_dtype}: its dtype_policy "
                f"was set to {self.dtype_policy.name!r} later. Make another layer with "
                f"dtype={self.dtype_policy.name!r}, and give it the weights by set_weights. "
                "(Regular calls go on in the new dtype.)"
            )

    # The state of the streams. All of it is that of `_streams`, which the layers of a whole share.

    @property
    def _streams(self):
        """The `Streams` that the layer steps."""
        return self._stream_state.streams

    def ensure_streams(self, streams):
        """Make room for streams 0, ..., streams - 1. Those that are held keep their state.

        As `clean_state`, this acts on all layers that share the layer's streams.
        """
        if not tf.is_tensor(streams):
            check_integer("streams", streams, at_least=0)
        self._streams.ensure(streams)

    def clean_state(self, streams=None):
        """Forget what streams have seen: they begin again.

        Args:
            streams: Integers `[M]`: which ones; None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        self._streams.clean(streams)
        if streams is None:
            self._restart()

    def _restart(self):
        """Forget what is not one stream's; called when all streams begin again."""

    def get_state(self, streams=None):
        """Return the state of streams: a dict of NumPy arrays, a row a stream. Eager mode only.

        Args:
            streams: Integers `[M]`: which ones, in this order; None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        return self._stream_state.get_state(streams)

    def set_state(self, state, streams=None):
        """Put back what `get_state` gave, here or in another layer of the same sizes.

        Args:
            state: What `get_state` gave, of M streams.
            streams: Integers `[M]`: which streams take it; None: streams 0, ..., M - 1. Room is
                made for them, and other streams that are held begin again.

        Raises:
            ValueError: If the state does not fit; the streams then stay as they were.
        """
        self._streams.set_state(self._states(state), streams)

    def _states(self, state):
        """What `get_state` gave, as pairs of a `StreamState` and its part of it."""
        return [(self._stream_state, state)]

    def set_weights(self, weights):
        super().set_weights(weights)
        convert_weights(self)

    def get_config(self):
        return {**super().get_config(), "call_mode": self._call_mode}
