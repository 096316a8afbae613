"""Copies of a layer's kernels in its `weights_dtype`, which its fused step reads."""

from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope


class NarrowKernels:
    """Copies of dense layers' kernels in fewer bits.

    The variables are made once and only written to after that, because a traced function keeps the
    variables that it was traced with. They are neither among Keras' weights nor in checkpoints.
    """

    def __init__(self) -> None:
        # From the place of a dense layer in the list to its kernel's copy.
        self._variables: dict[int, tf.Variable] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "NarrowKernels":
        return NarrowKernels()  # The copy of the layer has kernels of its own.

    def of(
        self, dense_layers: tuple[keras.layers.Layer, ...], dtype: str, device: str
    ) -> list[tf.Variable]:
        """Return the copies of the kernels as they are now. The first call makes the variables.

        Args:
            dense_layers: The `Dense` and `EinsumDense` layers, the same ones in every call.
            dtype: The dtype of the copies.
            device: The device to make them on.
        """
        with tf.init_scope():
            for place, dense in enumerate(dense_layers):
                if place in self._variables:
                    self._convert(place, dense)
                    continue
                with tf.device(device):
                    kernel = tf.cast(dense._kernel.value, dtype)
                    self._variables[place] = tf.Variable(kernel, trainable=False)
                self._follow_files(place, dense)
        return list(self._variables.values())

    def convert(self, dense_layers: tuple[keras.layers.Layer, ...]) -> None:
        """Write the kernels as they are now to the copies that were made."""
        with tf.init_scope():
            for place, dense in enumerate(dense_layers):
                if place in self._variables:
                    self._convert(place, dense)

    def _convert(self, place: int, dense: keras.layers.Layer) -> None:
        # The kernel of a quantized layer is of integers. A stateless scope's weights must not stay.
        if dense.quantization_mode is None and not in_stateless_scope():
            copy = self._variables[place]
            copy.assign(tf.cast(dense._kernel.value, copy.dtype))

    def _follow_files(self, place: int, dense: keras.layers.Layer) -> None:
        # Keras loads a file layer by layer, inner layers after outer ones, and calls nothing at the
        # end. So wrap the method of the dense layer itself.
        load = dense.load_own_variables

        def load_own_variables(store: Any) -> None:
            load(store)
            with tf.init_scope():
                self._convert(place, dense)

        dense.load_own_variables = load_own_variables
