"""A keyword spotter in the shape of the Keyword Transformer, streamed.

    python examples/models/keyword_spotter.py
    python examples/models/keyword_spotter.py /usr/share/asterisk/sounds/en_US_f_Allison

The Keyword Transformer (Berg et al., arXiv 2104.00769) attends among the 98 rows of a second of
speech. Here the rows are 40 mel features every 10 ms, as there. Its first block is retroactive, so
that every step has the outputs of the model on the newest second, exactly; positions go round with
the stream. Without a folder, the script streams random features with `ct.Session` through the
untrained model, and compares the steps with the same model on windows.

With the folder of Debian's package `asterisk-core-sounds-en-wav`, the script trains the model to
spot the digits zero to nine among other words. Then it streams words one after the other, and
compares the stream with the model on every window. There is one speaker, and one recording of each
digit. So the accuracy shows that the model that streams is the trained one. It does not show how
well the model spots the words of other people.
"""

import click
import keras
import numpy as np
import speech
from comparison import Score, compare_first_window, stream
from keras import layers

import continual_transformers_tf as ct

WINDOW = 98


def build(features=64, heads=1, blocks=3, words=12, window=WINDOW):
    """Return a classifier of windows: rows `(B, window, 40)` to words `(B, words)`."""
    rows = keras.Input((window, 40), name="rows")
    x = ct.CircularPositionalEncoding(window, features)(layers.Dense(features)(rows))
    stack = ct.TransformerEncoder(
        blocks, window, features, heads, 4 * features, key_dim=64, kind="retroactive"
    )
    x = stack(x)
    return keras.Model(rows, layers.Dense(words)(layers.Flatten()(x)), name="keyword_spotter")


def train(model, digits, words, epochs, batches, batch_size=32, learning_rate=1e-3):
    """Train a model on windows at random places of random mixtures, new ones for every epoch."""
    random = np.random.default_rng(1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, epochs * batches, warmup_target=learning_rate, warmup_steps=batches // 2
    )
    model.compile(
        keras.optimizers.AdamW(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    for epoch in range(epochs):
        drawn = draw_windows(model, digits, words, batches * batch_size, random)
        print(f"Epoch {epoch + 1} of {epochs}")
        model.fit(*drawn, batch_size=batch_size, verbose=2)


def draw_windows(model, digits, words, count, random):
    """Return windows at random places of mixtures, and their classes."""
    window = model.inputs[0].shape[1]
    windows, classes = [], []
    for first in range(0, count, 320):
        rows, labels = labelled_rows(digits, words, 40, window, random)
        ends = random.choice(np.flatnonzero(labels != speech.UNKNOWN), min(320, count - first))
        windows.append(windows_of(rows, window)[ends - (window - 1)])
        classes.append(labels[ends])
    return np.concatenate(windows), np.concatenate(classes)


def labelled_rows(digits, words, count, window, random):
    """Return the mel rows of a mixture of words, and the class of the window that ends at each."""
    samples, spoken = speech.mixture(digits, words, count, random)
    rows = speech.log_mel(samples)
    return rows, speech.classes_of_windows(spoken, len(rows), window)


def windows_of(rows, window):
    """Return every window of rows as a view: `(T, features)` to `(T - window + 1, window, ...)`."""
    return np.lib.stride_tricks.sliding_window_view(rows, window, 0).transpose(0, 2, 1)


def on_windows(model, rows):
    """Return the model's outputs on every window of rows, with the positions of a stream.

    A stream's position goes round the table, so the window that begins at row t begins at row t of
    the table. In a call, a window begins at row 0. So the table is turned by t.
    """
    window = model.inputs[0].shape[1]
    (position,) = [x for x in model.layers if isinstance(x, ct.CircularPositionalEncoding)]
    table, windows = position.embeddings.numpy(), windows_of(rows, window)
    outputs = np.empty((len(windows), model.output_shape[-1]), np.float32)
    for turn in range(min(window, len(windows))):
        position.embeddings.assign(np.roll(table, -turn, axis=0))
        outputs[turn::window] = model.predict_on_batch(windows[turn::window])
    position.embeddings.assign(table)
    return outputs


def score(model, digits, words, count, random):
    """Compare a stream of words with the model on its windows."""
    window = model.inputs[0].shape[1]
    rows, labels = labelled_rows(digits, words, count, window, random)
    outputs, microseconds = stream(ct.Session(model), rows[None])
    known = labels[window - 1 :] != speech.UNKNOWN
    streamed = np.concatenate(outputs[window - 1 :])
    return Score.of(
        labels[window - 1 :][known], on_windows(model, rows)[known], streamed[known], microseconds
    )


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--epochs", default=10, show_default=True)
@click.option("--batches", default=100, show_default=True, help="Of 32 windows, in an epoch.")
@click.option("--words", default=100, show_default=True, help="The words of the test's stream.")
def main(folder, epochs, batches, words):
    """Train on the words of a folder, and stream others; without a folder, stream random rows."""
    keras.utils.set_random_seed(1)
    if folder is None:
        rows = np.random.default_rng(1).normal(size=(1, 2 * WINDOW, 40)).astype("float32")
        print(compare_first_window(build(), rows))
        return
    model = build(words=len(speech.DIGITS) + 1)
    digits, trained, others = speech.read_words(folder)
    train(model, digits, trained, epochs, batches)
    random = np.random.default_rng(2)
    windows, classes = draw_windows(model, digits, others, 20 * words, random)
    right = np.mean(model.predict(windows, verbose=0).argmax(-1) == classes)
    print(f"{len(windows):,} windows of other mixtures: {right:.1%} right")
    print(f"A stream of {words} words: {score(model, digits, others, words, random)}")


if __name__ == "__main__":
    main()
