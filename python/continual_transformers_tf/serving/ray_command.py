"""The command `continual-transformers serve --ray`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from continual_transformers_tf import extras
from continual_transformers_tf.commands import common
from continual_transformers_tf.serving.operator_api import Tls

# Options of the server's program that have no value.
FLAGS = ("--no-power-loss", "--other-weights", "--strict-start")
# Options that name a file, which is on every node.
FILES = ("--tls-certificate", "--tls-client-ca", "--tls-key", "--token-file")
# Those that are not for servers on Ray, and why.
REFUSED = {
    "--die-with-parent": "the servers run on when Ray ends",
    "--host": "each server listens on the address of its node",
    "--operator-token-file": "each node makes its own",
    "--ready-file": "each node has its own",
    "--sharded": "the servers have it already",
    "--snapshot-every": "there are no snapshots: --journal keeps streams when a server is lost",
    "--state-dir": "there are no snapshots: --journal keeps streams when a server is lost",
}


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """Return the program's options, and the model files by the models' names.

    Raises:
        click.UsageError: If an option is not for servers on Ray, or a model's name comes twice.
    """
    options: list[str] = []
    models: dict[str, Path] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            name, equals, value = argument.partition("=")
            if name in REFUSED:
                raise click.UsageError(f"{name} is not for servers on Ray: {REFUSED[name]}")
            if name in FLAGS:
                options.append(argument)
                continue
            value = value if equals else next(rest, "")
            # Servers run in other folders.
            value = str(Path(value).absolute()) if name in FILES else value
            options += [f"{name}={value}"] if equals else [name, value]
        else:
            # As the program has it: "name=path", or a path whose stem is the name.
            first, equals, path = argument.partition("=")
            named = bool(equals) and "/" not in first
            name, file = (first, Path(path)) if named else (Path(argument).stem, Path(argument))
            if name in models:
                raise click.UsageError(f"got two models named {name}: name one, as other=FILE")
            models[name] = file
    return options, models


def tls_of(options: Sequence[str], files: Mapping[str, str | None], proxy: bool) -> Tls | None:
    """Return what the service calls its servers with; None: they have no TLS.

    Args:
        options: The program's.
        files: What was given for `--ca`, `--certificate` and `--key`.
        proxy: Whether there is a proxy.

    Raises:
        click.UsageError: If the options do not fit.
        OSError: If a file cannot be read.
    """
    names = {option.split("=")[0] for option in options}
    given = [name for name, file in files.items() if file is not None]
    ca, certificate, key = [file and str(Path(file).absolute()) for file in files.values()]
    if "--tls-certificate" not in names:
        for name in given:
            raise click.UsageError(f"{name} is for servers with TLS: --tls-certificate is missing")
        return None
    if ca is None:
        raise click.UsageError(
            "--tls-certificate needs --ca FILE too: by it the service knows its servers"
        )
    if (certificate is None) != (key is None):
        raise click.UsageError("--certificate and --key need each other, got only one")
    if "--tls-client-ca" in names and certificate is None:
        raise click.UsageError(
            "--tls-client-ca needs --certificate and --key too: the service shows it to its servers"
        )
    if proxy:
        raise click.UsageError(
            "--proxy-port is not for servers with TLS: HAProxy's port and its calls of the servers "
            "are plain for now"
        )
    tls = Tls(ca, certificate, key)
    tls.context()
    return tls


@click.command(
    name="continual-transformers serve",
    context_settings={"ignore_unknown_options": True},
    epilog=common.example("serve --ray auto --max-servers 3 watch.safetensors"),
)
@click.option("--ray", "address", required=True, help='The Ray cluster: "host:port", or "auto".')
@click.option("--name", default="streams", show_default=True, help="The service's name.")
@click.option(
    "--min-servers",
    type=click.IntRange(min=1),
    help="[default: one on every node; with --streams-per-server: 1]",
)
@click.option("--max-servers", type=click.IntRange(min=1), help="[default: one on every node]")
@click.option(
    "--streams-per-server",
    type=click.IntRange(min=1),
    help="Have as many servers as the open streams need.",
)
@click.option(
    "--proxy-port",
    type=click.IntRange(1, 65535),
    help="Run HAProxy on the head node, for clients that do not know the table of shards.",
)
@click.option(
    "--node-dir",
    default=f"/var/tmp/continual-transformers-{os.geteuid()}",
    show_default=True,
    help="A folder on every node, for the server's log, its token and the model files.",
)
@click.option(
    "--ca",
    metavar="FILE",
    help="PEM file of the authority of --tls-certificate. All files are on every node.",
)
@click.option(
    "--certificate",
    metavar="FILE",
    help="PEM file that the service shows to its servers, if they have --tls-client-ca.",
)
@click.option("--key", metavar="FILE", help="Its key, a PEM file.")
@click.option("--detach", is_flag=True, help="Return when the servers are ready.")
@click.option("--drain", metavar="NODE", help="Move the streams away from a node; end its server.")
@click.option("--resume", metavar="NODE", help="Let a drained node have a server again.")
@click.option("--status", is_flag=True, help="Print the servers.")
@click.option("--end", is_flag=True, help="End all servers.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS] MODEL...")
def serve_on_ray(
    address: str,
    name: str,
    min_servers: int | None,
    max_servers: int | None,
    streams_per_server: int | None,
    proxy_port: int | None,
    node_dir: str,
    ca: str | None,
    certificate: str | None,
    key: str | None,
    detach: bool,
    drain: str | None,
    resume: str | None,
    status: bool,
    end: bool,
    arguments: tuple[str, ...],
) -> None:
    """Serve model files on the nodes of a Ray cluster, until Ctrl-C or SIGTERM.

    Other options are those of the server's program, such as --journal; see `continual-transformers
    serve --help`.
    """
    if importlib.util.find_spec("ray") is None:
        raise click.ClickException(extras.missing(["ray"], "ray"))
    options, models = split_arguments(arguments)
    if sum(map(bool, (drain, resume, status, end, models))) != 1:
        raise click.UsageError("expected models, or one of --drain, --resume, --status and --end")
    if min_servers and max_servers and min_servers > max_servers:
        raise click.UsageError(f"--min-servers {min_servers} is above --max-servers {max_servers}")
    from continual_transformers_tf.serving import on_ray

    try:
        if not models:
            on_ray.connect(address)
            act(on_ray.RayService(name), drain, resume, end)
            return
        files = {"--ca": ca, "--certificate": certificate, "--key": key}
        tls = tls_of(options, files, bool(proxy_port))
        service = on_ray.service_of(
            name,
            models,
            options,
            node_dir,
            tls,
            min_servers=min_servers,
            max_servers=max_servers,
            streams_per_server=streams_per_server,
            proxy_port=proxy_port,
        )
        on_ray.connect(address)
        running = on_ray.RayService.deploy(service, models)
        if not running.wait_until_ready():
            print_events(running.events(follow=False))
            raise click.ClickException("the servers are not ready: the events above say why")
        click.echo(describe(running.status()), err=True)
        if not detach:
            # As Ctrl-C, which a shell takes from the commands that it starts in the background.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                print_events(running.events())
            except KeyboardInterrupt:
                click.echo("ending the servers", err=True)
                running.end()
    except (ConnectionError, LookupError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def act(service: Any, drain: str | None, resume: str | None, end: bool) -> None:
    """Do what an option asks of a service that runs."""
    if end:
        service.end()
    elif drain:
        if not service.drain(drain):
            raise click.ClickException(f"{drain} still has streams: see --status")
    elif resume:
        service.resume(resume)
    if not end:
        click.echo(describe(service.status()))


def print_events(events: Any) -> None:
    """Print each event as a line of JSON."""
    for event in events:
        click.echo(json.dumps(event), err=True)


def describe(status: dict[str, Any]) -> str:
    """Return the servers as a table, and how to connect."""
    columns = ("node", "state", "server", "grpc", "http", "shards", "streams", "problem")
    rows = [columns] + [
        tuple("" if node[column] is None else str(node[column]) for column in columns)
        for node in status["nodes"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    urls = [node["grpc"] for node in status["nodes"] if node["shards"] and node["grpc"]]
    lines.append(f"To connect: ct.serving.Client({json.dumps(urls)})")
    if status["proxy"]:
        lines.append(
            f"Or any gRPC client to {status['proxy']}, with the metadata stream-id or shard"
        )
    return "\n".join(lines)
