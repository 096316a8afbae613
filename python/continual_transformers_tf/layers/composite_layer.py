"""Wholes that are made of continual layers."""

import numpy as np

from continual_transformers_tf.layers.continual_layer import ContinualLayer


class CompositeLayer(ContinualLayer):
    """A `ContinualLayer` whose streams' state is that of its parts, which all take the same steps.

    The whole gives `parts`: the list of the continual layers in it that take steps.
    """

    @property
    def parts(self):
        raise NotImplementedError

    @property
    def position(self):
        return self.parts[0].position

    def ensure_streams(self, streams):
        """Makes room for streams 0, ..., streams - 1. Those that are held keep their state."""
        for layer in self.parts:
            layer.ensure_streams(streams)

    def clean_state(self, streams=None):
        """Forgets what streams have seen: they begin again.

        Args:
            streams: integers `[M]`, which ones; None: all.

        Raises:
            ValueError: if a stream is not held, or is named twice.
        """
        for layer in self.parts:
            layer.clean_state(streams)

    def get_state(self, streams=None):
        """The state of streams: a dict from the number of each continual layer to its state.

        Args:
            streams: integers `[M]`, which ones, in this order; None: all.

        Raises:
            ValueError: if a stream is not held, or is named twice.
        """
        return {str(i): layer.get_state(streams) for i, layer in enumerate(self.parts)}

    def set_state(self, state, streams=None):
        """Puts back what `get_state` gave, here or in another whole of the same layers.

        Args:
            state: what `get_state` gave, of M streams.
            streams: integers `[M]`, which streams take it; None: streams 0, ..., M - 1, for which
                there is made room, and others that are held begin again.

        Raises:
            ValueError: if the state does not fit; the streams then stay as they were.
        """
        layers = {str(i): layer for i, layer in enumerate(self.parts)}
        if not isinstance(state, dict) or set(state) != set(layers):
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"Expected a state with {sorted(layers)}, but got {got}")
        taken = [x["position"] for x in state.values() if isinstance(x, dict) and "position" in x]
        if not all(np.array_equal(x, taken[0]) for x in taken):
            raise ValueError(
                "Expected a state in which all layers have taken the same steps, but got positions "
                f"{[np.asarray(x).tolist() for x in taken]}"
            )
        before = self.get_state(streams)
        try:
            for name, layer in layers.items():
                layer.set_state(state[name], streams)
        except Exception:
            for name, layer in layers.items():
                layer.set_state(before[name], streams)
            raise
