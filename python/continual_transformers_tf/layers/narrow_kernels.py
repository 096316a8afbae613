"""The copies of a layer's kernels in its `weights_dtype`, which a step that is one op reads."""

import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope


class NarrowKernels:
    """Copies of dense layers' kernels in fewer bits.

    The variables are made once and written to ever after, because a traced function keeps the
    variables that it was traced with. They are neither among Keras' weights nor in checkpoints.
    """

    def __init__(self):
        self._variables = {}  # Place of a dense layer -> its kernel's copy.

    def __deepcopy__(self, memo):
        return NarrowKernels()  # The copy of the layer has kernels of its own.

    def of(self, dense_layers, dtype, device):
        """Return the copies, made on this device at the first call, with the kernels of now.

        Args:
            dense_layers: The `Dense` and `EinsumDense` layers, at every call the same ones.
            dtype: Of the copies.
            device: Where they are made.
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

    def convert(self, dense_layers):
        """Write the kernels as they are now to the copies that were made."""
        with tf.init_scope():
            for place, dense in enumerate(dense_layers):
                if place in self._variables:
                    self._convert(place, dense)

    def _convert(self, place, dense):
        # A quantized layer has integers for a kernel. What a stateless scope gives is not to stay.
        if dense.quantization_mode is None and not in_stateless_scope():
            copy = self._variables[place]
            copy.assign(tf.cast(dense._kernel.value, copy.dtype))

    def _follow_files(self, place, dense):
        # Keras loads a file layer by layer, those within a layer after it, and says nothing at the
        # end. Wrap the method of the dense layer itself.
        load = dense.load_own_variables

        def load_own_variables(store):
            load(store)
            with tf.init_scope():
                self._convert(place, dense)

        dense.load_own_variables = load_own_variables
