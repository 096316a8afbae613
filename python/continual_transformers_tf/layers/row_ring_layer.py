"""Continual layers that keep their newest input rows in a ring."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike, expect_given, without_keras_mask
from continual_transformers_tf.ops.stream_state import StreamState


class RowRingLayer(ContinualLayer):
    """A `ContinualLayer` whose streams keep the newest rows of its input in a ring, "steps".

    A subclass's constructor sets `_ring_rows`, how many rows the ring has, and makes
    `_stream_state`. `build` calls `_keep` with the shape of a row.
    """

    _ring_rows: int  # 0: there is no ring.
    _features: tuple[int, ...] | None = None  # The shape of a row, once it is known.

    @property
    def input_features(self) -> dict[str, Any]:
        return {"x": self._features}

    def get_build_config(self) -> dict[str, Any]:
        return {"features": self._features}

    def build_from_config(self, config: dict[str, Any]) -> None:
        if config["features"] is not None:
            self._keep(config["features"])
        self.built = True

    def _keep(self, features: Sequence[Any]) -> None:
        """Make the ring for rows of this shape."""
        if self._features == tuple(features):
            return
        self._features = tuple(features)
        if self._ring_rows > 0:
            shape = [self._ring_rows, *self._features]
            self._stream_state.add_row("steps", shape, self.compute_dtype)

    def _as_own_dtype(self, x: TensorLike) -> tf.Tensor:
        """Return an input as a tensor of the layer's dtype."""
        expect_given("x", x)
        x = tf.convert_to_tensor(x)
        own = tf.as_dtype(self.compute_dtype)
        if x.dtype != own and not (x.dtype.is_floating and own.is_floating):
            raise ValueError(f"Expected x of dtype {own.name}, but got {x.dtype.name}")
        # A mask of Keras is not kept for later, so none is returned at once either.
        return without_keras_mask(x if x.dtype == own else tf.cast(x, own))

    def _states(self, state: dict[str, Any]) -> list[tuple[StreamState, dict[str, Any]]]:
        # A layer that was never called learns the shape of a row from the state.
        if self._features is None and isinstance(state, dict) and "steps" in state:
            ring = np.asarray(state["steps"])
            if ring.ndim >= 2 and ring.shape[1] == self._ring_rows:
                self.build_from_config({"features": ring.shape[2:]})
        return super()._states(state)
