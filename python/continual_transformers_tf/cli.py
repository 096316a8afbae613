"""The command line: `continual-transformers`."""

import json
from pathlib import Path

import click
import keras
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.ops import library


@click.group()
@click.version_option(package_name="continual-transformers-tf")
def main():
    """Streaming attention for TensorFlow."""


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


if __name__ == "__main__":
    main()
