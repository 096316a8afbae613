"""The command `continual-transformers bench`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from continual_transformers_tf.commands import common


@click.command(
    short_help="Race against every other way to take a step.",
    epilog=common.example("bench --models --threads 1 --rounds 3"),
)
@click.option("--models", "parts", flag_value="models", multiple=True, help="Race whole models.")
@click.option(
    "--session", "parts", flag_value="session", multiple=True, help="Measure a session in C++."
)
@click.option(
    "--layers", "parts", flag_value="layers", multiple=True, help="Race the attention layer."
)
@click.option(
    "--avx2",
    is_flag=True,
    help="Also measure what has goals on AVX2, if this machine has more.",
)
@click.option("--quick", is_flag=True, help="Run tiny sizes for a moment, to see that it works.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often each rival is timed.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="How many threads each rival may use.",
)
@click.option(
    "--only", multiple=True, metavar="RIVAL", help="Which rivals take part.  [default: all]"
)
@click.option(
    "--programs",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/bench",
    show_default=True,
    help="Where tools/build_benchmarks.py has built the C++ programs.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Where to write all results as JSON; -: to stdout, and the tables to stderr.",
)
@click.option(
    "--from-json",
    type=common.FILE,
    metavar="FILE",
    help="Report the results in this file. Only parts that are named run again.",
)
@click.option("--picture", type=common.NEW_FILE, metavar="FILE", help="Where to draw the picture.")
@click.option(
    "--headline", type=common.NEW_FILE, metavar="FILE", help="Where to draw the README's picture."
)
@click.option(
    "--markdown", type=common.NEW_FILE, metavar="FILE", help="Where to write the page of the docs."
)
def bench(
    parts: tuple[str, ...],
    avx2: bool,
    quick: bool,
    rounds: int,
    threads: tuple[int, ...],
    only: tuple[str, ...],
    programs: Path,
    json_path: Path | None,
    from_json: Path | None,
    picture: Path | None,
    headline: Path | None,
    markdown: Path | None,
) -> None:
    """Race whole models and whole attention layers against every other way to take a step.

    Without --models, --session or --layers, all three run.
    """
    common.need("bench", "cpu")
    import rich.console

    from continual_transformers_tf.bench import headline as headlines
    from continual_transformers_tf.bench import model_race, race, report, session_goals
    from continual_transformers_tf.bench.model_rivals import MODEL_MODULES
    from continual_transformers_tf.bench.rivals import MODULES, RETROACTIVE
    from continual_transformers_tf.bench.worker_process import reason
    from continual_transformers_tf.native import cpu_targets

    if not parts and not from_json:
        parts = ("models", "session", "layers")
    taking_part = {}
    if "models" in parts:
        taking_part.update(MODEL_MODULES)
    if "layers" in parts:
        taking_part.update({**MODULES, **RETROACTIVE, "attention": "native"})
    if headline and "models" not in parts and not from_json:
        raise click.BadParameter("--headline shows whole models: add --models")
    unknown = set(only) - set(taking_part)
    if unknown:
        raise click.BadParameter(
            f"got {', '.join(sorted(unknown))}, expected any of {', '.join(taking_part)}"
        )
    found = _results_in(from_json) if from_json else {}
    if avx2 and not cpu_targets()[1].startswith("AVX3"):
        click.echo("--avx2 changes nothing: the kernels use no more than AVX2 already.", err=True)
        avx2 = False
    arguments = (threads, rounds, quick, only, programs)
    if "models" in parts:
        found["models"] = _with_progress(model_race.run, *arguments)
    if "session" in parts:
        found["session"] = session_goals.run(quick, programs)
    if "layers" in parts:
        found["layers"] = _with_progress(race.run, *arguments)
    if avx2 and "models" in parts:
        found[report.AVX2_MODELS] = _with_progress(model_race.run, *arguments, target="avx2")
    if avx2 and "layers" in parts:
        found[report.AVX2_LAYERS] = _with_progress(race.run, *arguments, target="avx2")
    on_stdout = json_path is not None and str(json_path) == "-"
    stream = sys.stderr if on_stdout else sys.stdout
    console = rich.console.Console(stderr=on_stdout, width=None if stream.isatty() else 200)
    for made in report.tables(found):
        console.print(made)
    for part in found.values():
        for name, why in part["missing"].items():
            console.print(f"{name} did not take part: {reason(why)}", markup=False)
    if on_stdout:
        common.print_json(found)
        json_path = None
    for path, write in (
        (json_path, lambda path: path.write_text(json.dumps(found, indent=1) + "\n")),
        (picture, lambda path: report.draw(path, found)),
        (headline, lambda path: headlines.draw(path, found.get("models", {"results": []}))),
        (markdown, lambda path: path.write_text(report.markdown(found))),
    ):
        if path:
            with common.sentences():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            console.print(f"written: {path}")


def _results_in(path: Path) -> dict[str, Any]:
    """Return the results that an earlier run wrote."""
    with common.sentences():
        text = path.read_text(errors="replace")
        try:
            found = json.loads(text)
            if all("missing" in part for part in found.values()):
                return dict(found)
        except (AttributeError, TypeError, ValueError):
            pass
        raise ValueError(f"Expected a file that bench --json wrote, but got {path}")


def _with_progress(
    run: Callable[..., dict[str, Any]], *arguments: Any, **options: Any
) -> dict[str, Any]:
    import rich.progress

    with rich.progress.Progress(console=common.notes()) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, now: str) -> None:
            bar.update(task, completed=done, total=total, description=now)

        return run(*arguments, show, **options)
