"""A step of `CoSiTransformerEncoder` as one op."""

import keras
import numpy as np

from continual_transformers_tf.layers.co_si_step import OneOpStep
from continual_transformers_tf.layers.inputs import check_features
from continual_transformers_tf.ops.co_si_step import ENCODER_STEP

# How the op calls Keras' activations; a block with another takes its steps by several ops.
ACTIVATIONS = {
    keras.activations.gelu: "gelu",
    keras.activations.relu: "relu",
    keras.activations.linear: "linear",
}


def epsilon_attributes(epsilon):
    """A float64 as two attributes, which are float32."""
    high = float(np.float32(epsilon))
    return {"epsilon": high, "epsilon_low": epsilon - high}


class OneOpEncoderStep(OneOpStep):
    """What the op needs of an encoder, gathered once.

    Args:
        layer: a built `CoSiTransformerEncoder`.
        fused: the module with the fused ops.
    """

    op = ENCODER_STEP
    encoder = True

    @staticmethod
    def dense_layers(layer):
        attention = OneOpStep.dense_layers(layer.attention)
        return (*attention, layer.feed_forward, layer.feed_forward_output)

    @staticmethod
    def takes(layer):
        return any(layer.feed_forward.activation is known for known in ACTIVATIONS)

    def fits(self):
        return super().fits() and self._layer_attributes() == self._gathered

    def _gather(self):
        self._gathered = self._layer_attributes()
        super()._gather()

    def _weights(self, kernels):
        layer, weights = self._layer, super()._weights(kernels)
        norms = (layer.attention_norm, layer.output_norm)
        before, after = ([norm.gamma.value, norm.beta.value] for norm in norms)
        return [*weights[:-4], *before, *weights[-4:], *after]

    def _layer_attributes(self):
        layer = self._layer
        return {
            "use_bias": layer.attention._use_bias,
            "norm_first": layer.norm_first,
            "activation": ACTIVATIONS.get(layer.feed_forward.activation),
            **epsilon_attributes(layer.attention_norm.epsilon),
        }

    def __call__(self, x, streams, update_state):
        """A step's outputs, or None while the window fills.

        Args:
            x: a tensor `(M, E)` of the compute dtype.
            streams, update_state: as `CoSiTransformerEncoder.call_step` has them.
        """
        check_features("x", x, self._attention._features[0])
        (result,) = self._call_op((x,), (), streams, update_state)
        return result
