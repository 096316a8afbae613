"""The model in Keras: ours in a graph, and a regular model on windows."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.bench.model_rivals import (
    EPSILON,
    STEPS,
    Array,
    Block,
    Contestant,
    Pair,
    Weights,
    inputs_of,
    weights_of,
)
from continual_transformers_tf.bench.sizes import MODEL_OUTPUTS, ModelSize


def _set_threads(threads: int) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def streaming_model(size: ModelSize) -> ct.StreamingModel:
    """Return the `ct.StreamingModel` that is raced, with its weights."""
    inputs = keras.Input((None, size.features), name="x")
    x = keras.layers.Dense(size.embed_dim, name="embedding")(inputs)
    x = ct.CircularPositionalEncoding(size.position_rows, size.embed_dim, name="positions")(x)
    x = ct.TransformerEncoder(
        size.layers,
        size.seq_len,
        size.embed_dim,
        size.heads,
        size.embed_dim,
        dropout_rate=0,
        key_dim=size.head,
        epsilon=EPSILON,
        name="encoder",
    )(x)
    outputs = keras.layers.Dense(MODEL_OUTPUTS, name="classifier")(x)
    model = ct.StreamingModel(keras.Model(inputs, outputs, name="raced"), warm_up="partial")
    weights = weights_of(size)
    named = {layer.name: layer for layer in model.model.layers}
    named["embedding"].set_weights(weights.embedding)
    named["positions"].set_weights([weights.positions])
    named["classifier"].set_weights(weights.classifier)
    for layer, block in zip(named["encoder"].blocks, weights.blocks, strict=True):
        layer.attention.set_weights(_attention_weights(size, block))
        layer.attention_norm.set_weights(block.attention_norm)
        layer.feed_forward.set_weights(block.feed_forward)
        layer.feed_forward_output.set_weights(block.feed_forward_output)
        layer.output_norm.set_weights(block.output_norm)
    return model


def _attention_weights(size: ModelSize, block: Block) -> list[Array]:
    heads = (size.heads, size.head)
    inputs = [
        array
        for kernel, bias in block[:3]
        for array in (kernel.reshape(-1, *heads), bias.reshape(heads))
    ]
    return [*inputs, block.output[0].reshape(*heads, -1), block.output[1]]


def _tf_function(size: ModelSize, weights: Weights, threads: int) -> Contestant:
    del weights  # `streaming_model` sets them.
    _set_threads(threads)
    model = streaming_model(size)
    return Contestant(tf.function(model.call_step), tf.constant, keep=model)


class _Positions(keras.layers.Layer):
    """A layer that adds the first rows of a learned encoding."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.rows = self.add_weight(shape=input_shape[1:], name="rows")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x + self.rows


def _regular_model(size: ModelSize, weights: Weights) -> keras.Model:
    inputs = keras.Input((size.seq_len, size.features))
    x = _with_weights(keras.layers.Dense(size.embed_dim), inputs, weights.embedding)
    x = _with_weights(_Positions(), x, [weights.positions[: size.seq_len]])
    for i, block in enumerate(weights.blocks):
        attention = keras.layers.MultiHeadAttention(size.heads, size.head)
        # Causal in all blocks but the last, so that no row sees later steps. In the last block only
        # the newest row is used, and it sees all steps.
        causal = i < size.layers - 1
        attended = attention(x, x, use_causal_mask=causal)
        attention.set_weights(_attention_weights(size, block))
        x = _norm(x + attended, block.attention_norm)
        hidden = keras.layers.Dense(size.embed_dim, activation="gelu")
        hidden = _with_weights(hidden, x, block.feed_forward)
        fed = _with_weights(keras.layers.Dense(size.embed_dim), hidden, block.feed_forward_output)
        x = _norm(x + fed, block.output_norm)
    outputs = _with_weights(keras.layers.Dense(MODEL_OUTPUTS), x[:, -1], weights.classifier)
    return keras.Model(inputs, outputs)


def _norm(x: tf.Tensor, weights: Pair) -> tf.Tensor:
    return _with_weights(keras.layers.LayerNormalization(epsilon=EPSILON), x, weights)


def _with_weights(layer: keras.layers.Layer, x: tf.Tensor, weights: Sequence[Array]) -> tf.Tensor:
    y = layer(x)
    layer.set_weights(weights)
    return y


def _keras_windows(
    size: ModelSize, weights: Weights, threads: int, jit_compile: bool = False
) -> Contestant:
    _set_threads(threads)
    model = _regular_model(size, weights)
    first = inputs_of(size)[np.arange(size.seq_len) % STEPS]
    # The first step drops row 0, so the first of the N - 1 steps is in row 1.
    window = tf.constant(np.roll(first, 1, axis=0).swapaxes(0, 1))

    @tf.function(jit_compile=jit_compile)
    def call(window: tf.Tensor, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        window = tf.concat([window[:, 1:], x[:, tf.newaxis]], 1)
        return model(window, training=False), window

    def step(x: tf.Tensor) -> tf.Tensor:
        nonlocal window
        output, window = call(window, x)
        return output

    return Contestant(step, tf.constant, output=np.asarray, windows=True, keep=model)


def _keras_windows_xla(size: ModelSize, weights: Weights, threads: int) -> Contestant:
    return _keras_windows(size, weights, threads, jit_compile=True)


RIVALS = {
    "tf_function": _tf_function,
    "keras_windows": _keras_windows,
    "keras_windows_xla": _keras_windows_xla,
}
