"""The demo's data: ten people's shoulder exercises, recorded by a smartwatch on their wrist.

The package seglearn contains it (Burns, Leung, Hardisty, Whyne, Henry & McLachlin, "Shoulder
physiotherapy exercise recognition: machine learning the inertial signals from a smartwatch", 2018).
"""

from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from continual_transformers_tf import extras

SAMPLE_RATE = 50  # Hz
CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")  # Accelerometer in g, gyroscope in rad/s.
EXERCISES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
EXERCISE_NAMES = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "row",
)

SUBJECTS = tuple(range(1, 11))
HELD_OUT = (8, 9, 10)  # Training never sees them.

# A left arm's movement is the mirror image of a right arm's. A reflection along x turns one into
# the other: it negates the x component of an acceleration, and the other two components of a rate
# of turn, which is an axial vector. A watch knows which wrist it is on.
_MIRROR = np.array([-1, 1, 1, 1, -1, -1], np.float32)


class Recording(NamedTuple):
    """One person doing one exercise."""

    subject: int
    exercise: int  # An index into EXERCISES.
    samples: npt.NDArray[np.float32]  # float32 [T, 6]


def held_out_samples() -> npt.NDArray[np.float32]:
    """Return the recordings of the people whom the demo's model never saw, one after another.

    Raises:
        ModuleNotFoundError: As in `load_recordings`.
    """
    return np.concatenate([recording.samples for recording in load_recordings(HELD_OUT)])


def load_recordings(subjects: Iterable[int] = SUBJECTS) -> list[Recording]:
    """Return the recordings of these subjects, in their order, with left wrists mirrored.

    Raises:
        ModuleNotFoundError: If seglearn is not installed; the extra `demo` installs it.
    """
    # Find seglearn without importing it: only its data is needed, and the import needs pandas,
    # which seglearn does not install.
    package = util.find_spec("seglearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            f"The demo's data comes with seglearn. {extras.missing(['seglearn'], 'demo')}"
        )
    path = Path(package.origin).parent / "data" / "watch_dataset.npy"
    data = np.load(path, allow_pickle=True).item()
    recordings = []
    for subject in subjects:
        for i in np.flatnonzero(data["subject"] == subject):
            samples = data["X"][i].astype(np.float32)
            is_left = data["side"][i] == 0
            samples = samples * _MIRROR if is_left else samples
            recordings.append(Recording(subject, int(data["y"][i]), samples))
    return recordings
