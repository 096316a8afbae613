"""`continual-transformers explain`: what of a Keras model streams, and what does not."""

from pathlib import Path

import click

from continual_transformers_tf.commands import common


@click.command(
    short_help="How each layer of a Keras model streams, or why not.",
    epilog=common.example("explain model.keras"),
)
@click.argument("model", type=common.FILE)
@common.seq_len
@common.as_json
def explain(model: Path, seq_len: int | None, as_json: bool) -> None:
    """Explain how each layer of the Keras model MODEL (.keras) streams, or why it does not.

    The exit status is 1 if ct.Session would refuse the model.
    """
    common.need("cpu")
    with common.sentences():
        from continual_transformers_tf.models import packing
        from continual_transformers_tf.models.explain import explain as explain_model

        found = explain_model(packing.load_model(model), seq_len)
    if as_json:
        common.print_json(found.as_dict())
    else:
        click.echo(found)
    if not found.streams:
        raise SystemExit(1)
