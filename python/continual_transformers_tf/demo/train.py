"""Training of the demo's model: `python -m continual_transformers_tf.demo.train`.

It takes a few minutes on two cores. It trains on windows, by regular calls, as any Keras model. It
writes the weights that the package ships, and beside them a record of the training.
"""

import json
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import click
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from continual_transformers_tf.demo import watch
from continual_transformers_tf.demo.model import SEQ_LEN, WEIGHTS, build_model
from continual_transformers_tf.demo.random_forest import random_forest_accuracy
from continual_transformers_tf.demo.watch import Recording
from continual_transformers_tf.demo.windows import window_accuracy

BATCH_SIZE = 128
STEPS_PER_EPOCH = 100
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.1
EMA_MOMENTUM = 0.995  # The weights kept are an average over the last few hundred steps.

# Augmentation: a guess at how people, and the way they wear a watch, differ.
TEMPO = 0.25  # The logarithm of speed is uniform within ± this.
TILT = 0.15  # Standard deviation of the rotation about each axis, in radians.
STRENGTH = 0.1  # Standard deviation of the logarithm of a common factor of all signals.
NOISE = 0.05  # Standard deviation, in the sensors' units.


class Windows(keras.utils.PyDataset):
    """Batches of augmented windows, with every exercise equally likely."""

    def __init__(self, recordings: Sequence[Recording], seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._by_exercise = [
            [r.samples for r in recordings if r.exercise == exercise]
            for exercise in range(len(watch.EXERCISES))
        ]
        self._random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        random = self._random
        exercises = random.integers(len(self._by_exercise), size=BATCH_SIZE)
        windows = np.stack([self._window(self._by_exercise[exercise]) for exercise in exercises])
        tilt = _rotations(random.normal(scale=TILT, size=(BATCH_SIZE, 3)))
        windows = windows.reshape(BATCH_SIZE, SEQ_LEN, 2, 3) @ tilt[:, np.newaxis].swapaxes(-1, -2)
        windows = windows.reshape(BATCH_SIZE, SEQ_LEN, 6)
        windows *= np.exp(random.normal(scale=STRENGTH, size=(BATCH_SIZE, 1, 1)))
        windows += random.normal(scale=NOISE, size=windows.shape)
        return windows.astype(np.float32), exercises[:, np.newaxis]

    def _window(self, recordings: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[Any]:
        """Return a random window of a random recording, at a faster or slower speed."""
        samples = recordings[int(self._random.integers(len(recordings)))]
        speed = np.exp(self._random.uniform(-TEMPO, TEMPO))
        speed = min(speed, (len(samples) - 2) / (SEQ_LEN - 1))
        start = self._random.uniform(0, len(samples) - 1 - speed * (SEQ_LEN - 1))
        time = start + speed * np.arange(SEQ_LEN)
        before = np.minimum(time.astype(int), len(samples) - 2)
        fraction = (time - before)[:, np.newaxis]
        window = samples[before] * (1 - fraction) + samples[before + 1] * fraction
        window[:, 3:] *= speed  # Rates of turn grow with speed.
        return window


def _rotations(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return rotation matrices [B, 3, 3] for rotation vectors [B, 3] (Rodrigues' formula)."""
    angle = np.linalg.norm(vectors, axis=-1, keepdims=True)[..., np.newaxis]
    x, y, z = (vectors / np.maximum(angle[..., 0], 1e-12)).T
    o = np.zeros_like(x)
    k = np.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(-1, 3, 3)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def train(recordings: Sequence[Recording], epochs: int, seed: int) -> keras.Model:
    """Return a model trained on these recordings."""
    keras.utils.set_random_seed(seed)
    model = build_model()
    samples = np.concatenate([recording.samples for recording in recordings])
    model.get_layer("normalization").adapt(samples[np.newaxis])
    steps = epochs * STEPS_PER_EPOCH
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=LEARNING_RATE, warmup_steps=min(100, steps // 4), alpha=0.01
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule, weight_decay=WEIGHT_DECAY, use_ema=True, ema_momentum=EMA_MOMENTUM
        ),
        loss=_smoothed_crossentropy,
        metrics=["sparse_categorical_accuracy"],
    )
    model.fit(Windows(recordings, seed), epochs=epochs)
    # A new model has no optimizer, whose variables would be most of the file.
    trained = build_model()
    trained.set_weights(model.get_weights())
    # The layer computes what it needs from the weights' mean and variance.
    trained.get_layer("normalization").finalize_state()
    return trained


def _smoothed_crossentropy(exercises: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    one_hot = keras.ops.one_hot(keras.ops.cast(exercises, "int32"), len(watch.EXERCISES))
    one_hot = keras.ops.reshape(one_hot, keras.ops.shape(logits))
    return keras.losses.categorical_crossentropy(
        one_hot, logits, from_logits=True, label_smoothing=LABEL_SMOOTHING
    )


@click.command()
@click.option("--epochs", default=20, show_default=True, help=f"Of {STEPS_PER_EPOCH} steps each.")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", default=str(WEIGHTS), show_default=True, help="A .weights.h5 file.")
def main(epochs: int, seed: int, output: str) -> None:
    """Train the demo's model on all subjects but the held-out ones."""
    started = time.time()
    subjects = [subject for subject in watch.SUBJECTS if subject not in watch.HELD_OUT]
    recordings, held_out = map(watch.load_recordings, (subjects, watch.HELD_OUT))
    model = train(recordings, epochs, seed)
    accuracy = window_accuracy(model, held_out)
    model.save_weights(output)
    record = dict(
        trained_on_subjects=subjects,
        held_out_subjects=watch.HELD_OUT,
        held_out_window_accuracy=round(accuracy, 4),
        held_out_random_forest_accuracy=round(random_forest_accuracy(recordings, held_out), 4),
        epochs=epochs,
        seed=seed,
        seconds=round(time.time() - started),
        **{name: metadata.version(name) for name in ("keras", "numpy", "seglearn")},
    )
    with open(output.removesuffix(".weights.h5") + ".json", "w") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
    click.echo(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
