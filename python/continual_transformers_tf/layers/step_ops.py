"""What Keras layers compute, by plain ops with the layers' weights, for a step.

A call of the Keras layer would cost a step more than its attention does: eagerly, on the machine
where an attention op takes 22 microseconds, a `Dense` takes 380, a `LayerNormalization` 760.
"""

import functools
import math

import keras
import tensorflow as tf


def project(x, layer, dtype, training=None, axes=1):
    """What a `Dense` or `EinsumDense` layer computes: the last `axes` axes of x by its kernel.

    With one axis that is x [M, T, E] by a kernel [E, H, D]; with two, x [M, T, H, Dv] by a kernel
    [H, Dv, ...]. The layer itself is called where only it knows what to do: where it is quantized,
    and where its activity is regularized in training.
    """
    if layer.quantization_mode is not None or (training and layer.activity_regularizer):
        return _called(layer, x)
    y = _product(x, layer, dtype, axes)
    activation = layer.activation
    return y if activation is keras.activations.linear else _PLAIN.get(activation, activation)(y)


def _called(layer, x):
    """Call a Keras layer; leading axes that it was not built for are merged, and split again."""
    rank = getattr(layer.input_spec, "ndim", None) or x.shape.rank
    merged = x.shape.rank - rank + 1  # How many axes become the first.
    if merged == 1:
        return layer(x)
    lead = tf.shape(x)[:merged]
    y = layer(tf.reshape(x, tf.concat([[-1], tf.shape(x)[merged:]], 0)))
    y = tf.reshape(y, tf.concat([lead, tf.shape(y)[1:]], 0))
    return y


def _gelu(x):
    # Keras rounds the root of 2 to float32: in float64 it is off by 5e-9.
    return 0.5 * x * tf.math.erfc(x * -math.sqrt(0.5))


# Keras' own take several ops, or leave their argument on the result for a loss to find.
_PLAIN = {
    keras.activations.sigmoid: tf.sigmoid,
    keras.activations.relu: tf.nn.relu,
    keras.activations.gelu: _gelu,
}


def cast(x, dtype):
    """x itself where it is of the dtype, which tf.cast takes three times as long to see."""
    return x if x.dtype == dtype else tf.cast(x, dtype)


def _product(x, layer, dtype, axes):
    kernel = _value(layer.kernel, dtype)
    contracted, features = kernel.shape[:axes], kernel.shape[axes:]
    size = math.prod(contracted)
    lead = [tf.shape(x)[i] if n is None else n for i, n in enumerate(x.shape[:-axes])]
    y = tf.matmul(_reshape(x, -1, size), _reshape(kernel, size, math.prod(features)))
    y = _reshape(y, *lead, *features)
    return y if layer.bias is None else y + _value(layer.bias, dtype)


def layer_norm(x, layer, dtype):
    """What a `LayerNormalization` layer over the last axis computes of x [..., E]."""
    centred = x - tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
    normal = centred * tf.math.rsqrt(variance + layer.epsilon)
    return normal * _value(layer.gamma, dtype) + _value(layer.beta, dtype)


def _value(variable, dtype):
    # A kernel with a low-rank addition (LoRA) is a tensor already; and in a call of a layer with
    # mixed precision, so is what Keras gives for a variable.
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return tf.cast(value.value() if isinstance(value, tf.Variable) else value, dtype)


def _reshape(x, *sizes):
    if x.shape.rank == len(sizes) == 2:  # A matrix already: the callers differ in rank only.
        return x
    return tf.reshape(x, _constant_shape(sizes) if tf.executing_eagerly() else sizes)


# Sizes handed to an eager reshape become a tensor at every call, which takes as long as four ops.
@functools.lru_cache(maxsize=1024)
def _constant_shape(sizes):
    return tf.constant(sizes, tf.int32)
