"""The report of the races: tables, a picture, the goals, and the page of the docs."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench import model_report, session_goals
from continual_transformers_tf.bench.race import missing_lines
from continual_transformers_tf.bench.rivals import DESCRIPTIONS, MODULES
from continual_transformers_tf.bench.sizes import ModelSize, Size, goals

if TYPE_CHECKING:
    from pathlib import Path

    import rich.table
    from matplotlib.figure import FigureBase

# The goal for an eager step of the layer, for E from BOUND_FROM on: at most this many times its
# read bound, plus one op dispatch.
BOUND_GOAL, BOUND_FROM = 1.5, 512


def rows(
    found: dict[str, Any], part: str = "table", threads: int = 1
) -> list[tuple[Size, dict[str, dict[str, float]]]]:
    """Return the results of a part: a list of (Size, dict from rival to its figures)."""
    return [
        (Size(**entry["size"]), entry["rivals"])
        for entry in found["results"]
        if entry["part"] == part and entry["threads"] == threads
    ]


def check_goals(found: dict[str, Any]) -> list[tuple[Size, str, float, float]]:
    """Return every goal against a rival that was measured.

    Returns:
        A list of (Size, rival, goal, measured): how many times faster ours should be, and is.
    """
    checked = []
    for size, rivals in rows(found):
        for rival, goal in goals(size).items():
            if rival in rivals and "ours" in rivals:
                ratio = rivals[rival]["median"] / rivals["ours"]["median"]
                checked.append((size, rival, goal, ratio))
    return checked


def table(found: dict[str, Any], threads: int = 1) -> rich.table.Table:
    """Return a rich.table.Table of microseconds a step, also as multiples of ours."""
    import rich.table

    made = rich.table.Table(title=f"One step of the whole layer, {threads} thread(s), µs (× ours)")
    made.add_column("")
    sizes = rows(found, threads=threads)
    for size, _ in sizes:
        made.add_column(str(size), justify="right")
    for name in MODULES:
        if any(name in rivals for _, rivals in sizes):
            made.add_row(name, *(_cell(rivals, name) for _, rivals in sizes))
    return made


def _cell(rivals: dict[str, dict[str, float]], name: str) -> str:
    if name not in rivals:
        return ""
    median = rivals[name]["median"]
    text = f"{median:.1f}" if median < 100 else f"{median:,.0f}"
    ours = rivals.get("ours")
    return text if name == "ours" or not ours else f"{text} ({median / ours['median']:.2g})"


def tables(found: dict[str, Any]) -> list[rich.table.Table]:
    """Return the tables to print, as a list of rich.table.Table.

    Args:
        found: A dict with any of "models", the result of `model_race.run`; "session", of
            `session_goals.run`; and "layers", of `race.run`.
    """
    made: list[rich.table.Table | None] = []
    if "models" in found:
        models = found["models"]
        made += [model_report.table(models, count) for count in _threads(models)]
        made.append(model_report.goals_table(models))
    if "session" in found:
        made.append(session_goals.table(found["session"]))
    if "layers" in found:
        made += [table(found["layers"], count) for count in _threads(found["layers"])]
    return [one for one in made if one is not None]


def _threads(part: dict[str, Any]) -> list[int]:
    return sorted({entry["threads"] for entry in part["results"]})


def markdown(found: dict[str, Any]) -> str:
    """Return all of docs/benchmarks.md. The argument is the same as for `tables`."""
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for part in found.values():
        machine.update(part["machine"])
        versions.update(part["versions"])
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`continual-transformers bench --markdown docs/benchmarks.md`): "
        "do not edit. Every rival has its own process. In each round they are timed one after "
        "another. Absolute times are of that machine on that day: only the ratios count.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in sorted(versions.items())) + ".",
        "",
        "![whole models; latency against the window, and against streams](benchmarks.png)",
    ]
    if "models" in found:
        lines += model_report.markdown_lines(found["models"])
    if "session" in found:
        lines += _session_section(found["session"])
    if "layers" in found:
        lines += _layers_section(found["layers"])
    return "\n".join(lines) + "\n"


def _session_section(found: dict[str, Any]) -> list[str]:
    size = ModelSize(**found["size"])
    lines = [
        "",
        "## A session in C++",
        "",
        f"The model is {size}. `make bench-session` measures it.",
        "",
    ]
    goals = [goal.cells() for goal in session_goals.goals(found)]
    return lines + _markdown_table(["", "goal", "measured", ""], goals)


def _layers_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## The whole attention layer",
        "",
        "The tables have microseconds for one step of M streams, the median over "
        f"{found['rounds']} rounds. In brackets is how many times `ours` that is. N is the window, "
        "E the number of features and H that of heads. M is 1 if it is not named. "
        "`test_every_rival_computes_the_same` checks that all rivals compute the same.",
        "",
    ]
    if found["missing"]:
        lines += missing_lines(found)
        lines.append("")
    lines += ["| rival | what it is |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in DESCRIPTIONS.items()]
    for count in _threads(found):
        sizes = rows(found, threads=count)
        lines += ["", f"### {count} thread{'s'[: count > 1]}", ""]
        lines += _markdown_table(
            ["", *(str(size) for size, _ in sizes)],
            [
                [f"`{name}`", *(_cell(rivals, name) for _, rivals in sizes)]
                for name in MODULES
                if any(name in rivals for _, rivals in sizes)
            ],
        )
    return lines + _goals_section(found) + _growth_section(found) + _memory_section(found)


def _goals_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "### Goals",
        "",
        "The table says how many times as fast as a rival `ours` is, with one thread. The column "
        '"a plain read" says the same of a plain read of the rings and weights in float32. No step '
        "in float32 can be faster than that.",
        "",
    ]
    figures = dict(rows(found))

    def read(size: Size, rival: str) -> str:
        bound = figures[size].get("read_bound")
        return f"{figures[size][rival]['median'] / bound['median']:.2g}×" if bound else ""

    lines += _markdown_table(
        ["size", "rival", "goal", "measured", "a plain read", ""],
        [
            [str(size), f"`{rival}`", f"{goal:g}×", f"{ratio:.2g}×",
             read(size, rival), _reached(ratio >= goal)]
            for size, rival, goal, ratio in check_goals(found)
        ],
    )  # fmt: skip
    bound = [
        (size, rivals["ours"]["median"], rivals["read_bound"]["median"])
        for size, rivals in rows(found)
        if size.features >= BOUND_FROM and size.streams == 1 and {"ours", "read_bound"} <= {*rivals}
    ]
    dispatch = dispatch_of(found)
    if not bound or dispatch is None:
        return lines
    lines += [
        "",
        f"For E ≥ {BOUND_FROM} there is also a goal against `read_bound`: at most {BOUND_GOAL} "
        "times its time, plus the time to dispatch one op. That is the time of `ours` less its "
        f"bound at the smallest window, {dispatch:.0f} µs.",
        "",
    ]
    return lines + _markdown_table(
        ["size", "µs", "bound, µs", "less the dispatch, × bound", ""],
        [
            [str(size), f"{ours:.0f}", f"{read:.0f}", f"{(ours - dispatch) / read:.2f}",
             _reached(ours - dispatch <= BOUND_GOAL * read)]
            for size, ours, read in bound
        ],
    )  # fmt: skip


def dispatch_of(found: dict[str, Any]) -> float | None:
    """Return a step's overhead in microseconds: the smallest window's time less its bound."""
    windows = rows(found, "windows")
    if not windows or not {"ours", "read_bound"} <= {*windows[0][1]}:
        return None
    rivals = windows[0][1]
    return rivals["ours"]["median"] - rivals["read_bound"]["median"]


def _growth_section(found: dict[str, Any]) -> list[str]:
    lines = []
    for part, title in (
        ("windows", "How cost grows with the window"),
        ("streams", "How cost grows with streams in one call"),
    ):
        sizes = rows(found, part)
        if not sizes:
            continue
        names = [name for name in MODULES if any(name in rivals for _, rivals in sizes)]
        lines += ["", f"### {title}", ""]
        lines += _markdown_table(
            ["size", *(f"`{name}`" for name in names)],
            [[str(size), *(_cell(rivals, name) for name in names)] for size, rivals in sizes],
        )
    return lines


def _memory_section(found: dict[str, Any]) -> list[str]:
    what = (
        "The table has bytes: the ring by arithmetic, the state that the layer has, and the growth "
        "of the process in 200 steps."
    )
    lines = ["", "### Memory", "", what, ""]
    return lines + _markdown_table(
        ["size", "ring", "state", "state / ring", "growth"],
        [
            [str(Size(**entry["size"])), f"{entry['ring']:,}", f"{entry['state']:,}",
             f"{entry['state'] / entry['ring']:.3f}", f"{entry['growth']:,}"]
            for entry in found["memory"] if "state" in entry
        ],
    )  # fmt: skip


def _reached(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def _markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draw whole models, and the layer: its latency against window and streams, and its table.

    The argument `found` is the same as for `tables`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in ("models", "layers") if name in found]
    figure = plt.figure(figsize=(18, 6 * len(shown)), layout="constrained")
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, name in zip(parts, shown, strict=True):
        if name == "models":
            model_report.draw_bars(part.subplots(), found[name])
        else:
            _draw_layers(part, found[name])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_layers(figure: FigureBase, found: dict[str, Any]) -> None:
    import matplotlib

    colours = dict(zip(MODULES, matplotlib.color_sequences["tab20"], strict=False))
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
    lines = {}
    for axis, part, letter in ((axes[0], "windows", "seq_len"), (axes[1], "streams", "streams")):
        curves = defaultdict(list)
        for size, rivals in rows(found, part):
            for name, figures in rivals.items():
                curves[name].append((getattr(size, letter), figures["median"]))
        for name, points in curves.items():
            style = "k--" if name == "read_bound" else "o-"
            (lines[name],) = axis.plot(
                *zip(*points, strict=True),
                style,
                label=name,
                **({} if name == "read_bound" else {"color": colours[name]}),
            )
        axis.set(xscale="log", yscale="log", ylabel="µs a step")
        axis.grid(alpha=0.3, which="both")
    axes[0].set(xlabel="N, steps in the window (E=128, H=4)", title="A layer: the window")
    axes[1].set(xlabel="streams in one call (N=64, E=128, H=4)", title="A layer: streams")
    sizes = rows(found)
    names = [name for name in MODULES if any(name in rivals for _, rivals in sizes)]
    width = 0.85 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [
            (x, rivals[name]["median"]) for x, (_, rivals) in enumerate(sizes) if name in rivals
        ]
        lines[name] = axes[2].bar(
            [x + (i - len(names) / 2) * width for x, _ in bars],
            [y for _, y in bars],
            width,
            color="black" if name == "read_bound" else colours[name],
            label=name,
        )
    axes[2].set_xticks(range(len(sizes)), [str(size) for size, _ in sizes], rotation=30, ha="right")
    axes[2].set(yscale="log", ylabel="µs a step", title="A layer: the table, one thread")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=6, frameon=False)
