"""The demo's output: a live line, a table, a picture, and the figures as plain data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from continual_transformers_tf.demo.model import SEQ_LEN
from continual_transformers_tf.demo.stream import StreamResult, Wearer
from continual_transformers_tf.demo.watch import (
    CHANNELS,
    EXERCISE_NAMES,
    EXERCISES,
    SAMPLE_RATE,
    Recording,
)

SAMPLES_PER_REFRESH = 75  # Half a second of three watches.


class LiveLine:
    """A progress bar that shows the model's current predictions.

    Args:
        console: A `rich.console.Console`.
        total: How many steps all streams will take.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=total)
        self._shown = 0

    def __enter__(self) -> "LiveLine":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(
        self, taken: int, now: list[tuple[Wearer, Recording, npt.NDArray[np.float32]]]
    ) -> None:
        """Show the predictions after `taken` steps; see `stream`'s `on_step`."""
        if taken - self._shown < SAMPLES_PER_REFRESH:
            return
        self._shown = taken
        thoughts = [_thought(*told) for told in now]
        self._progress.update(self._task, completed=taken, description="  ".join(thoughts))

    def finish(self) -> None:
        """Show that all steps have been taken."""
        task = self._progress.tasks[0]
        self._progress.update(self._task, completed=task.total, description="done")


def _thought(wearer: Wearer, recording: Recording, logits: npt.NDArray[np.float32]) -> str:
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    guess = int(probabilities.argmax())
    color = "green" if guess == recording.exercise else "red"
    return f"{wearer.subject:>2}: [{color}]{EXERCISES[guess]:>4} {probabilities[guess]:4.0%}[/]"


def legend() -> str:
    """Return the meaning of the live line's words and colors."""
    names = ", ".join(f"{a} {b}" for a, b in zip(EXERCISES, EXERCISE_NAMES, strict=True))
    return f"What each person is doing ({names}): [green]right[/], [red]wrong[/]"


def summarize(
    wearers: Sequence[Wearer],
    result: StreamResult,
    window_predictions: Sequence[Sequence[npt.ArrayLike]],
) -> dict[str, Any]:
    """Return the demo's figures, as plain data for `--json`.

    Args:
        wearers: A list of `Wearer`.
        result: The `StreamResult` of their streams.
        window_predictions: The result of `on_windows` for the same wearers.
    """
    truths = [
        np.full(len(predictions), recording.exercise)
        for wearer, of_wearer in zip(wearers, result.predictions, strict=True)
        for recording, predictions in zip(wearer.recordings, of_wearer, strict=True)
    ]
    truth = np.concatenate(truths)
    streamed = np.concatenate([p for of_wearer in result.predictions for p in of_wearer])
    windowed = np.concatenate([p for of_wearer in window_predictions for p in of_wearer])
    step, window = np.median(result.step_microseconds), np.median(result.window_microseconds)
    return dict(
        subjects=[wearer.subject for wearer in wearers],
        recordings=sum(len(wearer.recordings) for wearer in wearers),
        window_steps=SEQ_LEN,
        predictions=len(truth),
        stream_accuracy=float((streamed == truth).mean()),
        window_accuracy=float((windowed == truth).mean()),
        disagreements=int((streamed != windowed).sum()),
        stream_microseconds_per_step=float(step),
        window_microseconds_per_step=float(window),
        ratio=float(window / step),
    )


def table(summary: dict[str, Any]) -> Table:
    """Return the figures as a `rich.table.Table`."""
    people = ", ".join(map(str, summary["subjects"]))
    result = Table(
        title=f"{summary['predictions']:,} predictions for people the model never saw: {people}",
        caption=f"Medians; {len(summary['subjects'])} streams a step; windows as a tf.function.",
    )
    result.add_column("")
    for name in ("accuracy", "µs a step"):
        result.add_column(name, justify="right")
    result.add_row(
        "stream, ct.Session",
        f"{summary['stream_accuracy']:.4f}",
        f"{summary['stream_microseconds_per_step']:.1f}",
    )
    result.add_row(
        f"windows of {SEQ_LEN}, keras.layers.MultiHeadAttention",
        f"{summary['window_accuracy']:.4f}",
        f"{summary['window_microseconds_per_step']:.0f}",
    )
    result.add_section()
    result.add_row("predictions that differ", f"{summary['disagreements']}", "")
    result.add_row("windows / stream", "", f"{summary['ratio']:.0f}×")
    return result


def draw(path: Path, wearer: Wearer, predictions: Sequence[Sequence[int]]) -> None:
    """Draw one person's stream: signal, truth and prediction over time.

    Args:
        path: The path of the PNG file.
        wearer: A `Wearer`.
        predictions: The predictions for each of the wearer's recordings, as in `StreamResult`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    samples = np.concatenate([recording.samples for recording in wearer.recordings])
    lengths = [len(recording.samples) for recording in wearer.recordings]
    truth = np.repeat([recording.exercise for recording in wearer.recordings], lengths)
    # There is no prediction while a window fills: mask these samples.
    predicted = np.concatenate([np.r_[np.full(SEQ_LEN - 1, -1), p] for p in predictions])
    predicted = np.ma.masked_less(predicted, 0)
    seconds = np.arange(len(samples)) / SAMPLE_RATE

    colors = ListedColormap(
        ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#edc948"]
    )
    norm = BoundaryNorm(np.arange(len(EXERCISES) + 1) - 0.5, len(EXERCISES))
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    acceleration, turn, strips = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.4))
    for axes, channels, label in (
        (acceleration, slice(0, 3), "acceleration, g"),
        (turn, slice(3, 6), "rate of turn, rad/s"),
    ):
        axes.plot(seconds, samples[:, channels], linewidth=0.5, label=CHANNELS[channels])
        axes.set_ylabel(label)
        axes.legend(loc="upper right", ncols=3, fontsize="small")
    for row, labels in enumerate((predicted, truth)):
        strips.imshow(
            labels[np.newaxis],
            extent=(0, seconds[-1], row, row + 0.9),
            aspect="auto",
            interpolation="nearest",
            cmap=colors,
            norm=norm,
        )
    strips.set_ylim(0, 1.9)
    strips.set_yticks((0.45, 1.45), ("stream", "truth"))
    strips.set_xlabel("seconds")
    for end in np.cumsum(lengths)[:-1] / SAMPLE_RATE:
        for axes in (acceleration, turn, strips):
            axes.axvline(end, color="0.8", linewidth=0.5)
    figure.legend(
        handles=[
            Patch(color=colors(i), label=f"{short}, {name}")
            for i, (short, name) in enumerate(zip(EXERCISES, EXERCISE_NAMES, strict=True))
        ],
        loc="outside lower center",
        ncols=len(EXERCISES),
        fontsize="small",
    )
    answered = ~np.ma.getmaskarray(predicted)
    accuracy = (predicted[answered] == truth[answered]).mean()
    figure.suptitle(
        f"Person {wearer.subject}, {len(wearer.recordings)} recordings, streamed: "
        f"{accuracy:.1%} of the answers are right"
    )
    figure.savefig(path, dpi=110)
