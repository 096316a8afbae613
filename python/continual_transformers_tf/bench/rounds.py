"""The rounds of a race: contestants are timed one after the other, again and again."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from continual_transformers_tf.bench.worker_process import Rival

# The figures of a contestant at a size, all in microseconds: "median", "least" and "most" of the
# rounds, and "rounds", each of them.
Figures = dict[str, Any]


def take(
    contestants: Mapping[str, Rival],
    rounds: int,
    burst: Mapping[str, Any],
    progress: Callable[[str], None],
    problems: dict[str, dict[str, Any]],
) -> dict[str, Figures]:
    """Time contestants that are ready, in turn.

    Args:
        contestants: Their processes, by name.
        rounds: How many rounds.
        burst: The arguments of a worker's `burst`.
        progress: A function that is called with the name of the contestant that comes now.
        problems: A dict to which the answers of contestants that fail are added. They drop out.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in list(times):
            progress(name)
            answer = contestants[name].ask("burst", **burst)
            if "median" in answer:
                times[name].append(answer["median"])
            else:
                problems[name] = answer
                del times[name]
    return {name: figures(found) for name, found in times.items()}


def figures(times: list[float]) -> Figures:
    """Return the figures of a contestant, from the microseconds of each round."""
    return {
        "median": statistics.median(times),
        "least": min(times),
        "most": max(times),
        "rounds": times,
    }


def ratio(rivals: Mapping[str, Figures], one: str, other: str) -> float:
    """Return how many times as long a contestant takes as another.

    It is the median of the ratios of all rounds. A machine's speed changes from round to round by
    more than within one, so this is steadier than the ratio of the medians.
    """
    pairs = zip(rivals[one]["rounds"], rivals[other]["rounds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def alternating(one: Rival, other: Rival, seconds: float, pairs: int) -> list[tuple[float, float]]:
    """Time two contestants in turn, each first in half of the pairs. Return the medians."""
    found = []
    for i in range(pairs):
        first, second = (one, other) if i % 2 == 0 else (other, one)
        times = [
            rival.ask("burst", seconds=seconds, least=2)["median"] for rival in (first, second)
        ]
        found.append((times[0], times[1]) if i % 2 == 0 else (times[1], times[0]))
    return found


def speedup(one_thread: Rival, two_threads: Rival, quick: bool) -> float:
    """Return how many times as fast a step with two threads is as with one."""
    pairs = alternating(one_thread, two_threads, 0.005 if quick else 0.05, 2 if quick else 15)
    return statistics.median(one / two for one, two in pairs)
