"""Keras' `Dense`, `EinsumDense` and normalizations in plain TensorFlow ops, for steps.

Calling the Keras layer would cost a step more than its attention does. In eager mode, on a machine
where the attention op takes 22 us, a `Dense` takes 380 us and a `LayerNormalization` 760 us.
"""

import functools
import math

import keras
import tensorflow as tf


def project(
    x: tf.Tensor,
    layer: keras.layers.Layer,
    dtype: str,
    training: bool | None = None,
    axes: int = 1,
) -> tf.Tensor:
    """Return what a `Dense` or `EinsumDense` layer computes.

    The layer itself is called if it is quantized, or if it regularizes its activity in training.

    Args:
        x: `(..., *contracted)`, for example `(M, T, E)` or, with two axes, `(M, T, H, Dv)`.
        layer: The built Keras layer. Its kernel is `(*contracted, *features)`, for example
            `(E, H, D)` or `(H, Dv, E)`.
        dtype: The dtype to compute in.
        training: Whether this is training.
        axes: How many of the last axes of x are contracted.

    Returns:
        `(..., *features)`.
    """
    if layer.quantization_mode is not None or (training and layer.activity_regularizer):
        return _called(layer, x)
    y = _product(x, layer, dtype, axes)
    activation = layer.activation
    return y if activation is keras.activations.linear else _PLAIN.get(activation, activation)(y)


def _called(layer: keras.layers.Layer, x: tf.Tensor) -> tf.Tensor:
    """Call a Keras layer. Leading axes that it was not built for are merged, and split again."""
    rank = getattr(layer.input_spec, "ndim", None) or x.shape.rank
    merged = x.shape.rank - rank + 1  # How many axes become the first.
    if merged == 1:
        return layer(x)
    lead = tf.shape(x)[:merged]
    y = layer(tf.reshape(x, tf.concat([[-1], tf.shape(x)[merged:]], 0)))
    y = tf.reshape(y, tf.concat([lead, tf.shape(y)[1:]], 0))
    return y


def _gelu(x: tf.Tensor) -> tf.Tensor:
    # Keras rounds the root of 2 to float32, so its float64 result is wrong by 5e-9.
    return 0.5 * x * tf.math.erfc(x * -math.sqrt(0.5))


# Keras' functions take several ops, or attach their argument to the result for a loss to find.
_PLAIN = {
    keras.activations.sigmoid: tf.sigmoid,
    keras.activations.relu: tf.nn.relu,
    keras.activations.gelu: _gelu,
}


def cast(x: tf.Tensor, dtype: str | tf.DType) -> tf.Tensor:
    """Return x in a dtype. `tf.cast` takes three times as long to see that it already is."""
    return x if x.dtype == dtype else tf.cast(x, dtype)


def _product(x: tf.Tensor, layer: keras.layers.Layer, dtype: str, axes: int) -> tf.Tensor:
    kernel = _value(layer.kernel, dtype)
    contracted, features = kernel.shape[:axes], kernel.shape[axes:]
    size = math.prod(contracted)
    lead = [tf.shape(x)[i] if n is None else n for i, n in enumerate(x.shape[:-axes])]
    y = tf.matmul(_reshape(x, -1, size), _reshape(kernel, size, math.prod(features)))
    y = _reshape(y, *lead, *features)
    return y if layer.bias is None else y + _value(layer.bias, dtype)


def layer_norm(x: tf.Tensor, layer: keras.layers.LayerNormalization, dtype: str) -> tf.Tensor:
    """Return what a `LayerNormalization` layer over the last axis computes from x `(..., E)`."""
    centred = x - tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
    normal = centred * tf.math.rsqrt(variance + layer.epsilon)
    return normal * _value(layer.gamma, dtype) + _value(layer.beta, dtype)


def precise(dtype: str) -> str:
    """Return the dtype of sums over values of a dtype: float64 for float64, otherwise float32."""
    return "float64" if dtype == "float64" else "float32"


def rms_norm(x: tf.Tensor, layer: keras.layers.RMSNormalization, dtype: str) -> tf.Tensor:
    """Return what an `RMSNormalization` layer over the last axis computes from x `(..., D)`."""
    wide = cast(x, precise(dtype))
    square = tf.reduce_mean(tf.square(wide), -1, keepdims=True)
    normal = wide * tf.math.rsqrt(square + layer.epsilon)
    return cast(normal * _value(layer.scale, normal.dtype), dtype)


def _value(variable: keras.Variable | tf.Tensor, dtype: str) -> tf.Tensor:
    # A kernel with a low-rank addition (LoRA) is a tensor already. So is the value of a variable in
    # a call of a layer with mixed precision.
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return tf.cast(value.value() if isinstance(value, tf.Variable) else value, dtype)


def _reshape(x: tf.Tensor, *sizes: int | tf.Tensor) -> tf.Tensor:
    if x.shape.rank == len(sizes) == 2:  # A matrix already.
        return x
    return tf.reshape(x, _constant_shape(sizes) if tf.executing_eagerly() else sizes)


# An eager reshape converts its sizes to a tensor at every call, which takes as long as four ops.
@functools.lru_cache(maxsize=1024)
def _constant_shape(sizes: tuple[int, ...]) -> tf.Tensor:
    return tf.constant(sizes, tf.int32)
