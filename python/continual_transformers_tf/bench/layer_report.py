"""The report of the race of layers: tables, the goals, and their section in the docs."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench import goal as goals
from continual_transformers_tf.bench.goal import Goal, NamedGoal, markdown_table
from continual_transformers_tf.bench.rivals import (
    DESCRIPTIONS,
    MODULES,
    RETROACTIVE,
    RETROACTIVE_DESCRIPTIONS,
)
from continual_transformers_tf.bench.rounds import Figures, ratio
from continual_transformers_tf.bench.sizes import (
    ATTENTION_GOAL,
    NARROW_GOALS,
    RETROACTIVE_GOALS,
    RIVALS_TO_BEAT,
    THREADS_GOAL,
    THREADS_GOAL_FROM,
    AttentionSize,
    Size,
    bound_goal,
    has_narrow_goals,
    rival_goal,
)
from continual_transformers_tf.bench.worker_process import missing_lines

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import FigureBase

OURS, BOUND = "session", "bound"


def rows(
    found: dict[str, Any], part: str = "table", threads: int = 1
) -> list[tuple[Size, dict[str, Figures]]]:
    """Return the results of a part: a list of (Size, dict from rival to its figures)."""
    return [
        (Size(**entry["size"]), entry["rivals"])
        for entry in found["results"]
        if entry["part"] == part and entry["threads"] == threads
    ]


def thread_counts(found: dict[str, Any]) -> list[int]:
    """Return with how many threads the race was run."""
    return sorted({entry["threads"] for entry in found["results"]})


def check_goals(found: dict[str, Any]) -> list[NamedGoal]:
    """Return every goal of the layer's step that was measured."""
    speedups = {
        Size(**entry["size"]): entry["speedup"]
        for entry in found["results"]
        if "speedup" in entry and entry["size"]["streams"] >= THREADS_GOAL_FROM
    }
    checked = []
    for size, rivals in rows(found):
        named = [*_bound_and_rival_goals(size, rivals), *_narrow_goals(size, rivals)]
        if size in speedups:
            what = f"`{OURS}`, two threads over one"
            named.append(Goal(what, THREADS_GOAL, speedups[size], True, "×"))
        checked += [(str(size), goal) for goal in named]
    return checked


def _bound_and_rival_goals(size: Size, rivals: dict[str, Figures]) -> list[Goal]:
    if not {OURS, BOUND} <= {*rivals}:
        return []
    found = []
    at_most = bound_goal(size)
    if at_most is not None:
        what = f"`{OURS}` over `{BOUND}`"
        found.append(Goal(what, at_most, ratio(rivals, OURS, BOUND), False, "×"))
    for rival in RIVALS_TO_BEAT:
        if rival in rivals:
            possible = ratio(rivals, rival, BOUND)
            measured = ratio(rivals, rival, OURS)
            what, detail = f"`{rival}` over `{OURS}`", f"{possible:.3g}× over `{BOUND}`"
            found.append(Goal(what, rival_goal(possible), measured, True, "×", detail))
    return found


def _narrow_goals(size: Size, rivals: dict[str, Figures]) -> list[Goal]:
    if not has_narrow_goals(size):
        return []
    return [
        Goal(f"`{name}` over `{OURS}`", at_most, ratio(rivals, name, OURS), False, "×")
        for name, at_most in NARROW_GOALS.items()
        if {name, OURS} <= {*rivals}
    ]


def check_retroactive_goals(found: dict[str, Any]) -> list[NamedGoal]:
    """Return every goal of the retroactive layer that was measured."""
    ours = "retroactive_session"
    checked = []
    for size, rivals in rows(found, "retroactive"):
        for other, limit in RETROACTIVE_GOALS.items():
            if not {ours, other} <= {*rivals}:
                continue
            at_least = other != "retroactive_bound"
            one, two = (other, ours) if at_least else (ours, other)
            what = f"`{one}` over `{two}`"
            checked.append((str(size), Goal(what, limit, ratio(rivals, one, two), at_least, "×")))
    return checked


def check_attention_goals(found: dict[str, Any]) -> list[NamedGoal]:
    """Return every goal of attention alone that was measured."""
    checked = []
    for entry in found.get("attention", []):
        where = "beyond the last-level cache" if entry["far"] else "in L2"
        name = f"{AttentionSize(**entry['size'])} {entry['dtype']}, {where}"
        detail = f"{_number(entry['median'])} and {_number(entry['bound'])} µs"
        goal = Goal("time over bound", ATTENTION_GOAL, entry["ratio"], False, "×", detail)
        checked.append((name, goal))
    return checked


def table(found: dict[str, Any], threads: int = 1) -> rich.table.Table:
    """Return a rich.table.Table of microseconds a step, also as multiples of ours."""
    import rich.table

    title = f"One step of the whole layer, {threads} thread(s), µs (× {OURS})"
    made = rich.table.Table("", title=title)
    sizes = rows(found, threads=threads)
    for size, _ in sizes:
        made.add_column(str(size), justify="right")
    for line in _table_body(sizes):
        made.add_row(*(cell.replace("`", "") for cell in line))
    return made


def goals_table(found: dict[str, Any]) -> rich.table.Table | None:
    """Return a rich.table.Table of all goals of layers, or None if none was measured."""
    import rich.table

    checked = check_goals(found) + check_retroactive_goals(found) + check_attention_goals(found)
    if not checked:
        return None
    made = rich.table.Table("layer", "", "goal", "measured", "", title="Goals, one thread")
    for name, goal in checked:
        made.add_row(name, *(cell.strip("*").replace("`", "") for cell in goal.cells()))
    return made


def _table_body(sizes: list[tuple[Size, dict[str, Figures]]]) -> list[list[str]]:
    return [
        [f"`{name}`", *(_cell(rivals, name) for _, rivals in sizes)]
        for name in MODULES
        if any(name in rivals for _, rivals in sizes)
    ]


def _cell(rivals: dict[str, Figures], name: str, ours: str = OURS) -> str:
    if name not in rivals:
        return ""
    text = _number(rivals[name]["median"])
    if name == ours or ours not in rivals:
        return text
    return f"{text} ({ratio(rivals, name, ours):.2g})"


def _number(microseconds: float) -> str:
    digits = 0 if microseconds >= 100 else 1 if microseconds >= 10 else 2
    return f"{microseconds:,.{digits}f}"


def markdown_lines(found: dict[str, Any], slower: dict[str, Any] | None) -> list[str]:
    """Return the lines of the sections in the docs.

    Args:
        found: The result of `race.run`.
        slower: The result with the target AVX2, or None.
    """
    lines = [
        "",
        "## The whole attention layer",
        "",
        "The tables have microseconds for one step of M streams, the median over "
        f"{found['rounds']} rounds. In brackets is how many times `{OURS}` that is. N is the "
        "window, E the number of features and H that of heads. M is 1 if it is not named. "
        "`test_every_rival_computes_the_same` checks that all rivals compute the same.",
        "",
    ]
    if found["missing"]:
        lines += missing_lines(found)
        lines.append("")
    lines += ["| rival | what it is |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, text in DESCRIPTIONS.items()]
    for count in thread_counts(found):
        sizes = rows(found, threads=count)
        if sizes:
            lines += ["", f"### {count} thread{'s'[: count > 1]}", ""]
            lines += markdown_table(["", *(str(size) for size, _ in sizes)], _table_body(sizes))
    checked = check_goals(found)
    if checked:
        lines += [
            "",
            "### Goals of the layer",
            "",
            f"With one thread, if two are not named. A rival should be behind at every size, and "
            "take at least twice as long where it takes twice the bound. How many times the bound "
            f"it takes is after the colon. {goals.summary(checked)}",
            "",
        ]
        lines += goals.table_lines("size", checked, check_goals(slower) if slower else ())
    lines += _growth_lines(found) + _memory_lines(found)
    return lines + _attention_lines(found, slower) + _retroactive_lines(found, slower)


def _growth_lines(found: dict[str, Any]) -> list[str]:
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
        lines += markdown_table(
            ["size", *(f"`{name}`" for name in names)],
            [[str(size), *(_cell(rivals, name) for name in names)] for size, rivals in sizes],
        )
    return lines


def _memory_lines(found: dict[str, Any]) -> list[str]:
    held = [entry for entry in found["memory"] if "state" in entry]
    if not held:
        return []
    what = (
        "The table has bytes: the ring by arithmetic, copies of the states of a session's streams, "
        "and the growth of the process in 200 steps."
    )
    lines = ["", "### Memory", "", what, ""]
    return lines + markdown_table(
        ["size", "ring", "state", "state / ring", "growth"],
        [
            [str(Size(**entry["size"])), f"{entry['ring']:,}", f"{entry['state']:,}",
             f"{entry['state'] / entry['ring']:.3f}", f"{entry['growth']:,}"]
            for entry in held
        ],
    )  # fmt: skip


def _attention_lines(found: dict[str, Any], slower: dict[str, Any] | None) -> list[str]:
    checked = check_attention_goals(found)
    if not checked:
        return []
    return [
        "",
        "## Attention alone",
        "",
        "A session's attention kernel (`cc/attention/ring_attention.cc`) over full rings, in C++ "
        "with one thread, and its bound: the time to read the rings or to compute the "
        "multiply-adds, whichever is longer. The rings are those of one stream, or of as many "
        f"streams as fill the last-level cache twice. {goals.summary(checked)}",
        "",
        *goals.table_lines("rings", checked, check_attention_goals(slower) if slower else ()),
    ]


def _retroactive_lines(found: dict[str, Any], slower: dict[str, Any] | None) -> list[str]:
    sizes = rows(found, "retroactive")
    if not sizes:
        return []
    ours = "retroactive_session"
    lines = [
        "",
        "## The retroactive layer",
        "",
        "One step, which returns the newest outputs of all N steps of the window. The tables are "
        "as above.",
        "",
        "| rival | what it is |",
        "| --- | --- |",
        *(f"| `{name}` | {text} |" for name, text in RETROACTIVE_DESCRIPTIONS.items()),
        "",
        *markdown_table(
            ["", *(str(size) for size, _ in sizes)],
            [
                [f"`{name}`", *(_cell(rivals, name, ours) for _, rivals in sizes)]
                for name in RETROACTIVE
                if any(name in rivals for _, rivals in sizes)
            ],
        ),
    ]
    checked = check_retroactive_goals(found)
    if checked:
        lines += ["", "### Goals of the retroactive layer", "", goals.summary(checked), ""]
        others = check_retroactive_goals(slower) if slower else ()
        lines += goals.table_lines("size", checked, others)
    return lines


def draw(figure: FigureBase, found: dict[str, Any]) -> None:
    """Draw the layer: its latency against window and streams, and its table."""
    import matplotlib

    colours = dict(zip(MODULES, matplotlib.color_sequences["tab20"], strict=False))
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.8])
    lines = {}
    for axis, part, letter in ((axes[0], "windows", "seq_len"), (axes[1], "streams", "streams")):
        curves = defaultdict(list)
        for size, rivals in rows(found, part):
            for name, figures in rivals.items():
                curves[name].append((getattr(size, letter), figures["median"]))
        for name, points in curves.items():
            style = "k--" if name == BOUND else "o-"
            (lines[name],) = axis.plot(
                *zip(*points, strict=True),
                style,
                label=name,
                **({} if name == BOUND else {"color": colours[name]}),
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
            color="black" if name == BOUND else colours[name],
            label=name,
        )
    axes[2].set_xticks(range(len(sizes)), [str(size) for size, _ in sizes], rotation=30, ha="right")
    axes[2].set(yscale="log", ylabel="µs a step", title="A layer: the table, one thread")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=6, frameon=False)
