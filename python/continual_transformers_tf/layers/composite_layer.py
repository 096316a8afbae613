"""Wholes that are made of continual layers."""

from continual_transformers_tf.layers.continual_layer import ContinualLayer


class CompositeLayer(ContinualLayer):
    """A `ContinualLayer` whose streams' state is that of its parts, which all take the same steps.

    The whole gives `parts`: a list of the continual layers in it that take steps. When they are
    known it calls `_share_streams`.
    """

    @property
    def parts(self):
        raise NotImplementedError

    def _share_streams(self):
        """Make the parts' streams one, which this whole steps from now on."""
        first, *others = (part._streams for part in self.parts)
        first.join(others, self)

    @property
    def _streams(self):
        return self.parts[0]._streams

    @property
    def position(self):
        return self._streams.position

    def _restart(self):
        for part in self.parts:
            part._restart()

    def get_state(self, streams=None):
        """Return the state of streams: a dict from the number of each continual layer to its state.

        Args:
            streams: Integers `[M]`: which ones, in this order; None: all.

        Raises:
            ValueError: If a stream is not held, or is named twice.
        """
        with self._streams.turn():
            return {str(i): part.get_state(streams) for i, part in enumerate(self.parts)}

    def _states(self, state):
        parts = {str(i): part for i, part in enumerate(self.parts)}
        if not isinstance(state, dict) or set(state) != set(parts):
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {sorted(parts)}, but got {got}")
        return [pair for name, part in parts.items() for pair in part._states(state[name])]
