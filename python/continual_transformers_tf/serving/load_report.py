"""The load test's output: a progress bar, a table, a picture, and the figures as plain data."""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from continual_transformers_tf.serving.load import Options, Result, quantiles

MOST_POINTS = 20_000  # Of the picture.


class LiveLine:
    """A progress bar that shows the rate and the newest latency.

    Args:
        console: A `rich.console.Console`.
        seconds: How long the load test takes.
    """

    def __init__(self, console: Console, seconds: float) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=seconds)

    def __enter__(self) -> "LiveLine":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, seconds: float, steps: int, latency: "array[float]") -> None:
        """Show how it goes; see `Load`'s `on_progress`."""
        told = f"{steps / seconds:,.0f} steps/s" if steps else "no answer yet"
        if latency:
            p50, p99 = np.quantile(latency, [0.5, 0.99]) * 1000
            told += f", newest: p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        self._progress.update(self._task, completed=seconds, description=told)


def summarize(result: Result) -> dict[str, Any]:
    """Return the figures as plain data, for `--json`."""
    return dict(
        **result.options._asdict(),
        measured_seconds=result.seconds,
        requests=len(result.latency),
        steps=result.steps,
        steps_per_second=result.steps / result.seconds,
        latency_ms=quantiles(result.latency),
        lateness_ms=quantiles(result.lateness),
        unanswered_steps=result.unanswered,
        refused=result.refused,
        lost_streams=result.lost,
        checked_steps=result.checked,
        wrong_steps=result.wrong,
        first_wrong=result.first_wrong,
        largest_difference=result.difference,
        cores=result.core,
        interrupted=result.interrupted,
    )


def describe(options: Options) -> str:
    """Return what is sent, as a sentence."""
    rate = f"{options.rate:g} steps/s each" if options.rate else "as fast as answers come"
    return (
        f"{options.streams:,} streams, {rate}, in requests of {options.rows:,}, "
        f"for {options.seconds:g} s"
    )


def table(result: Result) -> Table:
    """Return the figures as a `rich.table.Table`."""
    made = Table(
        show_header=False,
        title=describe(result.options) + (", interrupted" if result.interrupted else ""),
        caption="Latency counts from when a request was due"
        if result.options.rate
        else "Latency counts from when the answer before was there",
    )
    made.add_column("")
    made.add_column("", justify="right")
    made.add_row("steps a second", f"{result.steps / result.seconds:,.0f}")
    made.add_row("requests answered", f"{len(result.latency):,}")
    for name, value in quantiles(result.latency).items():
        made.add_row(f"latency, {name}", f"{value:.2f} ms")
    made.add_section()
    made.add_row("steps due, but not answered in time", f"{result.unanswered:,}")
    for reason, count in sorted(result.refused.items()):
        made.add_row(f"requests refused: {reason}", f"{count:,}")
    if not result.refused:
        made.add_row("requests refused", "0")
    if result.lost:
        made.add_row("streams lost", f"[red]{result.lost:,}")
    made.add_row("answers compared with ct.Session", f"{result.checked:,}")
    made.add_row(f"answers that differ by more than {result.tolerance:g}", _red(result.wrong))
    made.add_row("largest difference", f"{result.difference:.1e}")
    made.add_section()
    if result.lateness.size:
        late = quantiles(result.lateness)["p99"]
        made.add_row("this program sent late, p99", f"{late:.2f} ms")
    made.add_row("this program's part of a core", f"{result.core:.0%}")
    return made


def _red(count: int) -> str:
    return f"[red]{count:,}" if count else "0"


def draw(path: Path, result: Result) -> None:
    """Draw the latency's distribution, and its history.

    Args:
        path: The path of the PNG file.
        result: What was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    distribution, history = figure.subplots(1, 2)
    milliseconds = np.sort(result.latency) * 1000
    slower = 1 - np.arange(len(milliseconds)) / max(1, len(milliseconds))
    distribution.step(milliseconds, slower, where="post", color="#4e79a7")
    for name, value in quantiles(result.latency).items():
        share = 0.0 if name == "max" else 1 - float(name[1:]) / 100
        if share * len(milliseconds) >= 1:
            distribution.plot(value, share, "o", color="#4e79a7", markersize=4)
            distribution.annotate(
                f"{name} {value:.2f} ms", (value, share), (6, 4), textcoords="offset points"
            )
    distribution.set(
        xscale="log",
        yscale="log",
        xlabel="latency, ms",
        ylabel="share of requests that took longer",
    )
    distribution.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if milliseconds.size:
        distribution.set_xlim(milliseconds[0] * 0.9, milliseconds[-1] * 2)
    every = max(1, len(milliseconds) // MOST_POINTS)
    history.plot(
        result.answered_at[::every],
        result.latency[::every] * 1000,
        ".",
        markersize=2,
        color="#4e79a7",
        rasterized=True,
    )
    history.set(yscale="log", xlabel="seconds", ylabel="latency, ms", xlim=(0, result.seconds))
    for axes, axis in ((distribution, distribution.xaxis), (history, history.yaxis)):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(StrMethodFormatter(""))
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(
        f"{describe(result.options)}: {result.steps / result.seconds:,.0f} steps/s, "
        f"{result.wrong:,} of {result.checked:,} checked answers wrong"
    )
    figure.savefig(path, dpi=110)
