"""The command line: `continual-transformers`.

Only the commands that need TensorFlow import it.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

import continual_transformers_tf as ct
from continual_transformers_tf import native
from continual_transformers_tf.bench.command import bench

PATH = click.Path(dir_okay=False, path_type=Path)
MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
@click.version_option(ct.__version__)
def main() -> None:
    """Streaming attention for TensorFlow."""
    try:
        native.backend()
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def need_tensorflow() -> None:
    """End the command with a message if TensorFlow or Keras is missing."""
    try:
        importlib.import_module("continual_transformers_tf._tensorflow")
    except ImportError as error:
        raise click.ClickException(str(error)) from error


def need_packages(*names: str, extra: str = "demo") -> None:
    """End the command with a message if a package of an extra is missing."""
    for name in names:
        if not importlib.util.find_spec(name):
            raise click.ClickException(
                f"{name} is missing: `pip install '.[{extra}]'` in a checkout"
            )


def token_in(file: Path | None) -> str | None:
    """Return the token in a file, as the server reads it. No file: None."""
    if file is None:
        return None
    token = file.read_text().rstrip()
    if not token:
        raise click.ClickException(f"the token file {file} is empty")
    return token


@main.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--cmake-dir", is_flag=True, help="Print the folder for CMake's find_package.")
@click.option("--pkg-config-dir", is_flag=True, help="Print the folder for PKG_CONFIG_PATH.")
def info(model: Path | None, cmake_dir: bool, pkg_config_dir: bool) -> None:
    """Print what is in a model file, or which libraries and kernels are installed.

    Without a MODEL, the exit status is 1 if CONTINUAL_TRANSFORMERS_BACKEND=fused asks for kernels
    in TensorFlow and there are none.
    """
    if cmake_dir or pkg_config_dir:
        if cmake_dir:
            click.echo(native.PACKAGE / "cmake")
        if pkg_config_dir:
            click.echo(native.PACKAGE / "pkgconfig")
    elif model:
        from continual_transformers_tf import model_file

        try:
            click.echo(model_file.describe(model))
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
    else:
        info_about_sessions()
        info_about_tensorflow()


def info_about_sessions() -> None:
    """Print the core library, and the instruction sets that it can use."""
    click.echo(f"core library {native.CORE_LIBRARY_PATH}")
    try:
        targets, in_use = native.cpu_targets()
        click.echo(f"CPU instructions: {in_use} of {', '.join(targets)}")
        click.echo("ct.Session: steps run on the CPU")
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        click.echo(f"ct.Session: none. The reason: {error}")


def info_about_tensorflow() -> None:
    """Print the versions, the op library and its kernels.

    The exit status is 1 if the kernels are required and there are none.
    """
    missing = [name for name in ("tensorflow", "keras") if not importlib.util.find_spec(name)]
    if missing:
        there_are = ", ".join(native.op_libraries()) or "none"
        names = " and ".join({"tensorflow": "TensorFlow", "keras": "Keras"}[n] for n in missing)
        click.echo(f"{names} {'are' if len(missing) > 1 else 'is'} not installed")
        click.echo(f"op libraries for TensorFlow: {there_are}")
        return
    import keras
    import tensorflow as tf

    click.echo(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")
    click.echo(f"op library {ct.ops.LIBRARY_PATH}")
    click.echo(f"fused kernels: {', '.join(sorted(ct.ops.kernels())) or 'none'}")
    if ct.ops.kernels():
        cuda = ct.ops.cuda_build()
        click.echo(f"CUDA: built with {cuda}" if cuda else "built without CUDA")
    if ct.ops.load_error():
        click.echo(f"the reason: {ct.ops.load_error()}")
        if native.backend() == "fused":
            raise SystemExit(1)


@main.command()
@click.argument("model", type=MODEL)
@click.argument("output", type=PATH)
@click.option(
    "--weights-dtype",
    type=click.Choice(["float32", "float64", "bfloat16"]),
    help="The dtype of the kernels of dense layers.  [default: what the layers say]",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    help="The dtype of the keys and values of past steps.  [default: what the layers say]",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    help="The window, in steps, of plain Keras attention.  [default: the length of the model's "
    "windows]",
)
@click.option(
    "--check",
    "data",
    type=MODEL,
    metavar="DATA",
    help="Stream these recordings through the Keras model and the model file, and print the "
    "largest difference of their steps: a .npy file of shape (T, ...) or (streams, T, ...), or an "
    ".npz file with an array for each input.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Fail if --check finds a larger difference.",
)
def pack(
    model: Path,
    output: Path,
    weights_dtype: str | None,
    cache_dtype: str | None,
    seq_len: int | None,
    data: Path | None,
    tolerance: float | None,
) -> None:
    """Write the model file OUTPUT (.safetensors) of the Keras model MODEL (.keras).

    `ct.Session.load` and the C interface read it, without TensorFlow.
    """
    if tolerance is not None and not data:
        raise click.UsageError("--tolerance needs --check DATA, whose outputs it compares")
    need_tensorflow()
    from continual_transformers_tf.models import packing

    try:
        keras_model = packing.load_model(model)
        session = ct.Session(
            keras_model, weights_dtype=weights_dtype, cache_dtype=cache_dtype, seq_len=seq_len
        )
        recordings = packing.read_recordings(data, session) if data else []
        session.save(output)
        session = ct.Session.load(output)
        click.echo(f"written: {output}, {output.stat().st_size:,} bytes")
        click.echo(packing.describe_cost(keras_model, session, seq_len))
        if data:
            found = packing.compare(keras_model, session, recordings, seq_len)
            click.echo(found)
            if tolerance is not None and not found.difference <= tolerance:
                raise ValueError(
                    f"the largest difference is {found.difference:.3g}, and --tolerance allows "
                    f"{tolerance:g}"
                )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


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
    help="Stream only this many recordings of each person.  [default: all]",
)
@click.option(
    "--save-model",
    type=PATH,
    metavar="FILE",
    help="Only write the trained model as a model file, for ct.Session.load and the server.",
)
def demo(picture: Path, as_json: bool, recordings: int | None, save_model: Path | None) -> None:
    """Stream a smartwatch, worn by people the model never saw, through a trained transformer."""
    if save_model:
        need_tensorflow()
        from continual_transformers_tf.demo.model import trained_model

        save_model.parent.mkdir(parents=True, exist_ok=True)
        ct.Session(trained_model()).save(save_model)
        return
    need_packages("matplotlib", "rich")
    need_tensorflow()
    import rich.console

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
    with console.status("Computing every window of the same recordings again, to compare ..."):
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


# The program parses its own arguments, `--help` too.
@main.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve model files over KServe V2: gRPC, HTTP, metrics and a page.

    With --ray ADDRESS, serve them on the nodes of a Ray cluster.
    """
    if any(argument.split("=")[0] == "--ray" for argument in arguments):
        from continual_transformers_tf.serving.ray_command import serve_on_ray

        serve_on_ray.main(list(arguments), standalone_mode=False)
        return
    from continual_transformers_tf.serving import program

    try:
        program.run(arguments)
    except OSError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--streams", type=click.IntRange(min=1), default=1000, show_default=True)
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
@click.option("--ca", type=MODEL, metavar="FILE", help="PEM file of its authority; turns TLS on.")
@click.option("--certificate", type=MODEL, metavar="FILE", help="PEM file, to show to the server.")
@click.option("--key", type=MODEL, metavar="FILE", help="Its key, a PEM file.")
@click.option("--token-file", type=MODEL, metavar="FILE", help="The server's token.")
@click.option("--model", metavar="NAME", help="Its name on the server.  [default: the only one]")
@click.option(
    "--model-file",
    type=MODEL,
    metavar="FILE",
    help="The model file that is served, with which answers are compared.  [default: the demo's]",
)
@click.option("--picture", type=PATH, metavar="FILE", help="Draw the latency's distribution.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, not as a table.")
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
    picture: Path | None,
    as_json: bool,
) -> None:
    """Stream a smartwatch's recordings to a server, and measure how fast and right it answers.

    The exit status is 1 if an answer is wrong, or if a stream could not go on.
    """
    need_packages("matplotlib", "rich", "seglearn")
    need_packages("grpc", "google.protobuf", extra="client")
    import rich.console

    from continual_transformers_tf.serving import Client, ServingError, load_report, program
    from continual_transformers_tf.serving.channels import Access
    from continual_transformers_tf.serving.load import CONNECT_SECONDS, Load, Options

    console = rich.console.Console(stderr=as_json, quiet=as_json)
    options = Options(streams, rate, rows, seconds)
    of_server = {"--ca": ca, "--certificate": certificate, "--key": key, "--token-file": token_file}
    for name, file in of_server.items():
        if file and url is None:
            raise click.UsageError(f"{name} is for a server that runs: --url is missing")
    with contextlib.ExitStack() as stack:
        try:
            token = token_in(token_file)
            access = Access(token, ca, certificate, key)
            if model_file is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                model_file = Path(folder, "watch.safetensors")
                with console.status("Making the demo's model file ..."):
                    # In another process, so that TensorFlow is not in this one.
                    subprocess.run(
                        [
                            sys.executable,
                            "-m",
                            "continual_transformers_tf.cli",
                            "demo",
                            "--save-model",
                            model_file,
                        ],
                        check=True,
                        capture_output=True,
                    )
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
            console.print(f"To {model} at {url}: {load_report.describe(options)}")
            line = stack.enter_context(load_report.LiveLine(console, seconds))
            result = Load(url, model, model_file, options, line, access).run()
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip().splitlines()
            raise click.ClickException(said[-1] if said else str(error)) from error
        except (OSError, ServingError, ValueError) as error:
            raise click.ClickException(str(error)) from error
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        load_report.draw(picture, result)
    if as_json:
        click.echo(json.dumps(load_report.summarize(result), indent=2))
    else:
        console.print(load_report.table(result))
    if result.refused.get("wrong_server"):
        raise click.ClickException(
            f"{url} is one of several servers that share the streams, and this program sends them "
            "all to one server: load a server without --sharded"
        )
    if not result.checked:
        raise click.ClickException(f"no request was answered; refused: {result.refused}")
    if result.wrong:
        raise click.ClickException(
            f"{result.wrong} of {result.checked} answers are wrong. {result.first_wrong}"
        )
    if result.lost:
        raise click.ClickException(f"{result.lost} streams could not go on")


main.add_command(bench)


if __name__ == "__main__":
    main()
