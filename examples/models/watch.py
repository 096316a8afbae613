"""A recurrent layer and attention on a smartwatch's sensors, streamed.

    python examples/models/watch.py
    python examples/models/watch.py --epochs 6

A convolution halves the rate, a GRU follows the wearer, and causal attention looks back at the
newest rows. It builds the model, untrained, streams random samples with `ct.Session`, and compares
the steps with the same model on the whole recording.

With `--epochs`, it trains the model on the demo's recordings: seven people's shoulder exercises,
from the package seglearn. Then it streams the recordings of three other people, each from its
beginning to its end, and compares the stream with the model on the whole recordings.
"""

import click
import keras
import numpy as np
from comparison import Score, compare, stream
from keras import layers

import continual_transformers_tf as ct
from continual_transformers_tf.demo import watch

WINDOW = 64


def build(sensors=6, features=48, heads=4, window=WINDOW, activities=6):
    """Return a classifier: samples `(B, T, sensors)` to activities `(B, T / 2, activities)`."""
    samples = keras.Input((None, sensors), name="samples")
    x = layers.Conv1D(features, 5, strides=2, padding="causal", activation="relu")(samples)
    x = layers.GRU(features, return_sequences=True)(x)
    attention = layers.MultiHeadAttention(heads, features // heads, sliding_window=window)
    x = layers.LayerNormalization()(x + attention(x, x, use_causal_mask=True))
    return keras.Model(samples, layers.Dense(activities)(x), name="watch")


class Pieces(keras.utils.PyDataset):
    """Batches of pieces of recordings at random places, with a label for every row of the model.

    Each piece is made a little weaker or stronger, and has noise.
    """

    def __init__(self, recordings, batches, length=400, batch_size=64, seed=1):
        super().__init__()
        self._recordings, self._length = recordings, length
        self._batches, self._batch_size = batches, batch_size
        self._random = np.random.default_rng(seed)

    def __len__(self):
        return self._batches

    def __getitem__(self, index):
        random, length = self._random, self._length
        chosen = [
            self._recordings[i]
            for i in random.integers(len(self._recordings), size=self._batch_size)
        ]
        pieces = []
        for recording in chosen:
            start = random.integers(len(recording.samples) - length + 1)
            piece = recording.samples[start : start + length]
            pieces.append(
                piece * np.exp(random.normal(scale=0.1))
                + random.normal(scale=0.05, size=piece.shape)
            )
        labels = np.array([recording.exercise for recording in chosen])
        return np.stack(pieces).astype("float32"), np.repeat(labels[:, None], length // 2, axis=1)


def train(model, pieces, epochs, learning_rate=2e-3):
    """Train a model on pieces of recordings."""
    steps = epochs * len(pieces)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=1e-2, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(pieces, epochs=epochs, verbose=2)


def score(model, recordings, window=WINDOW):
    """Compare the streams of recordings with the model on the whole recordings."""
    # The model has a row for every two samples. A row only depends on the samples before it, so
    # zeros behind the shorter recordings change nothing.
    lengths = [len(recording.samples) // 2 * 2 for recording in recordings]
    padded = np.zeros((len(recordings), max(lengths), 6), np.float32)
    for row, recording, length in zip(padded, recordings, lengths, strict=True):
        row[:length] = recording.samples[:length]
    whole = model.predict_on_batch(padded)
    session = ct.Session(model, seq_len=window)
    labels, expected, got, times = [], [], [], []
    for i, (recording, length) in enumerate(zip(recordings, lengths, strict=True)):
        outputs, microseconds = stream(session, padded[i : i + 1, :length])
        labels.append(np.full(len(outputs), recording.exercise))
        expected.append(whole[i, : len(outputs)])
        got.append(np.concatenate(outputs))
        times.append(microseconds)
    return Score.of(*map(np.concatenate, (labels, expected, got)), float(np.median(times)))


@click.command()
@click.option("--epochs", default=0, help="Train for so many epochs, and stream people.")
@click.option("--batches", default=30, show_default=True, help="Of 64 pieces, in an epoch.")
def main(epochs, batches):
    """Stream random samples through the untrained model, or train it and stream people."""
    keras.utils.set_random_seed(1)
    if not epochs:
        random = np.random.default_rng(1)
        samples = random.normal(size=(1, 1000, 6)).astype("float32")
        print(compare(build(), samples, seq_len=WINDOW))
        return
    model = build(activities=len(watch.EXERCISES))
    people = [person for person in watch.SUBJECTS if person not in watch.HELD_OUT]
    train(model, Pieces(watch.load_recordings(people), batches), epochs)
    print(f"People {watch.HELD_OUT}: {score(model, watch.load_recordings(watch.HELD_OUT))}")


if __name__ == "__main__":
    main()
