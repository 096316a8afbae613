"""Two data sets of real recordings that come inside packages: a smartwatch's and vowels."""

from importlib import util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from continual_transformers_tf.demo import watch


class Recordings(NamedTuple):
    """Recordings whose steps a model classifies.

    Attributes:
        name: The name of the data set.
        classes: The number of classes.
        seq_len: N, the window.
        crop: The length of the pieces for training on steps.
        train, test: Lists of (float32 `[T, features]`, class), T >= seq_len.
    """

    name: str
    classes: int
    seq_len: int
    crop: int
    train: list
    test: list


def watch_recordings():
    """Return seven exercises of ten people, at 25 Hz. Three people are held out for the test."""
    train = [s for s in watch.SUBJECTS if s not in watch.HELD_OUT]
    return Recordings(
        "smartwatch",
        len(watch.EXERCISES),
        seq_len=50,
        crop=150,
        train=[(r.samples[::2], r.exercise) for r in watch.load_recordings(train)],
        test=[(r.samples[::2], r.exercise) for r in watch.load_recordings(watch.HELD_OUT)],
    )


def vowel_recordings():
    """Return two Japanese vowels of nine speakers, 12 coefficients a frame. Classes are speakers.

    The data come inside the package aeon (Kudo, Toyama & Shimbo, "Multidimensional curve
    classification using passing-through regions", 1999; split as in the UEA archive).

    Raises:
        ModuleNotFoundError: if aeon is not installed. The extra `examples` installs it.
    """
    package = util.find_spec("aeon")
    if package is None:
        raise ModuleNotFoundError(
            "The vowels are in the package aeon: run `pip install '.[examples]'` in a checkout"
        )
    folder = Path(package.origin).parent / "datasets" / "data" / "JapaneseVowels"
    train, test = (_read(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    return Recordings("vowels", 9, seq_len=7, crop=13, train=train, test=test)


def _read(path):
    """Return the recordings of a .ts file: one a line, channels and class separated by colons."""
    recordings = []
    for line in path.read_text().splitlines():
        if line and line[0] not in "#@":
            *channels, label = line.split(":")
            samples = np.array([channel.split(",") for channel in channels], np.float32).T
            recordings.append((np.ascontiguousarray(samples), int(label) - 1))
    return recordings


DATA = {"smartwatch": watch_recordings, "vowels": vowel_recordings}
