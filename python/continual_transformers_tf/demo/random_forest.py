"""A baseline for the demo: a random forest on statistics of the same windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.ensemble import RandomForestClassifier

from continual_transformers_tf.demo.model import SEQ_LEN
from continual_transformers_tf.demo.watch import Recording
from continual_transformers_tf.demo.windows import windows_of

TREES = 100


def random_forest_accuracy(
    recordings: Sequence[Recording], held_out: Sequence[Recording], seed: int = 0
) -> float:
    """Return a random forest's accuracy on the windows of the held-out recordings.

    The windows have the model's length, and each overlaps the next by half.
    """
    features, exercises = _features_and_exercises(recordings)
    forest = RandomForestClassifier(TREES, random_state=seed, n_jobs=-1).fit(features, exercises)
    return float(forest.score(*_features_and_exercises(held_out)))


def _features_and_exercises(
    recordings: Sequence[Recording],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    features = [_features(windows_of(r.samples)[:: SEQ_LEN // 2]) for r in recordings]
    exercises = [np.full(len(f), r.exercise) for f, r in zip(features, recordings, strict=True)]
    return np.concatenate(features), np.concatenate(exercises)


def _features(windows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return the usual statistics of inertial signals for each channel: [B, N, 6] -> [B, 54]."""
    centred = windows - windows.mean(1, keepdims=True)
    statistics = (
        windows.mean(1),
        np.median(windows, 1),
        windows.std(1),
        windows.min(1),
        windows.max(1),
        stats.skew(windows, axis=1),
        stats.kurtosis(windows, axis=1),
        np.square(windows).sum(1),
        (np.diff(np.sign(centred), axis=1) != 0).mean(1),
    )
    return np.concatenate(statistics, 1)
