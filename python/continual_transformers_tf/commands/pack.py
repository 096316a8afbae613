"""`continual-transformers pack`: a Keras model as a model file."""

from pathlib import Path
from typing import Any

import click

import continual_transformers_tf as ct
from continual_transformers_tf.commands import common
from continual_transformers_tf.commands.check import compared, fail_above, windows_of


@click.command(
    short_help="Write a Keras model as a model file.",
    epilog=common.example("pack model.keras model.safetensors --check recordings.npy"),
)
@click.argument("model", type=common.FILE)
@click.argument("output", type=common.NEW_FILE)
@common.weights_dtype
@common.cache_dtype
@common.seq_len
@click.option(
    "--check",
    "data",
    type=common.FILE,
    metavar="DATA",
    help="Stream these recordings (.npy, or .npz for several inputs) through the Keras model and "
    "the model file, as the command check does.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Fail if --check finds a larger difference.",
)
@common.as_json
def pack(
    model: Path,
    output: Path,
    weights_dtype: str | None,
    cache_dtype: str | None,
    seq_len: int | None,
    data: Path | None,
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Write the Keras model MODEL (.keras) as the model file OUTPUT (.safetensors).

    `ct.Session.load`, the C interface and the server read it, without TensorFlow.
    """
    if tolerance is not None and not data:
        raise click.UsageError("--tolerance needs --check DATA, whose outputs it compares")
    if output.suffix != ".safetensors":  # Or it could overwrite a Keras model, or recordings.
        raise click.BadParameter(
            f"{str(output)!r} ends in {output.suffix!r}, expected .safetensors: "
            f"{str(output.with_suffix('.safetensors'))!r}",
            param_hint="'OUTPUT'",
        )
    common.need("cpu")
    with common.sentences():
        from continual_transformers_tf.models import packing
        from continual_transformers_tf.recordings import read_recordings

        keras_model = packing.load_model(model)
        session = ct.Session(
            keras_model, weights_dtype=weights_dtype, cache_dtype=cache_dtype, seq_len=seq_len
        )
        recordings = read_recordings(data, session) if data else None
        session.save(output)
        session = ct.Session.load(output)
        size = output.stat().st_size
        costs = packing.costs(keras_model, session, seq_len)
        explanation = ct.explain(keras_model, seq_len)
        found = recordings and compared(keras_model, session, recordings, seq_len)
    if as_json:
        written: dict[str, Any] = {"written": str(output), "bytes": size, **costs}
        written |= windows_of(explanation)
        common.print_json({**written, "check": found._asdict() if found else None})
    else:
        click.echo(f"written: {output}, {size:,} bytes")
        click.echo(packing.describe_costs(costs, explanation.goes_on))
        click.echo(f"as on windows: {explanation.as_on_windows}")
        if found:
            click.echo(found)
    if found:
        fail_above(found.difference, tolerance)
