"""`continual-transformers serve`: the server's program, or servers on a Ray cluster."""

import click

from continual_transformers_tf.commands import common


# The program parses its own arguments, `--help` too.
@click.command(
    short_help="Serve model files over gRPC and HTTP.",
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

    with common.sentences():
        program.run(arguments)
