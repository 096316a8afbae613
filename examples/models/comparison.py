"""Streams a recording through a model, and compares the steps with the model itself."""

import time
from typing import NamedTuple

import keras
import numpy as np

import continual_transformers_tf as ct


class Comparison(NamedTuple):
    """The error and the time of the steps of a recording.

    Attributes:
        error: The largest difference from the model, as a part of its largest output.
        microseconds: The median time of a step, in the second half of the recording.
        block: How many steps of the recording a step of the session takes.
    """

    error: float
    microseconds: float
    block: int

    def __str__(self):
        step = "a step" if self.block == 1 else f"a block of {self.block} steps"
        return f"largest error {self.error:.1e}, {self.microseconds:.0f} us for {step}"


class Score(NamedTuple):
    """How a trained model and its stream classify the steps of recordings.

    Attributes:
        labels: The number of steps that have a label.
        commonest: The share of the commonest label among them.
        model: The share of steps that the model, on whole recordings or windows, gets right.
        stream: The share that the stream gets right.
        differ: The number of steps where the two predict different classes.
        microseconds: The median time of a step of the session.
    """

    labels: int
    commonest: float
    model: float
    stream: float
    differ: int
    microseconds: float

    @classmethod
    def of(cls, labels, expected, got, microseconds):
        """Return the score of the model's outputs and the stream's, both `(labels, classes)`."""
        expected, got = expected.argmax(-1), got.argmax(-1)
        return cls(
            len(labels),
            float(np.bincount(labels).max() / len(labels)),
            float(np.mean(expected == labels)),
            float(np.mean(got == labels)),
            int(np.sum(expected != got)),
            microseconds,
        )

    def __str__(self):
        return (
            f"the model gets {self.model:.2%} right, the stream {self.stream:.2%} "
            f"(always the commonest class: {self.commonest:.2%}); "
            f"{self.differ} of {self.labels:,} predictions differ; "
            f"{self.microseconds:.1f} us a step"
        )


def compare(model, recording, seq_len=None):
    """Compare the steps of a recording `(1, T, ...)` with the model on the whole recording.

    The model gives a row for each step, or for each block of steps. It may give fewer: then the
    first steps of a stream have none.
    """
    session = ct.Session(model, seq_len=seq_len)
    recording = recording[:, : recording.shape[1] // session.block * session.block]
    outputs, microseconds = stream(session, recording)
    expected = model(recording).numpy()
    rows = np.concatenate([y.reshape(1, -1, expected.shape[-1]) for y in outputs], axis=1)
    error = relative_error(rows[:, rows.shape[1] - expected.shape[1] :], expected)
    return Comparison(error, microseconds, session.block)


def compare_first_window(model, recording):
    """Compare the step that completes the first window of a recording with the model on it.

    The models of `keyword_spotter.py` and `oad_tr.py` have positions that go round, so only the
    first window of a stream has the positions of the model's windows.
    """
    window = model.inputs[0].shape[1]
    outputs, microseconds = stream(ct.Session(model), recording)
    expected = keras.tree.flatten(model(recording[:, :window]))
    got = keras.tree.flatten(outputs[window - 1])
    error = max(relative_error(y, x.numpy()) for y, x in zip(got, expected, strict=True))
    return Comparison(error, microseconds, 1)


def stream(session, recording):
    """Return (the outputs of each step, the median microseconds of the second half of them)."""
    ids, block = session.open(1), session.block
    outputs, times = [], []
    for first in range(0, recording.shape[1], block):
        x = recording[:, first] if block == 1 else recording[:, first : first + block]
        start = time.perf_counter()
        outputs.append(session.step(x, streams=ids))
        times.append(time.perf_counter() - start)
    session.close(ids)
    return outputs, float(np.median(times[len(times) // 2 :])) * 1e6


def relative_error(y, expected):
    return float(np.abs(y - expected).max() / np.abs(expected).max())
