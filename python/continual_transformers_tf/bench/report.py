"""The report of the races: what the command prints, the picture, and the page of the docs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench import layer_report, model_report, session_goals
from continual_transformers_tf.bench.goal import markdown_table
from continual_transformers_tf.bench.sizes import ModelSize

if TYPE_CHECKING:
    from pathlib import Path

    import rich.table

# The parts of the results that ran on AVX2, on a machine that has more.
AVX2_MODELS, AVX2_LAYERS = "models_avx2", "layers_avx2"


def tables(found: dict[str, Any]) -> list[rich.table.Table]:
    """Return the tables to print, as a list of rich.table.Table.

    Args:
        found: A dict with any of "models", the result of `model_race.run`; "session", of
            `session_goals.run`; "layers", of `race.run`; and AVX2_MODELS and AVX2_LAYERS, of the
            same functions with the target AVX2.
    """
    made: list[rich.table.Table | None] = []
    if "models" in found:
        models = found["models"]
        made += [model_report.table(models, count) for count in layer_report.thread_counts(models)]
        made.append(model_report.goals_table(models))
    if "session" in found:
        made.append(session_goals.table(found["session"]))
    if "layers" in found:
        layers = found["layers"]
        made += [layer_report.table(layers, count) for count in layer_report.thread_counts(layers)]
        made.append(layer_report.goals_table(layers))
    for part, goals_table in (
        (AVX2_MODELS, model_report.goals_table),
        (AVX2_LAYERS, layer_report.goals_table),
    ):
        if part in found and (one := goals_table(found[part])) is not None:
            one.title = f"{one.title}, on AVX2"
            made.append(one)
    return [one for one in made if one is not None]


def markdown(found: dict[str, Any]) -> str:
    """Return all of docs/benchmarks.md. The argument is the same as for `tables`."""
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for name, part in found.items():
        if name not in (AVX2_MODELS, AVX2_LAYERS):
            machine.update(part["machine"])
            versions.update(part["versions"])
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`continual-transformers bench --markdown docs/benchmarks.md`): "
        "do not edit. Every rival has its own process. In each round they are timed one after "
        "another. Absolute times are of that machine on that day: only the ratios count. A ratio "
        "is the median of the ratios of all rounds.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in sorted(versions.items())) + ".",
        "",
        "![whole models; latency against the window, and against streams](benchmarks.png)",
    ]
    if AVX2_MODELS in found or AVX2_LAYERS in found:
        lines += [
            "",
            'The columns "on AVX2" are of a second run on the same machine, with '
            "`CONTINUAL_TRANSFORMERS_TARGET=avx2` and without rivals. The bound is measured with "
            "AVX2 too.",
        ]
    if "models" in found:
        lines += model_report.markdown_lines(found["models"], found.get(AVX2_MODELS))
    if "session" in found:
        lines += _session_lines(found["session"])
    if "layers" in found:
        lines += layer_report.markdown_lines(found["layers"], found.get(AVX2_LAYERS))
    return "\n".join(lines) + "\n"


def _session_lines(found: dict[str, Any]) -> list[str]:
    size = ModelSize(**found["size"])
    lines = [
        "",
        "## A session in C++",
        "",
        f"The model is {size}. `make bench-session` measures it.",
        "",
    ]
    goals = [goal.cells() for goal in session_goals.goals(found)]
    return lines + markdown_table(["", "goal", "measured", ""], goals)


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
            layer_report.draw(part, found[name])
    figure.savefig(path, dpi=110)
    plt.close(figure)
