"""What the commands share: options, errors as sentences, JSON, progress, and the quiet import."""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from continual_transformers_tf import extras

if TYPE_CHECKING:
    import rich.console

NEW_FILE = click.Path(dir_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

# Options that several commands have.
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object; all else goes to stderr."
)
seq_len = click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    help="The window, in steps, of plain Keras attention.  [default: the length of the model's "
    "windows]",
)
weights_dtype = click.option(
    "--weights-dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "int8"]),
    help="The dtype of the kernels of dense layers.  [default: what the layers say]",
)
cache_dtype = click.option(
    "--cache-dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16", "int8"]),
    help="The dtype of the keys and values of past steps.  [default: what the layers say]",
)


def example(*lines: str) -> str:
    """Return the end of a command's help: an example, in lines that click does not join."""
    return "\b\nExample:\n" + "\n".join(f"  continual-transformers {line}" for line in lines)


# What may be missing.


# The packages of each extra that a command cannot do without.
NEEDED = {
    "bench": ("matplotlib", "rich"),
    "client": ("grpc", "google.protobuf"),
    "cpu": ("tensorflow", "keras"),
    "demo": ("matplotlib", "rich", "seglearn"),
}


def need(*names: str) -> None:
    """End the command with a sentence if an extra is not installed. `cpu` imports TensorFlow.

    Args:
        *names: Names of extras.
    """
    missing = {name: [p for p in NEEDED[name] if not _is_installed(p)] for name in names}
    packages = [package for of_extra in missing.values() for package in of_extra]
    if packages:
        of = [name for name, of_extra in missing.items() if of_extra]
        raise click.ClickException(extras.missing(packages, *of))
    if "cpu" in names:
        _import_tensorflow()


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # The package that it is in is missing.
        return False


def _import_tensorflow() -> None:
    """Import TensorFlow without its log.

    Warnings and errors are printed. A user who sets TF_CPP_MIN_LOG_LEVEL gets the whole log.
    """
    quiet = "TF_CPP_MIN_LOG_LEVEL" not in os.environ and "tensorflow" not in sys.modules
    with sentences(), contextlib.ExitStack() as stack:
        if quiet:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
            stack.enter_context(_without_information())
        importlib.import_module("continual_transformers_tf._tensorflow")


# Lines that TensorFlow logs while it is imported, whatever TF_CPP_MIN_LOG_LEVEL is.
_INFORMATION = re.compile(
    rb"I\d{4} [\d:.]+ .*|WARNING: All log messages before absl::InitializeLog\(\) is called .*"
)


@contextlib.contextmanager
def _without_information() -> Iterator[None]:
    """Leave the informational lines out of what C++ code writes to stderr in a `with` block."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said:
                if not _INFORMATION.fullmatch(line.rstrip()):
                    os.write(2, line)


# Errors and output.


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """End the command with the message, not the traceback, of an error that the user can cure."""
    try:
        yield
    except OSError as error:
        text = str(error)
        if error.strerror and error.filename:
            text = f"cannot use {os.fsdecode(error.filename)}: {error.strerror}"
        raise click.ClickException(text) from error
    except (ImportError, TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def print_json(data: Any) -> None:
    """Print the command's result as one JSON object on stdout.

    JSON has no NaN and no infinity: they are written as null.
    """
    click.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(x) for name, x in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(x) for x in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


# Progress, on a terminal only.


def notes() -> "rich.console.Console":
    """Return a console for what is told while a command works: stderr, if it is a terminal.

    It needs rich, of the extras demo and bench.
    """
    import rich.console

    return rich.console.Console(stderr=True, quiet=not sys.stderr.isatty())


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, if that is a terminal and rich is installed.

    Args:
        description: What is done, in a word or two.
        total: How much there is to do.

    Yields:
        A function of how much is done.
    """
    if not sys.stderr.isatty() or not _is_installed("rich"):
        yield lambda done: None
        return
    import rich.progress

    with rich.progress.Progress(console=notes(), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
