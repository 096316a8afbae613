"""`continual-transformers load`: a load test of a server."""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from continual_transformers_tf.commands import common

if TYPE_CHECKING:
    from continual_transformers_tf.serving.load import Result


@click.command(
    short_help="Measure how fast and right a server answers.",
    epilog=common.example(
        "load --streams 1000 --rate 10 --seconds 10",
        "load --url HOST:8001 --model-file my.safetensors --data x.npy",
    ),
)
@click.option(
    "--streams",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="How many streams there are.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Steps a second of each stream; 0: the next step as soon as the last one is answered.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many streams a request has.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1, max=86400),
    default=10.0,
    show_default=True,
    help="How long. Then the answers are checked.",
)
@click.option(
    "--url",
    metavar="HOST:PORT",
    help="The server's gRPC port.  [default: a server that is started for this]",
)
@click.option(
    "--ca", type=common.FILE, metavar="FILE", help="PEM file of its authority; turns TLS on."
)
@click.option(
    "--certificate", type=common.FILE, metavar="FILE", help="PEM file, to show to the server."
)
@click.option("--key", type=common.FILE, metavar="FILE", help="Its key, a PEM file.")
@click.option("--token-file", type=common.FILE, metavar="FILE", help="The server's token.")
@click.option("--model", metavar="NAME", help="Its name on the server.  [default: the only one]")
@click.option(
    "--model-file",
    type=common.FILE,
    metavar="FILE",
    help="The model file that is served, with which answers are compared.  [default: the demo's]",
)
@click.option(
    "--data",
    type=common.FILE,
    metavar="FILE",
    help="The recordings to send (.npy, or .npz for several inputs).  [default: the demo's, or "
    "random numbers if the model does not take these]",
)
@click.option(
    "--picture", type=common.NEW_FILE, metavar="FILE", help="Draw the latency's distribution."
)
@common.as_json
def load(
    streams: int,
    rate: float,
    rows: int,
    seconds: float,
    url: str | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
    model: str | None,
    model_file: Path | None,
    data: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Stream recordings to a server, and measure how fast and right it answers.

    Without --model-file these are a smartwatch's, and the model is the demo's.

    The exit status is 1 if an answer is wrong, or if a stream could not go on.
    """
    of_server = {"--ca": ca, "--certificate": certificate, "--key": key, "--token-file": token_file}
    for name, file in of_server.items():
        if file and url is None:
            raise click.UsageError(f"{name} is for a server that runs: --url is missing")
    common.need("demo", "client")
    import rich.console

    from continual_transformers_tf.serving import Client, ServingError, load_report, program
    from continual_transformers_tf.serving.channels import Access
    from continual_transformers_tf.serving.load import CONNECT_SECONDS, Load, Options

    notes = common.notes()
    options = Options(streams, rate, rows, seconds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(common.sentences())
        try:
            token = token_in(token_file)
            access = Access(token, ca, certificate, key)
            if model_file is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                with notes.status("Making the demo's model file ..."):
                    model_file = demo_model_file(Path(folder))
            if url is None:
                url = stack.enter_context(program.LocalServer(model_file)).url
            with Client(
                url,
                model,
                token=token,
                ca=ca,
                certificate=certificate,
                key=key,
                timeout=CONNECT_SECONDS,
            ) as client:
                model = client.model
            notes.print(f"To {model} at {url}: {load_report.describe(options)}")
            line = stack.enter_context(load_report.LiveLine(notes, seconds))
            result = Load(url, model, model_file, options, line, access, data).run()
        except ServingError as error:
            raise click.ClickException(str(error)) from error
    if picture:
        with common.sentences():
            picture.parent.mkdir(parents=True, exist_ok=True)
            load_report.draw(picture, result)
    if as_json:
        common.print_json(load_report.summarize(result))
    else:
        rich.console.Console().print(load_report.table(result))
    fail_unless_right(result, url)


def token_in(file: Path | None) -> str | None:
    """Return the token in a file, as the server reads it. No file: None."""
    if file is None:
        return None
    token = file.read_text().rstrip()
    if not token:
        raise click.ClickException(f"the token file {file} is empty")
    return token


def demo_model_file(folder: Path) -> Path:
    """Write the demo's model file into a folder, and return its path.

    Another process does it, so that TensorFlow is not in this one.
    """
    path = folder / "watch.safetensors"
    program = [sys.executable, "-m", "continual_transformers_tf.cli", "demo"]
    done = subprocess.run([*program, "--save-model", path], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise click.ClickException(
            f"the demo's model file could not be made: {said[-1].removeprefix('Error: ')}"
        )
    return path


def fail_unless_right(result: "Result", url: str) -> None:
    """End the command with a sentence if a load test found something wrong."""
    if result.refused.get("wrong_server"):
        raise click.ClickException(
            f"{url} is one of several servers that share the streams, and this program sends them "
            "all to one server: load a server without --sharded"
        )
    if not result.checked:
        raise click.ClickException(
            f"no request was answered; refused: {result.refused}. {result.first_refused}"
        )
    if result.wrong:
        raise click.ClickException(
            f"{result.wrong} of {result.checked} answers are wrong. {result.first_wrong}"
        )
    if result.lost:
        raise click.ClickException(f"{result.lost} streams could not go on")
