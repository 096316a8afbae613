"""`continual-transformers demo`: a smartwatch's recordings, streamed."""

from pathlib import Path

import click

import continual_transformers_tf as ct
from continual_transformers_tf.commands import common


@click.command(
    short_help="Stream a smartwatch's recordings.", epilog=common.example("demo --recordings 2")
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="continual-transformers-demo.png",
    show_default=True,
    help="Where to write the picture of a stream.",
)
@click.option(
    "--recordings",
    type=click.IntRange(min=1),
    default=None,
    help="Stream only this many recordings of each person.  [default: all]",
)
@click.option(
    "--save-model",
    type=common.NEW_FILE,
    metavar="FILE",
    help="Only write the trained model as a model file, for ct.Session.load and the server.",
)
@common.as_json
def demo(picture: Path, recordings: int | None, save_model: Path | None, as_json: bool) -> None:
    """Stream a smartwatch, worn by people the model never saw, through a trained transformer.

    The exit status is 1 if a prediction differs from that on windows.
    """
    if save_model:
        common.need("cpu")
        with common.sentences():
            from continual_transformers_tf.demo.model import trained_model

            save_model.parent.mkdir(parents=True, exist_ok=True)
            ct.Session(trained_model()).save(save_model)
        if as_json:
            common.print_json({"written": str(save_model), "bytes": save_model.stat().st_size})
        return
    common.need("demo", "cpu")
    import rich.console

    with common.sentences():
        from continual_transformers_tf.demo import report, stream, watch
        from continual_transformers_tf.demo.model import trained_model

        notes = common.notes()
        notes.print("Loading the watch's recordings and the trained model ...")
        people = stream.wearers_of(watch.load_recordings(watch.HELD_OUT))
        people = [person._replace(recordings=person.recordings[:recordings]) for person in people]
        steps = sum(len(r.samples) for person in people for r in person.recordings)
        model = trained_model()
        notes.print(report.legend())
        with report.LiveLine(notes, steps) as line:
            result = stream.stream(model, people, on_step=line)
            line.finish()
        with notes.status("Computing every window of the same recordings again, to compare ..."):
            window_predictions = stream.on_windows(model, people)
        summary = report.summarize(people, result, window_predictions)
        picture.parent.mkdir(parents=True, exist_ok=True)
        report.draw(picture, people[0], result.predictions[0])
    if as_json:
        common.print_json({**summary, "picture": str(picture.resolve())})
    else:
        console = rich.console.Console()
        console.print(report.table(summary))
        console.print(f"The stream of person {people[0].subject}, drawn: {picture.resolve()}")
    if summary["disagreements"]:
        raise click.ClickException(
            f"{summary['disagreements']} predictions of the stream differ from those on windows"
        )
