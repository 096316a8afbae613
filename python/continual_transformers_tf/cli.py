"""The command line: `continual-transformers`."""

import json
import sys
from pathlib import Path

import click
import keras
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.ops import library

PATH = click.Path(dir_okay=False, path_type=Path)


@click.group()
@click.version_option(ct.__version__)
def main():
    """Streaming attention for TensorFlow."""
    try:
        library.backend()
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@main.command()
def info():
    """Say which kernels are loaded, and if none are, why.

    The exit status is 1 where CONTINUAL_TRANSFORMERS_BACKEND=fused asks for kernels and none are.
    """
    click.echo(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")
    click.echo(f"op library {ct.ops.LIBRARY_PATH}")
    click.echo(f"fused kernels: {', '.join(sorted(ct.ops.kernels())) or 'none'}")
    if ct.ops.kernels():
        try:
            targets, in_use = ct.ops.cpu_targets()
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"CPU instructions: {in_use} of {', '.join(targets)}")
        cuda = ct.ops.cuda_build()
        click.echo(f"CUDA: built with {cuda}" if cuda else "built without CUDA")
    if ct.ops.load_error():
        click.echo(f"the reason: {ct.ops.load_error()}")
        if library.backend() == "fused":
            raise SystemExit(1)


@main.command()
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="continual-transformers-demo.png",
    show_default=True,
    help="Where to write the picture of a stream.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, not as a table.")
@click.option(
    "--recordings",
    type=click.IntRange(min=1),
    default=None,
    help="Stream only so many recordings of each person.  [default: all]",
)
def demo(picture, as_json, recordings):
    """Stream a smartwatch, worn by people the model never saw, through a trained transformer."""
    try:
        import matplotlib  # noqa: F401
        import rich.console
    except ModuleNotFoundError as missing:
        raise click.ClickException(
            f"{missing.name} is missing: `pip install '.[demo]'` in a checkout"
        ) from missing
    from continual_transformers_tf.demo import report, stream, watch
    from continual_transformers_tf.demo.model import trained_model

    console = rich.console.Console(stderr=as_json, quiet=as_json)
    console.print("Loading the watch's recordings and the trained model ...")
    try:
        people = stream.wearers_of(watch.load_recordings(watch.HELD_OUT))
    except ModuleNotFoundError as missing:
        raise click.ClickException(str(missing)) from missing
    people = [person._replace(recordings=person.recordings[:recordings]) for person in people]
    steps = sum(len(r.samples) for person in people for r in person.recordings)
    model = trained_model()
    console.print(report.legend())
    with report.LiveLine(console, steps) as line:
        result = stream.stream(model, people, on_step=line)
        line.finish()
    with console.status("Every window of the same, computed anew, to compare ..."):
        window_predictions = stream.on_windows(model, people)
    summary = report.summarize(people, result, window_predictions)
    picture.parent.mkdir(parents=True, exist_ok=True)
    report.draw(picture, people[0], result.predictions[0])
    if as_json:
        click.echo(json.dumps({**summary, "picture": str(picture.resolve())}, indent=2))
    else:
        console.print(report.table(summary))
        console.print(f"The stream of person {people[0].subject}, drawn: {picture.resolve()}")
    if summary["disagreements"]:
        raise click.ClickException(
            f"{summary['disagreements']} predictions of the stream differ from those on windows"
        )


@main.command()
@click.option("--quick", is_flag=True, help="Tiny sizes for a moment: to see that it works.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="How many each rival may use.",
)
@click.option("--only", multiple=True, metavar="RIVAL", help="Who takes part.  [default: all]")
@click.option("--json", "json_path", type=PATH, help="Where to write everything.")
@click.option("--from-json", type=PATH, help="Report what was written there, and run nothing.")
@click.option("--picture", type=PATH, help="Where to draw it.")
@click.option("--markdown", type=PATH, help="Where to write the page of the docs.")
def bench(quick, rounds, threads, only, json_path, from_json, picture, markdown):
    """Race a step of the whole layer against every other way to take it."""
    try:
        import matplotlib  # noqa: F401
        import rich.console
        import rich.progress
    except ModuleNotFoundError as missing:
        raise click.ClickException(
            f"{missing.name} is missing: `pip install '.[bench]'` in a checkout"
        ) from missing
    from continual_transformers_tf.bench import race, report
    from continual_transformers_tf.bench.rivals import MODULES

    unknown = set(only) - set(MODULES)
    if unknown:
        raise click.BadParameter(f"expected rivals of {', '.join(MODULES)}, but got {unknown}")
    if from_json:
        found = json.loads(from_json.read_text())
    else:
        columns = (*rich.progress.Progress.get_default_columns(),)
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            found = race.run(
                threads,
                rounds,
                quick,
                only,
                lambda done, total, now: bar.update(
                    task, completed=done, total=total, description=now
                ),
            )
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    for count in sorted({entry["threads"] for entry in found["results"]}):
        console.print(report.table(found, count))
    for name, why in found["missing"].items():
        hint = ": pip install '.[bench]' in a checkout" if "missing" in why else ""
        console.print(f"{name} did not take part: {why}{hint}", markup=False)
    for path, write in (
        (json_path, lambda path: path.write_text(json.dumps(found, indent=1) + "\n")),
        (picture, lambda path: report.draw(path, found)),
        (markdown, lambda path: path.write_text(report.markdown(found))),
    ):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            console.print(f"written: {path}")


if __name__ == "__main__":
    main()
