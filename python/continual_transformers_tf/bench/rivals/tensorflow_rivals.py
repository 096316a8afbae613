"""Our layer and its session, and what TensorFlow users do without them."""

import functools
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.bench.rivals import (
    Array,
    Contestant,
    Weights,
    past_of,
    rings_of,
    weights_of,
)
from continual_transformers_tf.bench.sizes import Size

Step = Callable[..., Any]


def _set_threads(threads: int) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _keras_weights(size: Size, weights: Weights) -> list[Array]:
    heads = (size.heads, size.head)
    shaped = [array for w, b in weights[:3] for array in (w.reshape(-1, *heads), b.reshape(heads))]
    return [*shaped, weights[3][0].reshape(*heads, -1), weights[3][1]]


def _layer(size: Size, weights: Weights) -> ct.CoSiMultiHeadAttention:
    layer = ct.CoSiMultiHeadAttention(size.seq_len, size.heads, size.head)
    layer.build((None, size.seq_len, size.features))
    layer.set_weights(_keras_weights(size, weights))
    keys, values = rings_of(size, weights)
    layer.set_state({
        "keys": keys.swapaxes(1, 2),
        "values": values.swapaxes(1, 2),
        "key_mask": np.ones((size.streams, size.seq_len), bool),
        "position": np.full(size.streams, size.seq_len, np.int64),
    })  # fmt: skip
    return layer


def _call_step(size: Size, weights: Weights, threads: int) -> Step:
    _set_threads(threads)
    return _layer(size, weights).call_step


def _graph(size: Size, weights: Weights, threads: int) -> Step:
    return tf.function(_call_step(size, weights, threads))


class _SessionSteps:
    """The steps of a session of a layer, on its own streams."""

    def __init__(self, layer: keras.layers.Layer, size: Size, **options: Any) -> None:
        self.session = ct.Session(layer, streams=size.streams, **options)
        self.streams = self.session.open(size.streams)

    def step(self, x: Array) -> Any:
        return self.session.step(x, streams=self.streams)


def _session(size: Size, weights: Weights, threads: int, dtype: str | None = None) -> Contestant:
    layer = _layer(size, weights)
    steps = _SessionSteps(layer, size, threads=threads, cache_dtype=dtype, weights_dtype=dtype)
    steps.session.set_state(layer.get_state(), steps.streams)
    return steps.step, np.ascontiguousarray


def retroactive_layer(size: Size) -> ct.CoReMultiHeadAttention:
    """Return the retroactive layer that is raced, with its weights."""
    layer = ct.CoReMultiHeadAttention(size.seq_len, size.heads, size.head)
    layer.build((None, size.seq_len, size.features))
    layer.set_weights(_keras_weights(size, weights_of(size)))
    return layer


def _retroactive_session(size: Size, weights: Weights, threads: int) -> Contestant:
    del weights  # `retroactive_layer` sets them.
    steps = _SessionSteps(retroactive_layer(size), size, threads=threads)
    for x in past_of(size):
        steps.step(x)
    return steps.step, np.ascontiguousarray


def _tensorflow_ring(size: Size, weights: Weights, threads: int) -> Step:
    os.environ["CONTINUAL_TRANSFORMERS_BACKEND"] = "tensorflow"
    return _graph(size, weights, threads)


def _recompute(
    size: Size, weights: Weights, threads: int, jit_compile: bool = False, rows: slice | int = -1
) -> Step:
    _set_threads(threads)
    layer = keras.layers.MultiHeadAttention(size.heads, size.head)
    layer.build((None, size.seq_len, size.features), (None, size.seq_len, size.features))
    layer.set_weights(_keras_weights(size, weights))
    window = tf.constant(past_of(size).swapaxes(0, 1))

    @tf.function(jit_compile=jit_compile)
    def attend(window: tf.Tensor, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        window = tf.concat([window[:, 1:], x[:, tf.newaxis]], 1)
        return layer(window, window)[:, rows], window

    def step(x: tf.Tensor) -> tf.Tensor:
        nonlocal window
        output, window = attend(window, x)
        return output

    return step


def _with_tensors(
    make: Callable[..., Step], **options: Any
) -> Callable[[Size, Weights, int], Contestant]:
    return lambda *size: (make(*size, **options), tf.constant)


RIVALS = {
    "session": _session,
    "session_bfloat16": functools.partial(_session, dtype="bfloat16"),
    "session_int8": functools.partial(_session, dtype="int8"),
    "layer": _with_tensors(_call_step),
    "layer_graph": _with_tensors(_graph),
    "tensorflow_ring": _with_tensors(_tensorflow_ring),
    "keras_recompute": _with_tensors(_recompute),
    "keras_xla": _with_tensors(_recompute, jit_compile=True),
    "retroactive_session": _retroactive_session,
    "retroactive_keras": _with_tensors(_recompute, rows=slice(None)),
}
