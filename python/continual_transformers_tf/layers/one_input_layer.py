"""Continual layers with one input of rows: their calls."""

from typing import Any

import tensorflow as tf

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike, step_input, without_keras_mask


class OneInputLayer(ContinualLayer):
    """A `ContinualLayer` whose calls take one input `(..., E)` and `training`.

    A subclass defines `call_regular` and `_take_steps`.
    """

    def call(
        self,
        x: TensorLike,
        training: bool | None = None,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        return self._call_by_mode(x, training=training, streams=streams, update_state=update_state)

    def call_step(
        self,
        x: TensorLike,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        """Take one step of M streams.

        Args:
            x: `(M, E)`.
            training: Whether dropout acts.
            streams: Integers `[M]`, the stream that each row belongs to, in any order, each once.
                None: row i is stream i, and room is made for M streams.
            update_state: If False, nothing changes: the output is that of the next real call.

        Returns:
            `(M, E)`; of a `CoReTransformerEncoder` `(M, N, E)`, the outputs of the window's steps,
            oldest first, zeros for steps that were never taken. Or None while the receptive field
            fills (see `warm_up`).

        Raises:
            ValueError, tf.errors.InvalidArgumentError: If shapes, dtypes or streams do not fit. The
                streams then continue as if the call had not been made.
        """
        return self._take_steps("step", x, training, streams, update_state)

    def call_steps(
        self,
        x: TensorLike,
        training: bool | None = None,
        *,
        streams: TensorLike | None = None,
        update_state: bool = True,
    ) -> Any:
        """Take T steps of M streams, with the same outputs and state as T calls of `call_step`.

        Args:
            x: `(M, T, E)`, oldest step first.
            training, streams, update_state: As in `call_step`.

        Returns:
            `(M, T', E)`; of a `CoReTransformerEncoder` `(M, T', N, E)`. In eager mode with
            `warm_up="none"` these are the outputs of the T' newest steps, those with a full
            receptive field in the stream that has come furthest, or None if there are none.
            Otherwise T' = T.

        Raises:
            ValueError, tf.errors.InvalidArgumentError: As in `call_step`; also if T = 0.
        """
        return self._take_steps("steps", x, training, streams, update_state)

    def _take_steps(
        self,
        mode: str,
        x: TensorLike,
        training: bool | None,
        streams: TensorLike | None,
        update_state: bool,
    ) -> Any:
        """Take the steps of `call_step` ("step") or `call_steps` ("steps")."""
        raise NotImplementedError

    def _rows_input(self, x: Any, mode: str) -> tf.Tensor:
        """Return the only input of a layer `(..., E)` as a tensor, and build the layer.

        The tensor carries no mask of Keras: such a layer heeds masks in no mode.
        """
        if mode != "regular" or any(
            part.compute_dtype != self.compute_dtype for part in self._inner_layers
        ):
            self._check_policy()
        x = without_keras_mask(step_input("x", x, mode, self.compute_dtype))
        self._ensure_built(x)
        return x
