"""A Keras model that streams, from one that does not."""

import keras

from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.models.streaming_model import StreamingModel


def convert(model, seq_len, **options):
    """A model with the weights of a Keras model, which also answers at every step of a stream.

    Every `keras.layers.MultiHeadAttention` becomes a `CoSiMultiHeadAttention` with a window of
    `seq_len` steps, and layers that are continual already get that window. Regular calls give what
    they gave; steps give what a regular call gives for the newest step of the window (see
    `StreamingModel`).

    Args:
        model: a functional or built sequential `keras.Model`, models within it likewise. It stays
            as it is.
        seq_len: N, the window: how many of the newest steps a step's query attends to.
        **options: `warm_up`, `call_mode` and `name` of the `StreamingModel`, and `cache_dtype` of
            its attention. What is left out stays as it was in a model that streams already.

    Returns:
        A `StreamingModel`. Its weights are copies.

    Raises:
        ValueError: if something in the model cannot be converted, or run on steps: for every layer
            that stands in the way the reason.
    """
    attention = {"seq_len": seq_len}
    if options.get("cache_dtype") is not None:
        attention["cache_dtype"] = options["cache_dtype"]
    options.pop("cache_dtype", None)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model, but got {model!r}. (For a layer alone there is "
            "CoSiMultiHeadAttention.from_regular.)"
        )
    unknown = sorted(set(options) - {"warm_up", "call_mode", "name", "dtype", "trainable"})
    if unknown:
        raise ValueError(
            "Expected warm_up, call_mode, name and cache_dtype alone, but got "
            f"{' and '.join(unknown)}: other options are of single layers, and "
            "CoSiMultiHeadAttention.from_regular(layer, seq_len, ...) takes them all; but "
            "weights_dtype is of steps that are one op, which those of a StreamingModel are not"
        )
    options = {"name": model.name, **options}
    if isinstance(model, StreamingModel):
        options = {"warm_up": model.warm_up, "call_mode": model.call_mode, **options}
        model = model.model
    if not model.built:
        raise ValueError(f"Expected a built model, but {model.name} has never been called")
    copy, problems = convert_layers(model, attention)
    if problems:
        raise ValueError(
            f"{model.name} cannot be converted:\n" + "\n".join(f"- {p}" for p in problems)
        )
    return StreamingModel(copy, **options)


def convert_layers(model, attention, also_continual=True):
    """Returns a copy of a model in which attention is continual, and what stood in the way.

    Args:
        model: built. One that is neither functional nor sequential is given back as it is.
        attention: a dict of options of the attention: seq_len, and perhaps cache_dtype.
        also_continual: whether layers that are continual already get these options too.

    Returns:
        (the copy, a list of sentences). The copy has the model's weights where there are none.
    """
    problems = []

    def convert_layer(layer):
        try:
            if isinstance(layer, StreamingModel):
                return convert(layer, **attention) if also_continual else _copy(layer)
            if isinstance(layer, CoResidual) and also_continual:
                within = keras.saving.serialize_keras_object(convert_layer(layer.layer))
                return CoResidual.from_config({**layer.get_config(), "layer": within})
            if isinstance(layer, ContinualLayer):
                return _with_options(layer, attention if also_continual else {})
            if isinstance(layer, keras.layers.MultiHeadAttention):
                return CoSiMultiHeadAttention.from_regular(layer, single_output=False, **attention)
        except ValueError as error:
            problems.append(str(error))
        if isinstance(layer, keras.layers.GroupQueryAttention):
            problems.append(f"{layer.name} ({type(layer).__name__}) has no continual twin here")
        return _copy(layer)

    if not isinstance(model, keras.Sequential) and not hasattr(model, "_nodes_by_depth"):
        return model, problems  # Without a graph: StreamingModel says so.
    copy = keras.models.clone_model(model, clone_function=convert_layer, recursive=True)
    if not problems:
        copy.set_weights(model.get_weights())
    return copy, problems


def _copy(layer):
    return layer.__class__.from_config(layer.get_config())


def _with_options(layer, options):
    """A continual layer like another, with these options where it has a window."""
    config = layer.get_config()
    if "seq_len" in config:
        if not set(options) <= set(config):
            raise ValueError(f"{layer.name} ({type(layer).__name__}) takes no cache_dtype")
        config |= options
    return layer.__class__.from_config(config)
