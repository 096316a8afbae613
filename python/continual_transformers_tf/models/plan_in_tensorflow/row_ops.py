"""The ops of a plan that need nothing but their inputs."""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from continual_transformers_tf.models.plan_in_tensorflow.activations import ACTIVATIONS, log1p
from continual_transformers_tf.models.plan_in_tensorflow.op_table import Array, Node, Step, op


@op("dense")
def _dense(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    y = tf.matmul(_as_rows(x), tf.constant(node.weights["kernel"]))
    if "bias" in node.weights:
        y += node.weights["bias"]
    return tf.reshape(y, [1, *node.shape])


@op("matmul")
def _matmul(node: Node, step: Step, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.matmul(x[0], y[0])[tf.newaxis]


@op("depthwise")
def _depthwise(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    kernel = node.weights["kernel"]
    (taps, made), channels, outputs = kernel.shape, x.shape[-1], node.shape[0]
    first = np.arange(outputs)[:, np.newaxis] * node.attributes["stride"]
    rows = (first + np.arange(taps) * node.attributes["dilation"]).reshape(-1)
    x = x[0]
    if rows.tolist() != list(range(x.shape[0])):
        x = tf.gather(x, tf.constant(rows, tf.int32))
    frames = tf.reshape(x, [outputs, taps, channels, 1])
    weighted = frames * kernel.reshape(taps, channels, -1)
    y = tf.reduce_sum(tf.reshape(weighted, [outputs, taps, made]), 1)
    if "bias" in node.weights:
        y += node.weights["bias"]
    return y[tf.newaxis]


def _as_rows(x: tf.Tensor) -> tf.Tensor:
    """Return x `[1, ..., C]` as `[R, C]`. LiteRT's ops take few axes."""
    return tf.reshape(x, [-1, x.shape[-1]])


@op("activation", functions=ACTIVATIONS)
def _activation(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    numbers = {key: x for key, x in node.attributes.items() if key != "function"}
    return ACTIVATIONS[str(node.function)](x, *node.weights.values(), **numbers)


def _sparsemax(x: tf.Tensor) -> tf.Tensor:
    n = x.shape[-1]
    ordered = tf.math.top_k(x, n).values
    sums = tf.cumsum(ordered, axis=-1)
    ranks = np.arange(1, n + 1, dtype=np.float32)
    support = 1 + ranks * ordered > sums
    count = tf.reduce_sum(tf.cast(support, x.dtype), -1, keepdims=True)
    total = tf.reduce_sum(tf.where(support, sums, tf.zeros_like(sums)), -1, keepdims=True)
    return tf.maximum(x - (total - 1) / count, 0)


SOFTMAX = {"softmax": tf.nn.softmax, "log_softmax": tf.nn.log_softmax, "sparsemax": _sparsemax}


@op("softmax", functions=SOFTMAX)
def _softmax(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    function = SOFTMAX[str(node.function)]
    y = _around(x, node.attributes["axis"] + 1)
    if len(y.shape) == 3:
        y = tf.transpose(function(tf.transpose(y, [0, 2, 1])), [0, 2, 1])
    else:
        y = function(y)
    return tf.reshape(y, x.shape)


def _around(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Return x as `[A, n, B]`, n being this axis, or as `[A, n]` if nothing comes after it."""
    shape = list(x.shape)
    before, n, after = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    return tf.reshape(x, [before, n] if after == 1 else [before, n, after])


def _comparison(compare: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    return lambda x, y: tf.cast(compare(x, y), x.dtype)


def _fmod(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    # LiteRT's remainder has the sign of the divisor.
    rest = tf.math.floormod(tf.abs(x), tf.abs(y))
    return tf.where(x < 0, rest * -1.0, rest)


def _hypot(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Return the root of x^2 + y^2, without squares that overflow."""
    x, y = tf.abs(x), tf.abs(y)
    most, least = tf.maximum(x, y), tf.minimum(x, y)
    ratio = tf.where(tf.equal(most, least), tf.ones_like(x), least / most)
    return most * tf.sqrt(1 + tf.square(ratio))


def _logaddexp(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    smaller = log1p(tf.exp(tf.abs(x - y) * -1.0))
    # The difference of two equal infinities is a NaN.
    return tf.where(tf.equal(x, y), x + math.log(2), tf.maximum(x, y) + smaller)


BINARY = {
    "add": tf.add, "subtract": tf.subtract, "multiply": tf.multiply, "divide": tf.divide,
    "maximum": tf.maximum, "minimum": tf.minimum, "power": tf.pow,
    "arctan2": tf.atan2, "fmod": _fmod, "hypot": _hypot, "logaddexp": _logaddexp,
    "mod": tf.math.floormod, "equal": _comparison(tf.equal),
    "not_equal": _comparison(tf.not_equal), "greater": _comparison(tf.greater),
    "greater_equal": _comparison(tf.greater_equal),
}  # fmt: skip


@op("binary", functions=BINARY)
def _binary(node: Node, step: Step, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return BINARY[str(node.function)](x, y)


@op("where")
def _where(node: Node, step: Step, condition: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    flat = (tf.reshape(part, [-1]) for part in (condition, x, y))
    return tf.reshape(tf.where(*flat), [1, *node.shape])


@op("constant")
def _constant(node: Node, step: Step) -> tf.Tensor:
    value = node.weights["value"]
    value = value != 0 if node.dtype == "bool" else value.astype(node.dtype)
    return tf.constant(value[np.newaxis])


@op("affine")
def _affine(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    return _scaled(x, node.weights["scale"], node.weights["offset"])


def _scaled(x: tf.Tensor, scale: Array | None, offset: Array | None) -> tf.Tensor:
    """Return x `[1, ..., C]` times a scale plus an offset, each `[C]`, or None for nothing."""
    y = _as_rows(x)
    if scale is not None and (scale != 1).any():
        y *= scale
    if offset is not None and (offset != 0).any():
        y += offset
    return tf.reshape(y, x.shape)


@op("batch_norm")
def _batch_norm(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    weights = node.weights
    deviation = np.sqrt(weights["variance"].astype(np.float64) + node.attributes["epsilon"])
    scale = (weights.get("gamma", 1) / deviation).astype(np.float32)
    return _scaled(_scaled(x, None, -weights["mean"]), scale, weights.get("beta"))


@op("norm", functions={"layer": 0, "rms": 0, "unit": 0})
def _norm(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    epsilon, y = node.attributes["epsilon"], _as_rows(x)
    if node.function == "layer":
        y -= tf.reduce_mean(y, -1, keepdims=True)
    squares = tf.square(y)
    if node.function == "unit":
        y *= tf.math.rsqrt(tf.maximum(tf.reduce_sum(squares, -1, keepdims=True), epsilon))
    else:
        y *= tf.math.rsqrt(tf.reduce_mean(squares, -1, keepdims=True) + epsilon)
    return tf.reshape(_scaled(y, node.weights.get("gamma"), node.weights.get("beta")), x.shape)


@op("concat")
def _concat(node: Node, step: Step, *xs: tf.Tensor) -> tf.Tensor:
    axis = node.attributes["axis"] + 1
    return tf.reshape(tf.concat([_around(x, axis) for x in xs], 1), [1, *node.shape])


@op("strided")
def _strided(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    offset, size = node.attributes["offset"], math.prod(x.shape)
    flat = tf.reshape(x, [-1])
    # Axes of one element do not matter.
    axes = [(n, s) for n, s in zip(node.shape, node.attributes["strides"], strict=True) if n > 1]
    by_stride = sorted(range(len(axes)), key=lambda i: -axes[i][1])
    run, outer = _contiguous(axes)
    if not outer:
        y = tf.slice(flat, [offset], [run])
    elif offset == 0 and _contiguous([axes[i] for i in by_stride]) == (size, []):
        y = tf.reshape(flat, [axes[i][0] for i in by_stride])
        y = tf.transpose(y, np.argsort(by_stride))
    else:
        if any(n % run for n in (offset, size, *(s for _, s in outer))):
            run, outer = 1, axes
        picked = np.full([1] * len(outer), offset // run)
        for i, (n, s) in enumerate(outer):
            picked = picked + (np.arange(n) * s // run).reshape([-1] + [1] * (len(outer) - 1 - i))
        rows = tf.reshape(flat, [-1, run] if run > 1 else [-1])
        y = tf.gather(rows, tf.constant(picked.reshape(-1), tf.int32))
    return tf.reshape(y, [1, *node.shape])


def _contiguous(axes: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
    """Return (how many elements of the last axes lie side by side, the axes before those).

    Args:
        axes: (size, stride) of each.
    """
    run = 1
    for place in range(len(axes), 0, -1):
        n, stride = axes[place - 1]
        if stride != run:
            return run, axes[:place]
        run *= n
    return run, []


@op("reshape")
def _reshape(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    return tf.reshape(x, [1, *node.shape])


def _first_largest(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Return the index of the first largest element as a number. NaN counts as the largest."""
    is_nan = tf.not_equal(x, x)
    numbers = tf.where(is_nan, tf.fill(x.shape, tf.constant(-np.inf, x.dtype)), x)
    is_largest = tf.equal(numbers, tf.reduce_max(numbers, axis, keepdims=True))
    found = tf.where(tf.reduce_any(is_nan, axis, keepdims=True), is_nan, is_largest)
    n = x.shape[axis]
    index = np.arange(n, dtype=np.float32).reshape(
        [n if i == axis else 1 for i in range(len(x.shape))]
    )
    return tf.reduce_min(tf.where(found, tf.constant(index), tf.constant(float(n))), axis)


REDUCE = {
    "sum": tf.reduce_sum, "mean": tf.reduce_mean, "max": tf.reduce_max, "min": tf.reduce_min,
    "product": tf.reduce_prod, "argmax": _first_largest,
    "argmin": lambda x, axis: _first_largest(x * -1.0, axis),
}  # fmt: skip


@op("reduce", functions=REDUCE)
def _reduce(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    y = REDUCE[str(node.function)](_around(x, node.attributes["axis"] + 1), 1)
    return tf.reshape(y, [1, *node.shape])


def _cumulative_product(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Return the products of all elements up to each, of x `[A, n]` or `[A, n, B]`."""
    n, distance = x.shape[axis], 1
    while distance < n:
        ones = tf.ones_like(x[:, :distance])
        x *= tf.concat([ones, x[:, : n - distance]], axis)
        distance *= 2
    return x


CUMULATIVE = {"sum": tf.cumsum, "product": _cumulative_product}


@op("cumulative", functions=CUMULATIVE)
def _cumulative(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    y = CUMULATIVE[str(node.function)](_around(x, node.attributes["axis"] + 1), 1)
    return tf.reshape(y, x.shape)


@op("sort", functions={"values": 0, "indices": 0})
def _sort(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    y = _around(x, node.attributes["axis"] + 1)
    is_last = len(y.shape) == 2
    if not is_last:
        y = tf.transpose(y, [0, 2, 1])
    turned, n = y.shape, y.shape[-1]
    y = tf.reshape(y, [-1, n])
    # The largest first; equal elements keep their order. A NaN cannot be compared, so it becomes
    # infinity, and infinity the largest number.
    keys = tf.where(tf.not_equal(y, y), tf.constant(np.inf, y.dtype), tf.minimum(y, y.dtype.max))
    keys = keys if node.attributes["descending"] else keys * -1.0
    order = tf.math.top_k(keys, n).indices
    if node.function == "indices":
        y = tf.cast(order, y.dtype)
    else:
        starts = tf.constant(np.arange(y.shape[0], dtype=np.int32)[:, np.newaxis] * n)
        y = tf.gather(tf.reshape(y, [-1]), tf.reshape(order + starts, [-1]))
    y = tf.reshape(y, turned)
    return tf.reshape(y if is_last else tf.transpose(y, [0, 2, 1]), x.shape)


@op("rotary")
def _rotary(node: Node, step: Step, x: tf.Tensor, angles: tf.Tensor) -> tf.Tensor:
    y, pairs = _as_rows(x), angles.shape[-1]
    cos, sin = angles[..., 0, :], angles[..., 1, :]  # [1, pairs], or [1, rows, pairs].
    if len(angles.shape) == 4:  # Each row of the step has angles of its own, for all its heads.
        heads = y.shape[0] // cos.shape[1]
        cos, sin = (tf.repeat(a[0], heads, axis=0) for a in (cos, sin))
    if node.attributes["interleaved"]:
        both = tf.reshape(y[:, : 2 * pairs], [-1, pairs, 2])
        a, b = both[..., 0], both[..., 1]
    else:
        a, b = y[:, :pairs], y[:, pairs : 2 * pairs]
    turned = [a * cos - b * sin, b * cos + a * sin]
    if node.attributes["interleaved"]:
        turned = [tf.reshape(tf.stack(turned, -1), [-1, 2 * pairs])]
    return tf.reshape(tf.concat([*turned, y[:, 2 * pairs :]], -1), x.shape)


@op("cast")
def _cast(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    return tf.not_equal(x, 0) if node.dtype == "bool" else tf.cast(x, node.dtype)


@op("embedding")
def _embedding(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    return tf.gather(tf.constant(node.weights["table"]), x)


@op("not_equal")
def _not_equal(node: Node, step: Step, x: tf.Tensor) -> tf.Tensor:
    x = tf.cast(x, tf.int32) if x.dtype == tf.bool else x
    different = tf.not_equal(x, np.asarray(node.attributes["value"], x.dtype.as_numpy_dtype))
    reduce = tf.reduce_any if node.attributes["any"] else tf.reduce_all
    return tf.reshape(reduce(tf.reshape(different, [-1])), [1, 1])


@op("masked")
def _masked(node: Node, step: Step, x: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    return where(mask, x)


@op("mask_and")
def _mask_and(node: Node, step: Step, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.logical_and(x, y)


def where(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Return x `[1, N, ...]` with zeros in the rows where a mask is false.

    A product would keep a NaN.

    Args:
        mask: A bool tensor with one element for all of x, or one for each of the N rows.
        x: A tensor.
    """
    rows = math.prod(mask.shape)
    flat = tf.reshape(x, [rows, -1])
    return tf.reshape(tf.where(tf.reshape(mask, [rows, 1]), flat, tf.zeros_like(flat)), x.shape)
