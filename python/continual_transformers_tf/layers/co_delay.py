"""A delay: what was put in comes out again some steps later."""

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import (
    WARM_UPS,
    expect_given,
    rows_and_steps,
    without_keras_mask,
)
from continual_transformers_tf.ops.delay import delayed_steps, put_steps
from continual_transformers_tf.ops.stream_state import StreamState, check_integer


@keras.saving.register_keras_serializable("continual_transformers_tf")
class CoDelay(ContinualLayer, keras.layers.Layer):
    """Gives each step `delay` steps later; windows as they are.

    It brings a branch that is at once what it is beside one that answers later, such as attention
    with a `query_index`: see `CoResidual`.

    Args:
        delay: D, by how many steps. 0: each step is given at once.
        dtype: of the steps, which are kept and given in it: floating or not. None: Keras' own.
        temporal_dim: which axis of windows and of several steps is time; a step has no such axis.
        call_mode: what calling the layer does: "regular", "step" or "steps".
        warm_up: what a step gives, in eager mode, while no stream of the call has taken more than
            `delay` steps. "none": None. "partial": zeros, as of streams in a call that have not
            when others have, and as in graphs.
        **kwargs: `name` and the like.

    Returns:
        What the call mode's method returns: `call_regular`, `call_step`, `call_steps`.

    Raises:
        ValueError: at construction, if `delay` is not an integer >= 0, `temporal_dim` is not an
            axis, or `warm_up` or `call_mode` is none of those above.
    """

    def __init__(
        self,
        delay,
        dtype="float32",
        temporal_dim=1,
        call_mode="regular",
        *,
        warm_up="none",
        **kwargs,
    ):
        check_integer("delay", delay, at_least=0)
        integer = isinstance(temporal_dim, (int, np.integer)) and not isinstance(temporal_dim, bool)
        if not integer or temporal_dim == 0:
            raise ValueError(
                "Expected temporal_dim to be an axis other than 0, the streams', but got "
                f"{temporal_dim!r}"
            )
        if warm_up not in WARM_UPS:
            raise ValueError(f"Expected warm_up to be one of {WARM_UPS}, but got {warm_up!r}")
        if isinstance(dtype, (tf.DType, type)):  # As of TensorFlow or NumPy: Keras knows names.
            dtype = tf.as_dtype(dtype).name
        super().__init__(dtype=dtype, **kwargs)
        self._delay = int(delay)
        self._temporal_dim = int(temporal_dim)
        self._warm_up = warm_up
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._features = None  # Known, and with them the ring's shape, when the layer is built.
        self._stream_state = StreamState(0, name="state")

    @property
    def temporal_dim(self):
        """Which axis of windows and of several steps is time."""
        return self._temporal_dim

    @property
    def warm_up(self):
        """What a step gives while there is nothing to give yet: "none" or "partial"."""
        return self._warm_up

    @property
    def receptive_field(self):
        return self._delay + 1

    @property
    def delay(self):
        return self._delay

    @property
    def ready(self):
        """bool tensor `[S]`: which of the streams held have taken more than `delay` steps."""
        return self.position > self._delay

    @property
    def input_features(self):
        return {"x": self._features}

    def get_config(self):
        return {
            **super().get_config(),
            "delay": self._delay,
            "temporal_dim": self._temporal_dim,
            "warm_up": self._warm_up,
        }

    def build(self, input_shape):
        """Learns the features of a step.

        Args:
            input_shape: in the call mode in force; features whose size is left open are learned
                from the first step instead.
        """
        features = list(input_shape[1:])
        if self.active_call_mode != "step":
            features.pop(self._time_axis(len(input_shape)) - 1)
        if None not in features:
            self._keep(tuple(features))

    def get_build_config(self):
        return {"features": self._features}

    def build_from_config(self, config):
        if config["features"] is not None:
            self._keep(tuple(config["features"]))
        self.built = True

    def call(self, x, streams=None, update_state=True):
        mode = self.active_call_mode
        if mode == "regular":
            return self.call_regular(x)
        call = self.call_step if mode == "step" else self.call_steps
        return call(x, streams=streams, update_state=update_state)

    def call_regular(self, x):
        """Windows as they are; the streams' state plays no part.

        Args:
            x: `(B, T, ...)`, or with time on the axis `temporal_dim`.
        """
        return self._as_own_dtype(x)

    def call_step(self, x, *, streams=None, update_state=True):
        """Takes one step of M streams, and gives that of `delay` steps ago.

        Args:
            x: `(M, ...)`.
            streams: integers `[M]`, which stream each row belongs to, in any order, each once.
                None: row i is stream i, and there is made room for M streams.
            update_state: if False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, ...)`, or None while there is none (see `warm_up`).

        Raises:
            ValueError: if shapes, dtypes or streams do not fit (in a graph, for streams,
                tf.errors.InvalidArgumentError). The streams then go on as if the call had not been
                made.
        """
        x = self._as_own_dtype(x)
        if x.shape.rank == 0:
            raise ValueError(
                f"Expected x of shape (M, ...), one step of M streams, but got {x.shape}"
            )
        self._check_features(x, tuple(x.shape[1:]), [])
        delayed = self._take_steps(tf.expand_dims(x, 1), streams, update_state)
        return None if delayed is None else tf.squeeze(delayed, 1)

    def call_steps(self, x, *, streams=None, update_state=True):
        """Takes T steps of M streams: the same outputs and state as T calls of `call_step`.

        Gradients flow to the steps of this call; those of earlier calls are constants.

        Args:
            x: `(M, T, ...)`, oldest step first, or with time on the axis `temporal_dim`.
            streams, update_state: as `call_step` has them.

        Returns:
            `(M, T', ...)`, time where it was: in eager mode with `warm_up="none"` the outputs of
            the T' newest steps, those that there are in the stream that has come furthest, or None
            where there is none; otherwise T' = T.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: as `call_step`; and if T = 0.
        """
        x = self._as_own_dtype(x)
        axis = self._time_axis(x.shape.rank)
        features = list(x.shape[1:])
        if features.pop(axis - 1) == 0:
            raise ValueError(f"Expected at least one step, but got {tuple(x.shape)}")
        self._check_features(x, tuple(features), [axis])
        delayed = self._take_steps(_moved(x, axis, 1), streams, update_state)
        return None if delayed is None else _moved(delayed, 1, axis)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def _states(self, state):
        # A layer that was never called learns from the state what a step is.
        if self._features is None and isinstance(state, dict) and "steps" in state:
            ring = np.asarray(state["steps"])
            if ring.ndim >= 2 and ring.shape[1] == self._delay:
                self._keep(ring.shape[2:])
                self.built = True
        return super()._states(state)

    def _keep(self, features):
        """Makes the rings, for steps of these features."""
        if self._features == features:
            return
        self._features = features
        if self._delay > 0:
            self._stream_state.add_row("steps", [self._delay, *features], self.compute_dtype)

    def _time_axis(self, rank):
        """Which axis of several steps or windows of this rank is time."""
        axis = self._temporal_dim
        if rank is None or rank < 2 or not -rank < axis < rank:
            shape = "(M, T, ...)" if axis == 1 else f"with time on axis {axis}"
            raise ValueError(f"Expected x of shape {shape}, but got one of rank {rank}")
        return axis % rank

    def _as_own_dtype(self, x):
        expect_given("x", x)
        x = tf.convert_to_tensor(x)
        own = tf.as_dtype(self.compute_dtype)
        if x.dtype != own and not (x.dtype.is_floating and own.is_floating):
            raise ValueError(f"Expected x of dtype {own.name}, but got {x.dtype.name}")
        # No mask of Keras comes out later, so none comes out at once.
        return without_keras_mask(x if x.dtype == own else tf.cast(x, own))

    def _check_features(self, x, features, time):
        """Raises ValueError unless x is of the features that the layer keeps; else builds it."""
        if self._features is None:
            if None in features:
                raise ValueError(f"Expected x of known features, but got {tuple(x.shape)}")
            with tf.init_scope():
                self._keep(features)
            self.built = True
        if not tf.TensorShape(features).is_compatible_with(self._features):
            expected = [str(size) for size in ("M", *self._features)]
            for axis in time:
                expected.insert(axis, "T")
            raise ValueError(
                f"Expected x of shape ({', '.join(expected)}), but got {tuple(x.shape)}"
            )

    def _take_steps(self, x, streams, update_state):
        """x [M, T, ...] -> [M, T', ...] or None."""
        self._check_policy()
        state = self._stream_state
        rows, steps = rows_and_steps(x)

        def compute(step):
            delayed = x
            if self._delay > 0:
                delayed = delayed_steps(state.steps, x, step.numbers, step.position)
                # Selected: what an earlier stream left there may be NaN.
                taken = tf.range(tf.cast(steps, tf.int64))
                came = tf.expand_dims(step.position, 1) + taken >= self._delay
                came = tf.reshape(came, tf.concat([tf.shape(came), self._ones], 0))
                delayed = tf.where(came, delayed, tf.zeros([], delayed.dtype))
                step.at_the_end(lambda: put_steps(state.steps, x, step.numbers, step.position))
            if self._delay == 0 or self.active_warm_up == "partial":
                return delayed
            furthest = int(step.position.numpy().max(initial=0)) + steps
            ready = max(0, min(steps, furthest - self._delay))
            return delayed[:, steps - ready :] if ready else None

        return self._streams.take_steps(self, compute, streams, rows, steps, update_state)

    @property
    def _ones(self):
        return tf.ones([len(self._features)], tf.int32)


def _moved(x, source, target):
    """x with one axis elsewhere."""
    if source == target:
        return x
    axes = [axis for axis in range(x.shape.rank) if axis != source]
    axes.insert(target, source)
    return tf.transpose(x, axes)
