"""The streaming part of the demo: samples of people whom the model never saw, one by one."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.demo.model import SEQ_LEN
from continual_transformers_tf.demo.watch import Recording
from continual_transformers_tf.demo.windows import WindowModel

# After every so many steps, the rival computes the same predictions on windows. So both are timed
# in the same run.
STEPS_PER_RIVAL = 50
WARM_UP_STEPS = 20  # Not timed: the first calls trace and allocate.


class Wearer(NamedTuple):
    """One person and their recordings, which one stream takes one after the other."""

    subject: int
    recordings: list[Recording]


class StreamResult(NamedTuple):
    """The result of streaming.

    Attributes:
        predictions: For each wearer and each recording, the predictions of the steps with a full
            window: int `[T - N + 1]`.
        step_microseconds: The time of each timed step of the session.
        window_microseconds: The time of each timed call of the rival, on the same streams.
    """

    predictions: list[list[list[int]]]
    step_microseconds: npt.NDArray[np.float64]
    window_microseconds: npt.NDArray[np.float64]


# A function of the steps that all streams have taken together, and of a list with a (wearer,
# recording, logits [7]) for each stream that took this step.
OnStep = Callable[[int, list[tuple[Wearer, Recording, npt.NDArray[np.float32]]]], None]


def wearers_of(recordings: Sequence[Recording]) -> list[Wearer]:
    """Group recordings by the person who wore the watch."""
    subjects = dict.fromkeys(recording.subject for recording in recordings)
    return [Wearer(s, [r for r in recordings if r.subject == s]) for s in subjects]


def stream(
    model: keras.Model, wearers: Sequence[Wearer], on_step: OnStep | None = None
) -> StreamResult:
    """Step all wearers' streams together in a `ct.Session`, one sample of each at a time.

    Each recording is another exercise, so its stream is reset before it. The other streams go on.

    Args:
        model: The trained model.
        wearers: A list of `Wearer`; each has its own stream.
        on_step: A function that is called after each step with (steps taken by all streams
            together, list of (wearer, recording, logits [7]), one for each stream that took the
            step).

    Returns:
        A `StreamResult`.
    """
    rival = WindowModel(model)
    session = ct.Session(model, streams=len(wearers))
    streams = session.open(len(wearers))
    cursors = [_Cursor(wearer) for wearer in wearers]
    step_times, window_times = [], []
    taken = calls = 0
    while active := [i for i, cursor in enumerate(cursors) if not cursor.done]:
        begins = [i for i in active if cursors[i].time == 0]
        if begins:
            session.clean_state(streams[begins])
        samples = np.stack([cursors[i].sample for i in active])
        ids = streams[active]
        started = time.perf_counter()
        logits = session.step(samples, ids)
        step_times.append(time.perf_counter() - started)
        for row, i in zip(logits, active, strict=True):
            cursors[i].answer(int(row.argmax()))
        if calls % STEPS_PER_RIVAL == 0 and all(cursors[i].has_window for i in active):
            windows = tf.constant(np.stack([cursors[i].window for i in active]))
            first_step = tf.constant([cursors[i].time + 1 - SEQ_LEN for i in active], tf.int64)
            started = time.perf_counter()
            rival.logits(windows, first_step).numpy()
            window_times.append(time.perf_counter() - started)
        now = [
            (wearers[i], cursors[i].recording, row) for i, row in zip(active, logits, strict=True)
        ]
        for i in active:
            cursors[i].advance()
        taken, calls = taken + len(active), calls + 1
        if on_step is not None:
            on_step(taken, now)
    return StreamResult(
        predictions=[cursor.predictions for cursor in cursors],
        step_microseconds=np.array(step_times[WARM_UP_STEPS:]) * 1e6,
        window_microseconds=np.array(window_times[1:]) * 1e6,
    )


def on_windows(model: keras.Model, wearers: Sequence[Wearer]) -> list[list[npt.NDArray[np.int64]]]:
    """Return predictions as in `StreamResult.predictions`, but computed from every window."""
    rival = WindowModel(model)
    return [[rival.predictions(r.samples) for r in wearer.recordings] for wearer in wearers]


class _Cursor:
    """The place of a stream in its wearer's recordings."""

    def __init__(self, wearer: Wearer) -> None:
        self._recordings = iter(wearer.recordings)
        self.predictions: list[list[int]] = []
        self._next_recording()

    def _next_recording(self) -> None:
        recording = next(self._recordings, None)
        self.time = 0
        self.done = recording is None
        if recording is not None:
            self.recording = recording
            self.predictions.append([])

    @property
    def has_window(self) -> bool:
        return self.time + 1 >= SEQ_LEN

    @property
    def sample(self) -> npt.NDArray[np.float32]:
        return self.recording.samples[self.time]

    @property
    def window(self) -> npt.NDArray[np.float32]:
        return self.recording.samples[self.time + 1 - SEQ_LEN : self.time + 1]

    def answer(self, prediction: int) -> None:
        if self.has_window:
            self.predictions[-1].append(prediction)

    def advance(self) -> None:
        self.time += 1
        if self.time == len(self.recording.samples):
            self._next_recording()
