"""The element-wise functions of a plan, in TensorFlow's ops."""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _negative(x: tf.Tensor) -> tf.Tensor:
    """Return -x. The converter does not recognise the GELU of a `tf.negative`."""
    return x * -1.0


def _gelu_tanh(x: tf.Tensor) -> tf.Tensor:
    # The converter does not recognise two kinds of GELU of one tensor: they share half of x.
    return tf.reshape(tf.nn.gelu(tf.reshape(x, [-1]), approximate=True), x.shape)


def log1p(x: tf.Tensor) -> tf.Tensor:
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


# LiteRT has no such functions. Sums of logarithms and exponentials lose the digits of small
# numbers, for which there are series. None may divide x itself by 2: see `_gelu_tanh`.


def _with_sign(of: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.where(of < 0, _negative(y), y)


def _arccos(x: tf.Tensor) -> tf.Tensor:
    return tf.atan2(tf.sqrt((1 - x) * (1 + x)), x)


def _arcsin(x: tf.Tensor) -> tf.Tensor:
    return tf.atan2(x, tf.sqrt((1 - x) * (1 + x)))


def _arccosh(x: tf.Tensor) -> tf.Tensor:
    above = x - 1
    root = tf.sqrt(above) * tf.sqrt(above + 2)  # NaN below 1.
    return tf.where(x > 1e9, tf.math.log(x) + math.log(2), log1p(above + root))


def _arcsinh(x: tf.Tensor) -> tf.Tensor:
    a = tf.abs(x)
    y = log1p(a + tf.square(a) / (1 + tf.sqrt(1 + tf.square(a))))
    return _with_sign(x, tf.where(a > 1e9, tf.math.log(a) + math.log(2), y))


def _arctanh(x: tf.Tensor) -> tf.Tensor:
    a = tf.abs(x)
    return _with_sign(x, log1p(2 * a / (1 - a)) / 2)


def _cbrt(x: tf.Tensor) -> tf.Tensor:
    a = tf.abs(x)
    y = tf.pow(a, 1 / 3)
    nearer = y - (y - a / tf.square(y)) / 3  # A step of Newton's.
    return _with_sign(x, tf.where((a > 0) & (a < np.inf), nearer, y))


def _cosh(x: tf.Tensor) -> tf.Tensor:
    half = tf.exp(tf.abs(x) / 2)  # Its square may overflow, but not half of it.
    return half / 2 * half + 1 / half / 2 / half


def _sinh(x: tf.Tensor) -> tf.Tensor:
    z = tf.square(x)
    small = x * (1 + z / 6 * (1 + z / 20 * (1 + z / 42 * (1 + z / 72))))
    half = tf.exp(tf.abs(x) / 2)
    return tf.where(tf.abs(x) < 1, small, _with_sign(x, half / 2 * half - 1 / half / 2 / half))


def _erf(x: tf.Tensor) -> tf.Tensor:
    z = tf.square(x)
    series = 1 / 10 - z * (1 / 42 - z * (1 / 216 - z * (1 / 1320 - z / 9360)))
    small = 2 / math.sqrt(math.pi) * x * (1 - z * (1 / 3 - z * series))
    return tf.where(tf.abs(x) < 0.5, small, _with_sign(x, 1 - _erfc_of_positive(tf.abs(x))))


def _erfc(x: tf.Tensor) -> tf.Tensor:
    y = _erfc_of_positive(tf.abs(x))
    return tf.where(x < 0, 2 - y, y)


def _erfc_of_positive(x: tf.Tensor) -> tf.Tensor:
    """Return erfc(x), within a factor of 1.2e-7: Press et al., Numerical Recipes, 6.2."""
    t = 1 / (1 + x / 2)
    sum_ = tf.fill(x.shape, tf.constant(0.17087277, x.dtype))
    for factor in (
        -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
        1.00002368,
    ):  # fmt: skip
        sum_ = factor + t * sum_
    return t * tf.exp(t * sum_ - 1.26551223 - tf.square(x))


def _expm1(x: tf.Tensor) -> tf.Tensor:
    small = tf.ones_like(x)
    for n in range(8, 1, -1):
        small = 1 + small * x / n
    return tf.where(tf.abs(x) < 0.5, x * small, tf.exp(x) - 1)


def _sinc(x: tf.Tensor) -> tf.Tensor:
    a = tf.abs(x)
    of_a_turn = a - 2 * tf.round(a / 2)  # The sine of a large angle would not be exact.
    y = tf.sin(math.pi * of_a_turn) / (math.pi * a)
    return tf.where(tf.equal(x, 0), tf.ones_like(x), y)


def _tan(x: tf.Tensor) -> tf.Tensor:
    # The cosine near a pole would have few digits. So the nearest quarter of a turn, in three parts
    # whose products are exact, is taken away first.
    quarters = tf.round(x * (2 / math.pi))
    rest = x
    for part in (1.5703125, 4.837512969970703e-4, 7.549789948768648e-8):
        rest -= quarters * part
    sin, cos = tf.sin(rest), tf.cos(rest)
    is_odd = tf.not_equal(quarters, 2 * tf.floor(quarters / 2))
    return tf.where(is_odd, _negative(cos) / sin, sin / cos)


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
    "arccos": _arccos,
    "arccosh": _arccosh,
    "arcsin": _arcsin,
    "arcsinh": _arcsinh,
    "arctan": lambda x: tf.atan2(x, tf.ones_like(x)),
    "arctanh": _arctanh,
    "cbrt": _cbrt,
    "ceil": tf.math.ceil,
    "cos": tf.cos,
    "cosh": _cosh,
    "erf": _erf,
    "erfc": _erfc,
    "expm1": _expm1,
    "floor": tf.floor,
    "log": tf.math.log,
    "log1p": log1p,
    "negative": _negative,
    "reciprocal": lambda x: 1 / x,
    "round": tf.round,
    "rsqrt": tf.math.rsqrt,
    "sign": tf.sign,
    "sin": tf.sin,
    "sinc": _sinc,
    "sinh": _sinh,
    "sqrt": tf.sqrt,
    "square": tf.square,
    "tan": _tan,
    "trunc": lambda x: tf.where(x < 0, tf.math.ceil(x), tf.floor(x)),
}
