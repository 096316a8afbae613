"""`continual-transformers check`: recordings through a Keras model and its session."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import continual_transformers_tf as ct
from continual_transformers_tf.commands import common

if TYPE_CHECKING:
    import keras
    import numpy.typing as npt

    from continual_transformers_tf.models.explain import Explanation
    from continual_transformers_tf.models.packing import Comparison


@click.command(
    short_help="Compare a Keras model and its session on recordings.",
    epilog=common.example("check model.keras recordings.npy --tolerance 1e-4"),
)
@click.argument("model", type=common.FILE)
@click.argument("data", type=common.FILE)
@click.option(
    "--model-file",
    type=common.FILE,
    metavar="FILE",
    help="Compare with this model file (.safetensors).  [default: a session of MODEL]",
)
@common.weights_dtype
@common.cache_dtype
@common.seq_len
@click.option(
    "--windows",
    is_flag=True,
    help="Also compare each step with the Keras model on the window that ends with it.",
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), help="Fail if the difference is larger than this."
)
@common.as_json
def check(
    model: Path,
    data: Path,
    model_file: Path | None,
    weights_dtype: str | None,
    cache_dtype: str | None,
    seq_len: int | None,
    windows: bool,
    tolerance: float | None,
    as_json: bool,
) -> None:
    """Stream recordings through the Keras model MODEL (.keras) and a session, and compare.

    DATA is a .npy file of shape (T, ...) or (streams, T, ...), or an .npz file with an array for
    each input of the model. The steps of Keras and those of `ct.Session` are compared, and the
    largest difference is printed. Both are this package's. --windows compares with the model as
    it was trained.
    """
    common.need("cpu")
    with common.sentences():
        from continual_transformers_tf.models import packing
        from continual_transformers_tf.recordings import read_recordings

        keras_model = packing.load_model(model)
        if model_file:
            session = ct.Session.load(
                model_file, weights_dtype=weights_dtype, cache_dtype=cache_dtype
            )
        else:
            session = ct.Session(
                keras_model, weights_dtype=weights_dtype, cache_dtype=cache_dtype, seq_len=seq_len
            )
        recordings = read_recordings(data, session)
        found = compared(keras_model, session, recordings, seq_len)
        explanation = ct.explain(keras_model, seq_len)
        on_windows = (
            packing.compare_windows(keras_model, session, recordings, seq_len) if windows else None
        )
    if as_json:
        also = {"on_windows": on_windows and on_windows._asdict()} if windows else {}
        common.print_json({**found._asdict(), **windows_of(explanation), **also})
    else:
        click.echo(found)
        click.echo(f"as on windows: {explanation.as_on_windows}")
        if on_windows:
            click.echo(on_windows)
    fail_above(found.difference, tolerance)
    if on_windows:
        fail_above(on_windows.difference, tolerance)


def compared(
    model: "keras.Model",
    session: ct.Session,
    recordings: "list[npt.NDArray[Any]]",
    seq_len: int | None,
) -> "Comparison":
    """Return `packing.compare` of these, with a bar."""
    from continual_transformers_tf.models import packing

    with common.progress("Comparing", recordings[0].shape[1]) as on_step:
        return packing.compare(model, session, recordings, seq_len, on_step)


def windows_of(explanation: "Explanation") -> dict[str, Any]:
    """Return what `ct.explain` says of windows, as plain data."""
    return {"equals_windows": explanation.equals_windows, "windows": explanation.windows}


def fail_above(difference: float, tolerance: float | None) -> None:
    """End the command with a sentence if a difference is above the tolerance."""
    if tolerance is not None and not difference <= tolerance:
        raise click.ClickException(
            f"the largest difference is {difference:.3g}, and --tolerance allows {tolerance:g}"
        )
