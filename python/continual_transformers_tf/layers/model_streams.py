"""What can be done with the streams of all continual layers of a Keras model."""

import contextlib
from collections.abc import Iterator

import keras

from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.inputs import TensorLike
from continual_transformers_tf.ops.streams import Streams


def ensure_streams(model: keras.layers.Layer, streams: int) -> None:
    """Make room for streams 0, ..., streams - 1 in every continual layer of a model.

    Streams that are held keep their state.

    Args:
        model: A `keras.Model` or `keras.layers.Layer`.
        streams: How many streams to hold.
    """
    for streams_of_layers in _streams_of(model):
        streams_of_layers.ensure(streams)


def convert_weights(model: keras.layers.Layer) -> None:
    """Convert the kernels as they are now, in every layer that has a `weights_dtype`.

    Call it after `fit`, `keras.Model.set_weights`, `tf.train.Checkpoint.restore` and anything else
    that changes weights. It is not needed after `set_weights` of a layer of this package, or after
    Keras has loaded a file. Functions that were traced before see the new kernels too.

    Args:
        model: A `keras.Model` or `keras.layers.Layer`.
    """
    for layer in _continual_layers(model):
        layer.convert_weights()


def clean_state(model: keras.layers.Layer, streams: TensorLike | None = None) -> None:
    """Forget what streams have seen, in every continual layer of a Keras model or layer.

    Args:
        model: A `keras.Model` or `keras.layers.Layer`.
        streams: Integers `[M]`, the streams to forget. None: all.

    Raises:
        ValueError: If a stream is not held, or is named twice.
    """
    for streams_of_layers in _streams_of(model):
        streams_of_layers.clean(streams)
    if streams is None:
        for layer in _continual_layers(model):
            layer._restart()


@contextlib.contextmanager
def hold_streams(model: keras.layers.Layer) -> Iterator[None]:
    """Keep other threads from stepping, reading or changing a model's streams in this context.

    They wait until it ends. Use it around several reads that must fit each other, for example
    around the writing of a `tf.train.Checkpoint`. Single methods such as `get_state` do this by
    themselves. Within the context, do not call a `tf.function` that steps the same streams: it
    would wait for itself.

    Args:
        model: A `keras.Model` or `keras.layers.Layer`.
    """
    with contextlib.ExitStack() as held:
        for streams in _streams_of(model):
            held.enter_context(streams.turn())
        yield


def _streams_of(model: keras.layers.Layer) -> list[Streams]:
    """Return the `Streams` of a model's layers, each once."""
    return list(dict.fromkeys(layer._streams for layer in _continual_layers(model)))


def _continual_layers(model: keras.layers.Layer) -> list[ContinualLayer]:
    if not isinstance(model, keras.Layer):
        raise ValueError(f"Expected a Keras model or layer, but got {model!r}")
    return [layer for layer in model._flatten_layers() if isinstance(layer, ContinualLayer)]
