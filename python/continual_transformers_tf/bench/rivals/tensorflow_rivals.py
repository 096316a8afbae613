"""Our layer, and what TensorFlow users do without it."""

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.bench.rivals import Array, Contestant, Weights, past_of, rings_of
from continual_transformers_tf.bench.sizes import Size

Step = Callable[..., Any]


def _set_threads(threads: int) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _keras_weights(size: Size, weights: Weights) -> list[Array]:
    heads = (size.heads, size.head)
    shaped = [array for w, b in weights[:3] for array in (w.reshape(-1, *heads), b.reshape(heads))]
    return [*shaped, weights[3][0].reshape(*heads, -1), weights[3][1]]


def _layer(size: Size, weights: Weights, **options: Any) -> ct.CoSiMultiHeadAttention:
    layer = ct.CoSiMultiHeadAttention(size.seq_len, size.heads, size.head, **options)
    layer.build((None, size.seq_len, size.features))
    layer.set_weights(_keras_weights(size, weights))
    keys, values = rings_of(size, weights)
    dtype = layer._stream_state.dtype.as_numpy_dtype
    layer.set_state({
        "keys": keys.swapaxes(1, 2).astype(dtype),
        "values": values.swapaxes(1, 2).astype(dtype),
        "key_mask": np.ones((size.streams, size.seq_len), bool),
        "position": np.full(size.streams, size.seq_len, np.int64),
    })  # fmt: skip
    return layer


def _ours(size: Size, weights: Weights, threads: int, **options: Any) -> Step:
    _set_threads(threads)
    return _layer(size, weights, **options).call_step


def _ours_graph(size: Size, weights: Weights, threads: int) -> Step:
    return tf.function(_ours(size, weights, threads))


def _ours_apart(size: Size, weights: Weights, threads: int) -> Contestant:
    step = _ours(size, weights, threads)
    streams = [tf.constant([m]) for m in range(size.streams)]

    def apart(x: list[tf.Tensor]) -> list[tf.Tensor]:
        return [step(x[m], streams=streams[m]) for m in range(size.streams)]

    return apart, lambda x: [tf.constant(row[None]) for row in x]


def _tensorflow_ring(size: Size, weights: Weights, threads: int) -> Step:
    os.environ["CONTINUAL_TRANSFORMERS_BACKEND"] = "tensorflow"
    return _ours_graph(size, weights, threads)


def _recompute(size: Size, weights: Weights, threads: int, jit_compile: bool = False) -> Step:
    _set_threads(threads)
    layer = keras.layers.MultiHeadAttention(size.heads, size.head)
    layer.build((None, size.seq_len, size.features), (None, size.seq_len, size.features))
    layer.set_weights(_keras_weights(size, weights))
    window = tf.constant(past_of(size).swapaxes(0, 1))

    @tf.function(jit_compile=jit_compile)
    def attend(window: tf.Tensor, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        window = tf.concat([window[:, 1:], x[:, tf.newaxis]], 1)
        return layer(window, window)[:, -1], window

    def step(x: tf.Tensor) -> tf.Tensor:
        nonlocal window
        output, window = attend(window, x)
        return output

    return step


def _with_tensors(
    make: Callable[..., Step | Contestant], **options: Any
) -> Callable[[Size, Weights, int], Contestant]:
    def made(size: Size, weights: Weights, threads: int) -> Contestant:
        step = make(size, weights, threads, **options)
        return step if isinstance(step, tuple) else (step, tf.constant)

    return made


RIVALS = {
    "ours": _with_tensors(_ours),
    "ours_bfloat16": _with_tensors(_ours, weights_dtype="bfloat16", cache_dtype="bfloat16"),
    "ours_graph": _with_tensors(_ours_graph),
    "ours_apart": _with_tensors(_ours_apart),
    "tensorflow_ring": _with_tensors(_tensorflow_ring),
    "keras_recompute": _with_tensors(_recompute),
    "keras_xla": _with_tensors(_recompute, jit_compile=True),
}
