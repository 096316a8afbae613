"""Stacks of layers, in Keras and in Google's sequence-layers, with the same names and weights.

A name "block_0.attention" is a layer in Keras, and in sequence-layers the layer "attention" within
the layer "block_0". Keras and JAX are imported only by what uses them: no process needs both.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

EPSILON = 1e-6  # Of layer norms: the default of sequence-layers.
INPUTS = 40  # The features of an input step, as of a log-mel spectrum.
FEATURES, HEADS, WINDOW, BLOCKS, KERNEL = 96, 4, 64, 2, 7
CONVOLUTIONS = ((5, 2), (3, 2), (3, 1))  # (kernel size, strides) of each.
UNITS = 64


class Stack(NamedTuple):
    """Layers in two libraries.

    Attributes:
        description: What a reader is told about them.
        keras_model: A function that returns the Keras model.
        sequence_layers: A function that returns the configurations of the same layers.
    """

    description: str
    keras_model: Callable
    sequence_layers: Callable


def _keras_convolutions():
    import keras

    rows = keras.Input((None, INPUTS))
    x = rows
    for i, (size, strides) in enumerate(CONVOLUTIONS):
        options = dict(padding="causal", activation="relu", name=f"conv_{i}")
        x = keras.layers.Conv1D(UNITS, size, strides, **options)(x)
    return keras.Model(rows, x, name="convolutions")


def _convolutions():
    import jax
    import sequence_layers.jax as sl

    return [
        sl.Conv1D.Config(
            UNITS, size, strides, padding="causal", activation=jax.nn.relu, name=f"conv_{i}"
        )
        for i, (size, strides) in enumerate(CONVOLUTIONS)
    ]


def _keras_lstm():
    import keras

    rows = keras.Input((None, INPUTS))
    lstm = keras.layers.LSTM(UNITS, return_sequences=True, name="lstm")
    return keras.Model(rows, lstm(rows), name="lstm")


def _lstm():
    import sequence_layers.jax as sl

    return [sl.LSTM.Config(UNITS, name="lstm")]


def _keras_encoder():
    import keras
    from keras import layers

    def norm(name):
        return layers.LayerNormalization(epsilon=EPSILON, name=name)

    def feed_forward(x, name):
        y = norm(f"{name}.norm")(x)
        y = layers.Dense(4 * FEATURES, activation="silu", name=f"{name}.hidden")(y)
        return x + 0.5 * layers.Dense(FEATURES, name=f"{name}.output")(y)

    def attend(x, name):
        attention = layers.MultiHeadAttention(
            HEADS, FEATURES // HEADS, sliding_window=WINDOW, name=f"{name}.attention"
        )
        y = norm(f"{name}.norm")(x)
        return x + attention(y, y, use_causal_mask=True)

    def convolve(x, name):
        y = layers.Dense(2 * FEATURES, name=f"{name}.input")(norm(f"{name}.norm")(x))
        y = layers.ZeroPadding1D((KERNEL - 1, 0))(keras.ops.glu(y))
        y = layers.DepthwiseConv1D(KERNEL, name=f"{name}.depthwise")(y)
        y = keras.ops.silu(norm(f"{name}.second_norm")(y))
        return x + layers.Dense(FEATURES, name=f"{name}.output")(y)

    rows = keras.Input((None, INPUTS))
    options = dict(padding="causal", activation="relu", name="subsampling")
    x = layers.Conv1D(FEATURES, 3, strides=2, **options)(rows)
    for i in range(BLOCKS):
        x = feed_forward(x, f"first_{i}")
        x = attend(x, f"attend_{i}")
        x = convolve(x, f"convolve_{i}")
        x = norm(f"norm_{i}")(feed_forward(x, f"second_{i}"))
    return keras.Model(rows, x, name="encoder")


def _encoder():
    import jax
    import sequence_layers.jax as sl

    def norm(name):
        return sl.LayerNormalization.Config(epsilon=EPSILON, name=name)

    def feed_forward(name):
        layers = [
            norm("norm"),
            sl.Dense.Config(4 * FEATURES, activation=jax.nn.silu, name="hidden"),
            sl.Dense.Config(FEATURES, name="output"),
            sl.Scale.Config(0.5),
        ]
        return sl.Residual.Config(layers, name=name)

    def attend(name):
        attention = sl.DotProductSelfAttention.Config(
            HEADS,
            FEATURES // HEADS,
            max_past_horizon=WINDOW - 1,
            use_bias=True,
            name="attention",
        )
        output = sl.EinsumDense.Config(
            "...hd,hde->...e", output_shape=[FEATURES], bias_axes="e", name="attention_output"
        )
        return sl.Residual.Config([norm("norm"), attention, output], name=name)

    def convolve(name):
        layers = [
            norm("norm"),
            sl.Dense.Config(2 * FEATURES, name="input"),
            sl.GatedLinearUnit.Config(),
            sl.DepthwiseConv1D.Config(KERNEL, padding="causal", name="depthwise"),
            norm("second_norm"),
            sl.Swish.Config(),
            sl.Dense.Config(FEATURES, name="output"),
        ]
        return sl.Residual.Config(layers, name=name)

    subsampling = sl.Conv1D.Config(
        FEATURES, 3, 2, padding="causal", activation=jax.nn.relu, name="subsampling"
    )
    found = [subsampling]
    for i in range(BLOCKS):
        found += [feed_forward(f"first_{i}"), attend(f"attend_{i}"), convolve(f"convolve_{i}")]
        found += [feed_forward(f"second_{i}"), norm(f"norm_{i}")]
    return found


STACKS = {
    "convolutions": Stack(
        f"{len(CONVOLUTIONS)} causal convolutions of {UNITS} features over rows of {INPUTS}, "
        "with strides 2, 2 and 1: a step is 4 rows",
        _keras_convolutions,
        _convolutions,
    ),
    "lstm": Stack(f"an LSTM of {UNITS} units, rows of {INPUTS}", _keras_lstm, _lstm),
    "encoder": Stack(
        f"a convolution with strides of 2 and {BLOCKS} Conformer blocks of {FEATURES} features, "
        f"{HEADS} heads, causal attention to {WINDOW} rows: a step is 2 rows",
        _keras_encoder,
        _encoder,
    ),
}


def weights_of(model):
    """Return {"name of the layer/name of the weight": array} of a Keras model."""
    found = {}
    for layer in model.layers:
        for variable in layer.weights:
            # The path begins with the layer's name. That of an LSTM has "lstm_cell" after it.
            within = variable.path.split("/")[1:]
            found["/".join([layer.name, *(p for p in within if p != "lstm_cell")])] = np.asarray(
                variable
            )
    return found


def parameters(weights):
    """Return the variables of sequence-layers' layers, from `weights_of` a Keras model."""
    by_layer = {}
    for path, array in weights.items():
        name, _, weight = path.partition("/")
        by_layer.setdefault(name, {})[weight] = array
    found = {}
    for name, layer in by_layer.items():
        *outer, own = name.split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        if "query/kernel" in layer:
            place[own], place[f"{own}_output"] = _attention(layer)
        else:
            place[own] = _layer(layer)
    return {"params": found}


def _layer(weights):
    if "gamma" in weights:
        return {"scale": weights["gamma"], "bias": weights["beta"]}
    if "recurrent_kernel" in weights:
        kernels = {name: {"kernel": weights[name]} for name in ("kernel", "recurrent_kernel")}
        return {**kernels, "bias": weights["bias"]}
    kernel = weights["kernel"]
    if kernel.ndim == 3 and kernel.shape[-1] == 1:  # Depthwise: [size, features, 1].
        kernel = kernel.swapaxes(1, 2)
    return {"kernel": kernel, "bias": weights["bias"]}


def _attention(weights):
    """Return the variables of attention, and of the product after it."""
    three = ("query", "key", "value")
    projection = {
        "kernel": np.stack([weights[f"{name}/kernel"] for name in three], 1),
        "bias": np.stack([weights[f"{name}/bias"] for name in three]),
    }
    output = {
        "kernel": weights["attention_output/kernel"],
        "bias": weights["attention_output/bias"],
    }
    return {"query_key_value_projection": projection}, output
