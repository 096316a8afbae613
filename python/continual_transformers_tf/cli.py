"""The command line: `continual-transformers`.

Only the commands that need TensorFlow import it.
"""

import click

import continual_transformers_tf as ct
from continual_transformers_tf import native
from continual_transformers_tf.bench.command import bench
from continual_transformers_tf.commands.check import check
from continual_transformers_tf.commands.demo import demo
from continual_transformers_tf.commands.explain import explain
from continual_transformers_tf.commands.info import info
from continual_transformers_tf.commands.load import load
from continual_transformers_tf.commands.pack import pack
from continual_transformers_tf.commands.serve import serve

COMMANDS = (info, explain, pack, check, serve, load, demo, bench)


class InOrder(click.Group):
    """A group that lists its commands in the order of their use."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ct.__version__)
def main() -> None:
    """Stream transformers step by step: pack a Keras model, check it, serve it.

    `continual-transformers COMMAND --help` has an example of each command.
    """
    try:
        native.backend()
    except ValueError as error:
        raise click.ClickException(str(error)) from error


for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
