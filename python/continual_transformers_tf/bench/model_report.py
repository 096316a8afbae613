"""The report of the race of whole models: a table, the goals, and their section in the docs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench import goal as goals_of
from continual_transformers_tf.bench.goal import Goal, NamedGoal, markdown_table
from continual_transformers_tf.bench.model_rivals import MODEL_DESCRIPTIONS, MODEL_MODULES
from continual_transformers_tf.bench.rounds import Figures, ratio
from continual_transformers_tf.bench.sizes import (
    MODEL_RIVALS_TO_BEAT,
    PYTHON_GOAL,
    THREADS_GOAL,
    THREADS_GOAL_FROM,
    ModelSize,
    model_bound_goal,
    rival_goal,
)
from continual_transformers_tf.bench.worker_process import missing_lines

if TYPE_CHECKING:
    import rich.table
    from matplotlib.axes import Axes

OURS = "session"


def rows(models: dict[str, Any], threads: int) -> list[tuple[ModelSize, dict[str, Figures]]]:
    """Return the results for a number of threads: a list of (ModelSize, {name: figures})."""
    return [
        (ModelSize(**entry["size"]), entry["rivals"])
        for entry in models["results"]
        if entry["threads"] == threads
    ]


def check_goals(models: dict[str, Any]) -> list[NamedGoal]:
    """Return every goal that was measured."""
    speedups = {
        ModelSize(**entry["size"]): entry["speedup"]
        for entry in models["results"]
        if "speedup" in entry and entry["size"]["streams"] >= THREADS_GOAL_FROM
    }
    found = []
    for entry in models["results"]:
        if entry["threads"] != 1:
            continue
        size, rivals = ModelSize(**entry["size"]), entry["rivals"]
        goals = _bound_and_rival_goals(size, rivals)
        if "python" in entry:
            what = f"`{OURS}` less `session_cpp`"
            goals.append(Goal(what, PYTHON_GOAL, entry["python"], False, " µs"))
        if size in speedups:
            what = "`session_cpp`, two threads over one"
            goals.append(Goal(what, THREADS_GOAL, speedups[size], True, "×"))
        found += [(str(size), goal) for goal in goals]
    return found


def _bound_and_rival_goals(size: ModelSize, rivals: dict[str, Figures]) -> list[Goal]:
    if "bound" not in rivals:
        return []
    found = []
    at_most = model_bound_goal(size)
    if at_most is not None and "session_cpp" in rivals:
        measured = ratio(rivals, "session_cpp", "bound")
        found.append(Goal("`session_cpp` over `bound`", at_most, measured, False, "×"))
    for rival in MODEL_RIVALS_TO_BEAT:
        if {OURS, rival} <= {*rivals}:
            possible, measured = ratio(rivals, rival, "bound"), ratio(rivals, rival, OURS)
            what, detail = f"`{rival}` over `{OURS}`", f"{possible:.3g}× over `bound`"
            found.append(Goal(what, rival_goal(possible), measured, True, "×", detail))
    return found


def table(models: dict[str, Any], threads: int) -> rich.table.Table:
    """Return a rich.table.Table of microseconds a step, also as multiples of ours."""
    import rich.table

    title = f"One step of a whole model, {threads} thread(s), µs (× {OURS})"
    made = rich.table.Table("", title=title)
    head, body = _cells(models, threads)
    for size in head:
        made.add_column(size, justify="right")
    for line in body:
        made.add_row(*line)
    return made


def goals_table(models: dict[str, Any]) -> rich.table.Table | None:
    """Return a rich.table.Table of the goals, or None if none was measured."""
    import rich.table

    goals = check_goals(models)
    if not goals:
        return None
    made = rich.table.Table("model", "", "goal", "measured", "", title="Goals, one thread")
    for size, goal in goals:
        made.add_row(size, *(cell.strip("*").replace("`", "") for cell in goal.cells()))
    return made


def _cells(models: dict[str, Any], threads: int) -> tuple[list[str], list[list[str]]]:
    sizes = rows(models, threads)
    body = [
        [name, *(_cell(rivals, name) for _, rivals in sizes)]
        for name in MODEL_MODULES
        if any(name in rivals for _, rivals in sizes)
    ]
    return [str(size) for size, _ in sizes], body


def _cell(rivals: dict[str, Figures], name: str) -> str:
    if name not in rivals:
        return ""
    median, spread = rivals[name]["median"], _spread(rivals[name])
    text = f"{number(median)}{spread}"
    if name == OURS or OURS not in rivals:
        return text
    return f"{text} ({ratio(rivals, name, OURS):.2g}×)"


def _spread(figures: Figures) -> str:
    return f" [{number(figures['least'])}–{number(figures['most'])}]"


def number(microseconds: float) -> str:
    """Format microseconds with their significant digits."""
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def markdown_lines(models: dict[str, Any], slower: dict[str, Any] | None) -> list[str]:
    """Return the lines of the section in the docs.

    Args:
        models: The result of `model_race.run`.
        slower: The result with the target AVX2, or None.
    """
    lines = [
        "",
        "## Whole models",
        "",
        "The model is dense → circular positional encoding → L encoder blocks → dense. F is the "
        "number of features of the input. E is that of the features inside, also between the two "
        "layers of the feed-forward part. N is the window, and H the number of heads. All "
        "contestants take the same steps with the same weights. Before a contestant is timed, its "
        "outputs are compared with a float64 reference.",
        "",
        "The tables have microseconds for one step of M streams: the median over "
        f"{models['rounds']} rounds, then the least and the most in square brackets. In round "
        f"brackets is how many times `{OURS}` that is.",
        "",
        "| contestant | what it is |",
        "| --- | --- |",
        *(f"| `{name}` | {text} |" for name, text in MODEL_DESCRIPTIONS.items()),
    ]
    if models["missing"]:
        lines.append("")
        lines += missing_lines(models)
    for threads in sorted({entry["threads"] for entry in models["results"]}):
        head, body = _cells(models, threads)
        lines += ["", f"### {threads} thread{'s'[: threads > 1]}", ""]
        lines += markdown_table(["", *head], [[f"`{name}`", *cells] for name, *cells in body])
    goals = check_goals(models)
    if goals:
        lines += [
            "",
            "### Goals of whole models",
            "",
            "With one thread, if two are not named. A rival should be behind at every size, and "
            "take at least twice as long where it takes twice the bound. How many times the bound "
            f"it takes is after the colon. {goals_of.summary(goals)}",
            "",
        ]
        lines += goals_of.table_lines("model", goals, check_goals(slower) if slower else ())
    return lines


def draw_bars(axis: Axes, models: dict[str, Any]) -> None:
    """Draw a bar for every contestant and size, with one thread, on a logarithmic axis."""
    import matplotlib

    sizes = rows(models, 1)
    names = [name for name in MODEL_MODULES if any(name in rivals for _, rivals in sizes)]
    width = 0.85 / max(1, len(names))
    colours = dict(zip(MODEL_MODULES, matplotlib.color_sequences["tab10"], strict=True))
    for i, name in enumerate(names):
        bars = [
            (x, rivals[name]["median"]) for x, (_, rivals) in enumerate(sizes) if name in rivals
        ]
        axis.bar(
            [x + (i - len(names) / 2) * width for x, _ in bars],
            [median for _, median in bars],
            width,
            color="black" if name == "bound" else colours[name],
            label=name,
        )
    labels = [str(size).replace(" H", "\nH") for size, _ in sizes]
    axis.set_xticks(range(len(sizes)), labels)
    axis.set(yscale="log", ylabel="µs a step", title="Whole models, one thread")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small", ncols=2)
