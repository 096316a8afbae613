"""A layer that streams, from one of Keras that does not."""

import keras

# What a regular call computes with; not every version of Keras has all of them.
COMPUTATION = (
    "call",
    "_compute_attention",
    "_compute_attention_mask",
    "_compute_causal_mask",
    "_compute_sliding_window_mask",
    "_masked_softmax",
)


def co_si_from_regular(cls, layer, seq_len, options):
    """See `CoSiMultiHeadAttention.from_regular`."""
    regular = keras.layers.MultiHeadAttention
    if not isinstance(layer, regular):
        raise ValueError(f"Expected a keras.layers.MultiHeadAttention, but got {layer!r}")
    for name in COMPUTATION:
        method = getattr(type(layer), name, None)
        if not any(vars(base).get(name) is method for base in cls.__mro__):
            raise ValueError(
                f"Expected the {name} of keras.layers.MultiHeadAttention, but {layer.name} "
                f"({type(layer).__name__}) has one of its own"
            )
    if not layer.built:
        raise ValueError(
            f"Expected a built layer, which has weights to take, but {layer.name} was never called"
        )
    config = {"flash_attention": layer._flash_attention, **layer.get_config()}
    streaming = cls(**{**config, "seq_len": seq_len, **options})
    shapes = layer._build_shapes_dict
    streaming.build(*(shapes.get(name) for name in ("query_shape", "value_shape", "key_shape")))
    if _weights_of(streaming) != _weights_of(layer):
        raise ValueError(
            "Expected the weights of a plain keras.layers.MultiHeadAttention, "
            f"{_weights_of(streaming)}, but {layer.name} has {_weights_of(layer)}: take it before "
            "it is quantized or given low-rank additions"
        )
    streaming.set_weights(layer.get_weights())
    return streaming


def _weights_of(layer):
    return [("/".join(w.path.split("/")[-2:]), tuple(w.shape), w.dtype) for w in layer.weights]
