"""The element-wise functions of a plan, in TensorFlow's ops."""

from collections.abc import Callable

import tensorflow as tf

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _negative(x: tf.Tensor) -> tf.Tensor:
    """Return -x. The converter does not recognise the GELU of a `tf.negative`."""
    return x * -1.0


def _gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    # The converter does not recognise two kinds of GELU of one tensor: they share half of x.
    return tf.reshape(tf.nn.gelu(tf.reshape(x, [-1]), approximate=True), x.shape)


def _log1p(x: tf.Tensor) -> tf.Tensor:
    """Return log(1 + x). LiteRT has no such op, and rounding 1 + x loses a small x's digits."""
    s = x / (2 + x)
    z = tf.square(s)
    small = 2 * s * (1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9)))))
    return tf.where(tf.abs(x) < 0.25, small, tf.math.log(1 + x))


def _softplus(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(x) + tf.math.log(1 + tf.exp(_negative(tf.abs(x))))


def _elu(x: tf.Tensor, alpha: float) -> tf.Tensor:
    if alpha == 1:
        return tf.nn.elu(x)
    return tf.where(x > 0, x, alpha * tf.nn.elu(x))


def _celu(x: tf.Tensor, alpha: float) -> tf.Tensor:
    return tf.where(x > 0, x, alpha * tf.nn.elu(x / alpha))


def _hard_sigmoid(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu6(x + 3) * (1 / 6)


def _prelu(x: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    return tf.where(x > 0, x, x * alpha)


def _relu(
    x: tf.Tensor,
    negative_slope: float = 0.0,
    max_value: float | None = None,
    threshold: float = 0.0,
) -> tf.Tensor:
    if threshold == 0:
        y = tf.nn.leaky_relu(x, negative_slope) if negative_slope else tf.nn.relu(x)
    else:
        below = negative_slope * (x - threshold) if negative_slope else tf.zeros_like(x)
        y = tf.where(x <= threshold, below, x)  # A NaN stays one.
    return y if max_value is None else tf.minimum(y, max_value)


def _soft_shrink(x: tf.Tensor, threshold: float) -> tf.Tensor:
    return tf.nn.relu(x - threshold) - tf.nn.relu(_negative(x) - threshold)


def _sparse_plus(x: tf.Tensor) -> tf.Tensor:
    inner = tf.square(x + 1) / 4
    return tf.where(x >= 1, x, tf.where(x <= -1, tf.zeros_like(x), inner))


ACTIVATIONS: dict[str, Callable[..., tf.Tensor]] = {
    "celu": _celu,
    "elu": _elu,
    "exponential": tf.exp,
    "gelu": tf.nn.gelu,
    "gelu_tanh": _gelu_tanh,
    "hard_shrink": lambda x, threshold: tf.where(tf.abs(x) <= threshold, tf.zeros_like(x), x),
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": lambda x: x * _hard_sigmoid(x),
    "hard_tanh": lambda x: tf.minimum(tf.maximum(x, -1), 1),
    "leaky_relu": lambda x, negative_slope: tf.nn.leaky_relu(x, negative_slope),
    "linear": lambda x: x,
    "log_sigmoid": lambda x: _negative(_softplus(_negative(x))),
    "mish": lambda x: x * tf.tanh(_softplus(x)),
    "prelu": _prelu,
    "relu": _relu,
    "relu6": tf.nn.relu6,
    "selu": lambda x: SELU_SCALE * _elu(x, SELU_ALPHA),
    "sigmoid": tf.sigmoid,
    "silu": lambda x: x * tf.sigmoid(x),
    "soft_shrink": _soft_shrink,
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + tf.abs(x)),
    "sparse_plus": _sparse_plus,
    "sparse_sigmoid": lambda x: tf.minimum(tf.maximum((x + 1) / 2, 0), 1),
    "squareplus": lambda x, b: (x + tf.sqrt(tf.square(x) + b)) / 2,
    "tanh": tf.tanh,
    "tanh_shrink": lambda x: x - tf.tanh(x),
    "threshold": lambda x, threshold, value: tf.where(
        x > threshold, x, tf.fill(x.shape, tf.constant(value, x.dtype))
    ),
    "absolute": tf.abs,
    "cos": tf.cos,
    "log": tf.math.log,
    "log1p": _log1p,
    "negative": _negative,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": tf.math.rsqrt,
    "sign": tf.sign,
    "sin": tf.sin,
    "sqrt": tf.sqrt,
    "square": tf.square,
}
