"""Time a step of the models of examples/models against its bound, and of layers against JAX.

    make bench-examples

The first table has a session's step, from Python and in C++, and its bound, as docs/benchmarks.md
defines it. The second one has the same figures for the stacks of `layer_stacks.py`, and a step of
the same layers in Google's sequence-layers under `jax.jit`. Every contestant has its own process,
takes the same steps with one thread, and is timed in turn in each round. Before that its outputs
are compared. The third table says which instructions of a step take longer than their bound. There
the parts are timed one by one, so together they take a little more than the bound of the step.

It needs the packages of the extra "bench", and the programs of tools/build_benchmarks.py.
"""

import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import click
import numpy as np
import rich.console
import rich.progress

import layer_stacks
from continual_transformers_tf.bench import goal
from continual_transformers_tf.bench import rounds as timing
from continual_transformers_tf.bench.goal import Goal
from continual_transformers_tf.bench.model_race import PROGRAM
from continual_transformers_tf.bench.model_rivals import TOLERANCE
from continual_transformers_tf.bench.worker_process import Rival, machine, missing_program, reason
from example_worker import STEPS

EXAMPLES = ("watch", "decoder", "keyword_spotter", "oad_tr", "conformer")
CONTESTANTS = ("session", "session_cpp", "bound", "sequence_layers")
NATIVE = ("session_cpp", "bound")
BOUND_GOAL, RIVAL_GOAL = 1.25, 5
WORKER = [sys.executable, str(Path(__file__).with_name("example_worker.py"))]
SHOWN = 0.03  # Instructions that take less of a step than this are shown together.


class Race:
    """The processes of all contestants.

    Args:
        programs: The folder of the C++ programs.
        rounds: How many rounds.
        seconds: How long a contestant is timed in a round.
    """

    def __init__(self, programs, rounds, seconds):
        program = Path(programs) / PROGRAM
        problem = missing_program(program)
        if problem:
            raise click.ClickException(f"there is no {problem['missing']}")
        self._rounds, self._burst = rounds, dict(seconds=seconds, least=3)
        self._profiles = dict(times=max(3, 3 * rounds), repeat=20)
        self._packer = Rival("packer", 1, WORKER)
        self._rivals = {
            name: Rival(name, 1, [str(program)] if name in NATIVE else WORKER)
            for name in CONTESTANTS
        }

    def of_model(self, model, progress):
        """Return the figures of each contestant, and a list of rows (op, microseconds, bound)."""
        with tempfile.TemporaryDirectory() as folder:
            packed = _answer(self._packer, "pack", model=model, directory=folder)
            names = [
                name
                for name in CONTESTANTS
                if name != "sequence_layers" or model in layer_stacks.STACKS
            ]
            for name in names:
                progress(f"{model}, {name} gets ready")
                self._prepare(name, model, folder, packed)
        problems = {}
        ready = {name: self._rivals[name] for name in names}
        figures = timing.take(
            ready, self._rounds, self._burst, lambda name: progress(f"{model}, {name}"), problems
        )
        for name, answer in problems.items():
            raise click.ClickException(f"{model}, {name}: {reason(answer)}")
        times = _answer(ready["session"], "profile", **self._profiles)["microseconds"]
        bounds = iter(_answer(ready["bound"], "burst", **self._burst)["parts"])
        rows = [
            (op, time, sum(next(bounds) for _ in parts))
            for op, time, parts in zip(packed["ops"], times, packed["parts"], strict=True)
        ]
        return figures, rows

    def _prepare(self, name, model, folder, packed):
        rival = self._rivals[name]
        if name == "bound":
            parts = [part for instruction in packed["parts"] for part in instruction]
            _answer(rival, "prepare_parts", parts=parts)
            return
        if name == "session_cpp":
            step = int(np.prod(packed["shape"]))
            _answer(rival, "prepare_file", directory=folder, step=step)
        else:
            arguments = {key: packed[key] for key in ("shape", "dtype")}
            _answer(rival, "prepare", model=model, directory=folder, **arguments)
        outputs = _answer(rival, "steps", steps=STEPS)["outputs"]
        problem = problem_of(outputs, packed["outputs"])
        if problem:
            raise click.ClickException(f"{model}, {name}: {problem}")

    def versions(self):
        """Return the installed versions of the packages that contestants need."""
        return _answer(self._packer, "versions")

    def stop(self):
        """End all processes."""
        for rival in (self._packer, *self._rivals.values()):
            rival.stop()


def _answer(rival, what, **arguments):
    answer = rival.ask(what, **arguments)
    if "error" in answer or "missing" in answer:
        raise click.ClickException(f"{rival.name}, {what}: {reason(answer)}")
    return answer


def problem_of(outputs, expected):
    """Return what is wrong with a contestant's outputs, or None."""
    got, expected = np.array(outputs), np.array(expected)
    if got.shape != expected.shape:
        return f"got {got.size} outputs, expected {expected.size}"
    error = np.abs(got - expected).max() / np.abs(expected).max()
    if error < TOLERANCE:  # False for NaN.
        return None
    return f"got outputs with an error of {error:.2g}, expected at most {TOLERANCE:g}"


def goals_of(results):
    """Return the goals that were measured: a list of (model, Goal)."""
    found = []
    for model, (figures, _) in results.items():
        over_bound = timing.ratio(figures, "session_cpp", "bound")
        what = "`session_cpp` over `bound`"
        found.append((model, Goal(what, BOUND_GOAL, over_bound, False, "×")))
        if "sequence_layers" in figures:
            over_session = timing.ratio(figures, "sequence_layers", "session")
            what = "`sequence_layers` over `session`"
            found.append((model, Goal(what, RIVAL_GOAL, over_session, True, "×")))
    return found


def times_lines(results):
    """Return a table of the medians and the spread, in microseconds."""
    names = [name for name in CONTESTANTS if any(name in f for f, _ in results.values())]
    body = []
    for model, (figures, _) in results.items():
        cells = [
            f"{f['median']:.3g} [{f['least']:.3g}–{f['most']:.3g}]" if f else ""
            for f in (figures.get(name) for name in names)
        ]
        body.append([model, *cells])
    return goal.markdown_table(["model", *(f"`{name}`" for name in names)], body)


def parts_lines(results):
    """Return a table of the instructions of a step, those that cost most over the bound first."""
    head = ["model", "instructions", "how many", "µs", "bound", "over the bound, share of a step"]
    body = []
    for model, (_, rows) in results.items():
        step = sum(time for _, time, _ in rows)
        for name, count, time, bound in by_op(rows, SHOWN * step):
            over = f"{(time - bound) / step:.0%}"
            body.append([model, name, f"{count}", f"{time:.3g}", f"{bound:.3g}", over])
    return goal.markdown_table(head, body)


def by_op(rows, least):
    """Return (op, how many, microseconds, bound) of instructions of one op, most over bound first.

    Args:
        rows: A list of (op, microseconds, bound), one for each instruction.
        least: Ops that take fewer microseconds together are "others", which come last.
    """
    sums = defaultdict(lambda: [0, 0.0, 0.0])
    for op, time, bound in rows:
        for i, number in enumerate((1, time, bound)):
            sums[op][i] += number
    shown = [(op, *numbers) for op, numbers in sums.items() if numbers[1] >= least]
    shown.sort(key=lambda row: row[3] - row[2])
    small = [numbers for numbers in sums.values() if numbers[1] < least]
    others = [("others", *(sum(column) for column in zip(*small, strict=True)))] if small else []
    return shown + others


@click.command()
@click.option("--only", multiple=True, type=click.Choice((*EXAMPLES, *layer_stacks.STACKS)))
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--seconds", default=0.15, show_default=True, help="Time for each in a round.")
@click.option("--programs", default="build/bench", show_default=True, help="The C++ programs.")
def main(only, rounds, seconds, programs):
    """Measure a step of the models and the stacks, and print the tables in Markdown."""
    models = [name for name in (*EXAMPLES, *layer_stacks.STACKS) if not only or name in only]
    race = Race(programs, rounds, seconds)
    results = {}
    try:
        with rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(models))
            for model in models:
                results[model] = race.of_model(model, lambda now: bar.update(task, description=now))
                bar.advance(task)
        versions = race.versions()
    finally:
        race.stop()
    about = machine()
    packages = [name for name in ("jax", "sequence-layers", "keras") if name in versions]
    named = ", ".join(f"{name} {versions[name]}" for name in packages)
    print(f"{about.get('Model name', 'unknown')}, {about['instructions']}, {named}, one thread\n")
    goals = goals_of(results)
    for title, chosen in (
        ("The models of examples/models", EXAMPLES),
        ("Layers against sequence-layers", layer_stacks.STACKS),
    ):
        found = {model: results[model] for model in results if model in chosen}
        if found:
            print(f"## {title}\n")
            for name in found:
                if name in layer_stacks.STACKS:
                    print(f"- `{name}`: {layer_stacks.STACKS[name].description}.")
            print("\n".join(times_lines(found)), "\n")
            print("\n".join(goal.table_lines("model", [g for g in goals if g[0] in found])), "\n")
    print("## Where a step takes longer than its bound\n")
    print("\n".join(parts_lines(results)))


if __name__ == "__main__":
    main()
