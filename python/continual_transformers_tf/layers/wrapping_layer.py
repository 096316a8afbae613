"""Continual layers that run a layer of Keras."""

from typing import Any, Self

import keras

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike
from continual_transformers_tf.layers.warm_up import check_warm_up
from continual_transformers_tf.ops.stream_state import StreamState, check_integer


class WrappingLayer(ContinualLayer):
    """A `ContinualLayer` that runs a layer of Keras, on windows or step by step.

    Its calls take one input and a mask.

    Args:
        layer: The layer. It is not copied.
        window: How many of the newest steps it reads; None: it has no window.
        warm_up, call_mode, **kwargs: As in the subclasses.

    Attributes:
        layer, window: As given.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        window: int | None,
        warm_up: str,
        call_mode: str,
        **kwargs: Any,
    ) -> None:
        if window is not None:
            check_integer("window", window, at_least=1)
            window = int(window)
        super().__init__(**{"dtype": layer.dtype_policy, **kwargs})
        self.layer = layer
        self.window = window
        self._warm_up = check_warm_up(warm_up)
        self.call_mode = call_mode
        self._made_for = self.compute_dtype
        self._stream_state = StreamState(0, name="state")

    def call(
        self,
        x: TensorLike,
        mask: TensorLike | None = None,
        training: bool | None = None,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        return self._call_by_mode(
            x, mask=mask, training=training, streams=streams, update_state=update_state
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
            "window": self.window,
            "warm_up": self._warm_up,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**{**config, "layer": keras.saving.deserialize_keras_object(config["layer"])})
