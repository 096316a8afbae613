"""Layers that are made of several continual layers."""

from collections.abc import Sequence
from typing import Any

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike
from continual_transformers_tf.ops.stream_state import StreamState
from continual_transformers_tf.ops.streams import Streams


class CompositeLayer(ContinualLayer):
    """A `ContinualLayer` whose streams' state is that of its parts, which all take the same steps.

    A subclass defines `parts`, and calls `_share_streams` when they are known.
    """

    @property
    def parts(self) -> Sequence[ContinualLayer]:
        """The continual layers in it that take steps."""
        raise NotImplementedError

    @property
    def _part_names(self) -> list[str]:
        """The names of the parts in the state."""
        return [str(i) for i in range(len(self.parts))]

    def _share_streams(self) -> None:
        """Join the parts' streams. From now on this layer steps them."""
        first, *others = (part._streams for part in self.parts)
        first.join(others, self)

    @property
    def _streams(self) -> Streams:
        return self.parts[0]._streams

    def _restart(self) -> None:
        for part in self.parts:
            part._restart()

    def get_state(self, streams: TensorLike | None = None) -> dict[str, Any]:
        """Return the state of streams: a dict from the name of each part to its state.

        The parts are numbered, "0", "1", ...; those of a `CoResidual` are "layer" and, if the layer
        has a delay, "skip".

        Args:
            streams: Integers `[M]`, the streams to read, in this order. None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        with self._streams.turn():
            return {
                name: part.get_state(streams)
                for name, part in zip(self._part_names, self.parts, strict=True)
            }

    def _states(self, state: dict[str, Any]) -> list[tuple[StreamState, dict[str, Any]]]:
        names = self._part_names
        if not isinstance(state, dict) or set(state) != set(names):
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {sorted(names)}, but got {got}")
        return [
            pair
            for name, part in zip(names, self.parts, strict=True)
            for pair in part._states(state[name])
        ]
