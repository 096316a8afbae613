"""An audio encoder, streamed from raw samples: a Conformer with convolutional subsampling.

    python examples/models/conformer.py [speech.wav]

Samples at 8 kHz become a row of a log-mel spectrum every 10 ms. Two convolutions with strides leave
a row every 40 ms. The blocks (Gulati et al., arXiv 2005.08100) look ahead within chunks of four
rows: 160 ms. It builds the model, untrained, streams the speech with `ct.Session`, and compares the
steps with the same model on the whole recording. Without a file it streams a sweep of tones.
"""

import sys
import wave

import keras
import numpy as np
from comparison import compare
from keras import layers

import continual_transformers_tf as ct

RATE = 8000


def build(features=96, heads=4, blocks=4, classes=32, chunk=4, left_chunks=8):
    """Return an encoder: samples `(B, T, 1)` to rows `(B, T / 320, classes)`."""
    samples = keras.Input((None, 1), name="samples")
    x = layers.STFTSpectrogram("magnitude", 200, 80, 256, name="spectrum")(samples)
    x = mel(x.shape[-1])(x)
    x = keras.ops.log(x + 1e-6)
    for _ in range(2):
        x = layers.Conv1D(features, 3, strides=2, padding="causal", activation="relu")(x)
    for _ in range(blocks):
        x = x + 0.5 * feed_forward(x)
        attention = ct.CoChunkedMultiHeadAttention(chunk, left_chunks, heads, features // heads)
        x = x + attention(layers.LayerNormalization()(x))
        x = x + convolution(x)
        x = layers.LayerNormalization()(x + 0.5 * feed_forward(x))
    return keras.Model(samples, layers.Dense(classes)(x), name="conformer")


def mel(bins, count=40):
    """Return a layer that weighs the bins of a spectrum as the ear does."""
    edges = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), count + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    frequency = np.linspace(0, RATE / 2, bins)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0, np.minimum(rising, falling)).astype("float32")
    fixed = keras.initializers.Constant(weights)
    return layers.Dense(count, use_bias=False, kernel_initializer=fixed, trainable=False)


def feed_forward(x):
    y = layers.Dense(4 * x.shape[-1], activation="silu")(layers.LayerNormalization()(x))
    return layers.Dense(x.shape[-1])(y)


def convolution(x):
    """Apply a Conformer's convolution, with a layer norm, which streams, in place of a batch's."""
    y = keras.ops.glu(layers.Dense(2 * x.shape[-1])(layers.LayerNormalization()(x)))
    y = layers.DepthwiseConv1D(7)(layers.ZeroPadding1D((6, 0))(y))
    return layers.Dense(x.shape[-1])(keras.ops.silu(layers.LayerNormalization()(y)))


def recording(path=None, seconds=6):
    """Return the samples of a file of one channel at 8 kHz, or a sweep: `(1, T, 1)` in -1 to 1."""
    if path is None:
        time = np.arange(seconds * RATE) / RATE
        return np.sin(2 * np.pi * (100 + 300 * time) * time).astype("float32")[None, :, None]
    with wave.open(path) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            raise SystemExit(f"Expected {path} to have one channel of 16 bits at {RATE} Hz")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return (samples / 2**15).astype("float32")[None, :, None]


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    print(compare(build(), recording(*sys.argv[1:2])))
