"""Streams a recording through a model, step by step, and compares with the whole recording."""

import time
from typing import NamedTuple

import numpy as np

import continual_transformers_tf as ct


class Comparison(NamedTuple):
    """What streaming a recording showed.

    Attributes:
        error: The largest difference from the model on the whole recording, as a part of the
            largest output.
        microseconds: The median time of a step.
        block: How many steps of the input a step takes at once.
    """

    error: float
    microseconds: float
    block: int

    def __str__(self):
        return (
            f"largest error {self.error:.1e}, {self.microseconds:.0f} us a step of "
            f"{self.block} of the input"
        )


def compare(model, recording, seq_len=None):
    """Take the steps of a recording `(1, T, ...)` with a `ct.Session`.

    The model gives a row for each step, or for each block of steps. It may give fewer: then the
    first steps of a stream have none.
    """
    session = ct.Session(model, seq_len=seq_len)
    stream, block = session.open(1), session.block
    recording = recording[:, : recording.shape[1] // block * block]
    outputs, times = [], []
    for first in range(0, recording.shape[1], block):
        x = recording[:, first] if block == 1 else recording[:, first : first + block]
        start = time.perf_counter()
        outputs.append(session.step(x, streams=stream))
        times.append(time.perf_counter() - start)
    expected = model(recording).numpy()
    rows = np.concatenate([y.reshape(1, -1, expected.shape[-1]) for y in outputs], axis=1)
    rows = rows[:, rows.shape[1] - expected.shape[1] :]
    error = np.abs(rows - expected).max() / np.abs(expected).max()
    return Comparison(float(error), float(np.median(times)) * 1e6, block)
