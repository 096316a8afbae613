"""A Keras model that streams, from one that does not."""

import keras

from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.models.streaming_model import StreamingModel


def convert(model, seq_len, **options):
    """A model with the weights of a Keras model, which also answers at every step of a stream.

    Every `keras.layers.MultiHeadAttention` becomes a `CoSiMultiHeadAttention` with a window of
    `seq_len` steps. Regular calls give what they gave; steps give what a regular call gives for the
    newest step of the window (see `StreamingModel`).

    Args:
        model: a functional or built sequential `keras.Model`, models within it likewise. It stays
            as it is.
        seq_len: N, the window: how many of the newest steps a step's query attends to.
        **options: `warm_up`, `call_mode` and `name` of the `StreamingModel`, and `cache_dtype` of
            its attention.

    Returns:
        A `StreamingModel`. Its weights are copies.

    Raises:
        ValueError: if something in the model cannot be converted, or run on steps: for every layer
            that stands in the way the reason.
    """
    cache_dtype = options.pop("cache_dtype", None)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model, but got {model!r}. (For a layer alone there is "
            "CoSiMultiHeadAttention.from_regular.)"
        )
    if isinstance(model, StreamingModel):
        model = model.model
    problems = []

    def convert_layer(layer):
        if isinstance(layer, ContinualLayer):
            return layer.__class__.from_config(layer.get_config())
        if isinstance(layer, keras.layers.MultiHeadAttention):
            try:
                return CoSiMultiHeadAttention.from_regular(
                    layer, seq_len, single_output=False, cache_dtype=cache_dtype
                )
            except ValueError as error:
                problems.append(str(error))
        elif isinstance(layer, keras.layers.GroupQueryAttention):
            problems.append(f"{layer.name} ({type(layer).__name__}) has no continual twin here")
        return layer.__class__.from_config(layer.get_config())

    if not model.built:
        raise ValueError(f"Expected a built model, but {model.name} has never been called")
    if isinstance(model, keras.Sequential) or hasattr(model, "_nodes_by_depth"):
        copy = keras.models.clone_model(model, clone_function=convert_layer, recursive=True)
        if not problems:
            copy.set_weights(model.get_weights())
    else:
        copy = model  # Without a graph: StreamingModel says so.
    if problems:
        raise ValueError(
            f"{model.name} cannot be converted:\n" + "\n".join(f"- {p}" for p in problems)
        )
    return StreamingModel(copy, **{"name": model.name, **options})
