"""An audio encoder, streamed from raw samples: a Conformer with convolutional subsampling.

    python examples/models/conformer.py [speech.wav]
    python examples/models/conformer.py /usr/share/asterisk/sounds/en_US_f_Allison

Samples at 8 kHz become a row of a log-mel spectrum every 10 ms. Two convolutions with strides leave
a row every 40 ms. The blocks (Gulati et al., arXiv 2005.08100) look ahead within chunks of four
rows: 160 ms. It builds the model, untrained, streams the speech with `ct.Session`, and compares the
steps with the same model on the whole recording. Without a file it streams a sweep of tones.

With the folder of Debian's package `asterisk-core-sounds-en-wav`, it trains the model to tell, for
every row, which digit is spoken at its end, if any. Then it streams words one after the other. As
in keyword_spotter.py, there is one speaker and one recording of each digit: the accuracy shows that
the model that streams is the trained one, not how well it understands other people.
"""

from pathlib import Path

import click
import keras
import numpy as np
import speech
from comparison import Score, compare, stream
from keras import layers

import continual_transformers_tf as ct

SAMPLES_OF_ROW = 320


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


def mel(bins):
    """Return a layer that weighs the bins of a spectrum as the ear does."""
    fixed = keras.initializers.Constant(speech.mel_weights(bins))
    return layers.Dense(speech.MELS, use_bias=False, kernel_initializer=fixed, trainable=False)


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
        time = np.arange(seconds * speech.RATE) / speech.RATE
        return np.sin(2 * np.pi * (100 + 300 * time) * time).astype("float32")[None, :, None]
    return speech.read(path)[None, :, None]


def pieces(digits, words, count, rows, random):
    """Return pieces of mixtures of words, `(count, T, 1)`, and the class of each of their rows."""
    size = rows * SAMPLES_OF_ROW
    samples, classes = [], []
    for _ in range(count):
        mixed, spoken = speech.mixture(digits, words, 5, random)
        first = int(random.integers(max(1, len(mixed) - size)))
        spoken = [(digit, begin - first, end - first) for digit, begin, end in spoken]
        piece = mixed[first : first + size]
        samples.append(np.pad(piece, (0, size - len(piece))))
        classes.append(speech.classes_of_rows(spoken, rows, SAMPLES_OF_ROW))
    return np.stack(samples)[..., None], np.stack(classes)


def train(model, digits, words, epochs, batches, batch_size=16, rows=96, learning_rate=1e-3):
    """Train a model on pieces of random mixtures, new ones for every epoch."""
    random = np.random.default_rng(1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * batches, warmup_target=learning_rate, warmup_steps=batches // 2
    )
    model.compile(
        keras.optimizers.AdamW(schedule, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    for epoch in range(epochs):
        print(f"Epoch {epoch + 1} of {epochs}")
        drawn = pieces(digits, words, batches * batch_size, rows, random)
        model.fit(*drawn, batch_size=batch_size, verbose=2)


def score(model, digits, words, count, random):
    """Compare a stream of words with the model on all of it."""
    session = ct.Session(model)
    samples, spoken = speech.mixture(digits, words, count, random)
    samples = samples[None, : len(samples) // session.block * session.block, None]
    outputs, microseconds = stream(session, samples)
    expected = model(samples)[0].numpy()
    classes = speech.classes_of_rows(spoken, len(expected), SAMPLES_OF_ROW)
    streamed = np.concatenate([y.reshape(-1, expected.shape[-1]) for y in outputs])
    return Score.of(classes, expected, streamed, microseconds)


@click.command()
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--epochs", default=8, show_default=True)
@click.option("--batches", default=60, show_default=True, help="Of 16 pieces, in an epoch.")
@click.option("--words", default=100, show_default=True, help="The words of the test's stream.")
def main(path, epochs, batches, words):
    """Stream a .wav file or a sweep of tones; given a folder of words, train on it and stream."""
    keras.utils.set_random_seed(1)
    if path is None or path.is_file():
        print(compare(build(), recording(path)))
        return
    model = build(classes=len(speech.DIGITS) + 1)
    digits, trained, others = speech.read_words(path)
    train(model, digits, trained, epochs, batches)
    result = score(model, digits, others, words, np.random.default_rng(2))
    print(f"A stream of {words} words: {result}")


if __name__ == "__main__":
    main()
