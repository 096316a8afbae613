"""A goal of a benchmark, and the tables of goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Goal(NamedTuple):
    """A goal and what was measured.

    Attributes:
        what: What is measured.
        goal, measured: Numbers in `unit`.
        at_least: Whether the measured number should be at least the goal. False: at most.
        unit: The text to write after a number.
        detail: The numbers that the measured one was computed from.
    """

    what: str
    goal: float
    measured: float
    at_least: bool
    unit: str
    detail: str = ""

    @property
    def reached(self) -> bool:
        """Whether the goal was reached."""
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal

    def cells(self) -> list[str]:
        """Return a table's cells: what, the goal, what was measured, whether it was reached."""
        sign = "≥" if self.at_least else "≤"
        measured = f"{self.measured:.3g}{self.unit}"
        return [
            self.what,
            f"{sign} {self.goal:g}{self.unit}",
            f"{measured}: {self.detail}" if self.detail else measured,
            "reached" if self.reached else "**not reached**",
        ]


# The name of what has a goal (a size), and the goal.
NamedGoal = tuple[str, Goal]


def table_lines(
    name: str, goals: Sequence[NamedGoal], slower: Sequence[NamedGoal] = ()
) -> list[str]:
    """Return a table of goals in Markdown.

    Args:
        name: The head of the first column.
        goals: The goals.
        slower: The same goals, or some of them, on a machine with only AVX2.
    """
    on_avx2 = {(size, goal.what): goal for size, goal in slower}
    head = [name, "", "goal", "measured", ""] + ["on AVX2", ""] * bool(slower)
    body = []
    for size, goal in goals:
        cells = [size, *goal.cells()]
        if slower:
            other = on_avx2.get((size, goal.what))
            cells += other.cells()[2:] if other else ["", ""]
        body.append(cells)
    return markdown_table(head, body)


def summary(goals: Sequence[NamedGoal]) -> str:
    """Return a sentence that says how many goals were reached."""
    reached = sum(goal.reached for _, goal in goals)
    return f"{reached} of {len(goals)} goals were reached."


def markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]
