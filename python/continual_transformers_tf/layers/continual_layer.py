"""What all continual layers share: calls by mode, the warm-up rule and their streams' state."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.call_modes import check_call_mode, entered_call_mode
from continual_transformers_tf.layers.inputs import TensorLike, expect_given
from continual_transformers_tf.layers.warm_up import is_always_partial
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_state import StreamState, check_integer
from continual_transformers_tf.ops.streams import Streams


class ContinualLayer(keras.layers.Layer):
    """A Keras layer that can also be called on the steps of endless streams.

    A subclass defines `call_regular`, `call_step` and `call_steps`, the latter two by
    `self._streams.take_steps`, and `call` by `_call_by_mode`. (With one input it is a
    `OneInputLayer`, which has most of these.) Its constructor sets `call_mode`, `_warm_up` if there
    is a choice, `_made_for` and `_stream_state`. A layer that is made of several continual layers
    is a `CompositeLayer`.

    The state of the streams is not in Keras variables: it is not among the weights, and
    `stateless_call` neither takes nor returns it. A step within `stateless_call` uses the weights
    that are given, and moves the layer's own streams unless `update_state=False`.
    """

    # Whether a step returns the outputs of the whole window, and not one row.
    gives_windows = False

    # The compute dtype that the streams' state was made for. None: any.
    _made_for: str | None = None
    _warm_up = "partial"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:  # Keras would fail because None has no shape.
            expect_given(f"an input of {self.name}", args[0])
        return super().__call__(*args, **kwargs)

    # Calls by mode.

    @property
    def call_mode(self) -> str:
        """What calling the layer does: "regular", "step" or "steps"; see `ct.call_mode`."""
        return self._call_mode

    @call_mode.setter
    def call_mode(self, mode: str) -> None:
        self._call_mode = check_call_mode(mode)

    @property
    def active_call_mode(self) -> str:
        """The mode of `ct.call_mode` if that context is entered, otherwise the layer's own."""
        return entered_call_mode() or self._call_mode

    def _call_by_mode(
        self, *inputs: Any, streams: TensorLike | None, update_state: bool, **arguments: Any
    ) -> Any:
        """Call the method of the active call mode. `streams`, `update_state` are for steps only."""
        mode = self.active_call_mode
        if mode == "regular":
            return self.call_regular(*inputs, **arguments)
        call = self.call_step if mode == "step" else self.call_steps
        return call(*inputs, **arguments, streams=streams, update_state=update_state)

    # What a step depends on, and when it has an output.

    @property
    def warm_up(self) -> str:
        """What a step returns while the receptive field fills: "none" or "partial"."""
        return self._warm_up

    @property
    def active_warm_up(self) -> str:
        """The layer's `warm_up`, but "partial" in a graph and as a part of a larger layer."""
        return self.warm_up if self._can_return_none else "partial"

    @property
    def _can_return_none(self) -> bool:
        return tf.executing_eagerly() and not is_always_partial()

    @property
    def receptive_field(self) -> int:
        """How many steps an output depends on."""
        return 1

    @property
    def delay(self) -> int:
        """How many steps lie between an input and the output that belongs to it."""
        return 0

    @property
    def block(self) -> int:
        """How many steps of its input the layer takes at once: more than 1 if it has strides."""
        return 1

    @property
    def ready(self) -> tf.Tensor:
        """bool tensor `[S]`: which of the streams held have a full receptive field."""
        return self.position >= self.receptive_field

    @property
    def _first_output(self) -> int:
        """The first block of steps of a stream that has an output, counted from 1."""
        return 1 if self.active_warm_up == "partial" else -(-self.receptive_field // self.block)

    def _unready_steps(self, step: Step) -> int:
        """Return how many of a call's oldest steps have no output; in a graph always 0.

        The stream of the call that has come furthest decides.
        """
        first = self._first_output
        if first == 1:
            return 0
        before = step.known_position(lambda least: least.max(initial=0) >= first - 1)
        furthest = int((before + step.steps).max(initial=0))
        return step.steps - max(0, min(step.steps, furthest - first + 1))

    def _ready_outputs(self, step: Step, outputs: Any) -> Any:
        """Return the outputs of a call without those of unready steps.

        Args:
            step: The `Step`.
            outputs: A tensor `(M, T, ...)`, or a structure of them, with a fixed number of rows
                for each step.

        Returns:
            `(M, T', ...)`, or None in place of every tensor if T' = 0.
        """
        unready = self._unready_steps(step)
        if unready == 0:
            return outputs
        if unready == step.steps:
            return keras.tree.map_structure(lambda x: None, outputs)
        return keras.tree.map_structure(
            lambda x: x[:, unready * (x.shape[1] // step.steps) :], outputs
        )

    # Inputs.

    @property
    def input_features(self) -> dict[str, Any]:
        """The inputs of a step of a built layer, in order: a dict from names to sizes.

        A size is a number of features, or the shape of a row, a tuple.
        """
        raise NotImplementedError

    def _ensure_built(self, *inputs: tf.Tensor) -> None:
        if not self.built:
            # The weights are made outside the graph that may be being traced.
            with tf.init_scope():
                self.build(*(x.shape for x in inputs))

    @property
    def _inner_layers(self) -> Sequence["ContinualLayer"]:
        """The continual layers that this layer calls."""
        return []

    def _check_policy(self) -> None:
        """Raise ValueError if the layer computes in another dtype than its streams' state is for.

        Keras lets a dtype policy be set after construction, and continues in the new dtype.
        """
        if self._made_for not in (None, self.compute_dtype):
            raise ValueError(
                f"Expected the compute dtype that {self.name} was made with, {self._made_for}, "
                f"which its streams' state is for, but got {self.compute_dtype}: its dtype_policy "
                f"was set to {self.dtype_policy.name!r} later. Make another layer with "
                f"dtype={self.dtype_policy.name!r}, and give it the weights by set_weights. "
                "(Regular calls continue in the new dtype.)"
            )
        for layer in self._inner_layers:
            layer._check_policy()

    # The state of the streams, which the layers of a model share.

    @property
    def _streams(self) -> Streams:
        """The streams that the layer steps."""
        return self._stream_state.streams

    @property
    def position(self) -> tf.Tensor:
        """int64 tensor `[S]`: the steps that each of the streams held has taken."""
        return self._streams.position * self.block if self.block > 1 else self._streams.position

    def ensure_streams(self, streams: int | tf.Tensor) -> None:
        """Make room for streams 0, ..., streams - 1. Streams that are held keep their state.

        As `clean_state`, this acts on all layers that share the layer's streams.
        """
        if not tf.is_tensor(streams):
            check_integer("streams", streams, at_least=0)
        self._streams.ensure(streams)

    def clean_state(self, streams: TensorLike | None = None) -> None:
        """Forget what streams have seen: they begin again.

        Args:
            streams: Integers `[M]`, the streams to forget. None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        self._streams.clean(streams)
        if streams is None:
            self._restart()

    def _restart(self) -> None:
        """Forget what does not belong to a single stream, when all streams begin again."""

    def get_state(self, streams: TensorLike | None = None) -> dict[str, Any]:
        """Return the state of streams: a dict of NumPy arrays, a row a stream. Eager mode only.

        Args:
            streams: Integers `[M]`, the streams to read, in this order. None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        return self._stream_state.get_state(streams)

    def set_state(self, state: dict[str, Any], streams: TensorLike | None = None) -> None:
        """Put back what `get_state` returned, here or in another layer of the same sizes.

        Args:
            state: What `get_state` returned for M streams.
            streams: Integers `[M]`, the streams that take it. None: streams 0, ..., M - 1. Room is
                made for them, and all other streams that are held begin again.

        Raises:
            ValueError: If the state does not fit. The streams then stay as they were.
        """
        self._streams.set_state(self._states(state), streams)

    def _states(self, state: dict[str, Any]) -> list[tuple[StreamState, dict[str, Any]]]:
        """Split what `get_state` returned into pairs of a `StreamState` and its part."""
        return [(self._stream_state, state)]

    # Weights and configuration.

    def set_weights(self, weights: list[np.ndarray]) -> None:
        super().set_weights(weights)
        for layer in self._flatten_layers():
            if isinstance(layer, ContinualLayer):
                layer.convert_weights()

    def convert_weights(self) -> None:
        """Convert the kernels as they are now for steps in the layer's `weights_dtype`, if any.

        `ct.convert_weights` says when to call it.
        """

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "call_mode": self._call_mode}
