"""Why a node of a model's graph cannot run on steps, and what to do: the ends of sentences.

Each follows the name of a layer, as in `Problem`.
"""

from collections.abc import Iterable

import keras

from continual_transformers_tf.models.row_wise import Tensor

_WINDOW = "put a ct.CoWindow before it, which gives it the whole window at every step"
# Rows that see later steps cannot be kept in a window.
_RETROACTIVE = (
    "ct.convert(model, seq_len, kind='retroactive') gives it the whole window at every step, as a "
    "ct.CoReTransformerEncoder before it does"
)
_FEATURES = "keep the first two axes, samples and time, and work along the others"
_FUNCTION = "write its function with keras.ops along features, or mark it with @ct.row_wise"
# The ways out for operations that look at several steps, by the names of their classes.
_CURES = {
    **dict.fromkeys(("Activation", "Dense", "EinsumDense", "Lambda"), _FUNCTION),
    **dict.fromkeys(
        ("ExpandDims", "Moveaxis", "Permute", "Reshape", "Squeeze", "Swapaxes", "Transpose"),
        _FEATURES,
    ),
    "GetItem": "take the newest step, as by x[:, -1]",
    "GroupNormalization": "put it into a keras.layers.TimeDistributed, which normalizes each row",
    "PReLU": "give it shared_axes=[1], so that its slopes are the same for all steps",
}

DROP_THE_MASK = (
    "pass the window through an operation that drops masks, such as keras.ops.multiply(x, 1)"
)
READS_ATTENTION = (
    "reads the outputs of attention. Every new step changes all of them, so none can be kept. "
    "ct.convert(model, seq_len, kind='retroactive') runs it on the whole window at every step, as "
    "does a ct.CoReTransformerEncoder in place of that attention. With use_causal_mask=True the "
    "attention streams as it is"
)


def sees_an_older_window(delayed_by: str, delay: int) -> str:
    """Return why a layer that sees a whole window cannot be given delayed rows."""
    return (
        f"is given rows that {delayed_by} delays by {delay} steps, so it would see a window that "
        f"ended before: put {delayed_by} after it, or, if that is a convolution, give it "
        'padding="causal"'
    )


def looks_at_more(operation: keras.Operation, causal: bool) -> str:
    """Return why an operation on windows cannot run on a step, and what to do.

    Args:
        operation: The operation.
        causal: Whether no row that it is given depends on a later one.
    """
    why = "may look at several steps of the window, but a step has only the newest one: "
    whole = _WINDOW if causal else _RETROACTIVE
    if type(operation).__module__.startswith("keras."):
        return why + _CURES.get(type(operation).__name__, whole)
    attention = [
        layer
        for layer in getattr(operation, "_flatten_layers", list)()
        if isinstance(layer, keras.layers.MultiHeadAttention)
    ]
    if attention:
        return (
            f"calls {attention[0].name} ({type(attention[0]).__name__}) by itself, and a layer of "
            "your own is not read: put the layers inside it into the graph of the model"
        )
    return (
        f"{why}if it computes each row of a window only from that row, mark its class with "
        f"@ct.row_wise. Otherwise {whole}"
    )


def unequal_delays(tensors: Iterable[Tensor]) -> str | None:
    """Return what is wrong if windows have different delays, and the cure; otherwise None."""
    windows = [(x.delay * x.stride, x) for x in tensors if x.kind == "window"]
    windows.sort(key=lambda pair: pair[0])
    if not windows or windows[0][0] == windows[-1][0]:
        return None
    (early, other), (late, latest) = windows[0], windows[-1]
    return (
        f"windows with different delays: {latest.delayed_by} delays one by {late} steps, the delay "
        f"of another is {early}. Pass the other through "
        f"ct.CoDelay({(late - early) // other.stride}). If this is the sum of the input and the "
        f"output of {latest.delayed_by}, put ct.CoResidual around that layer"
    )


def uneven_rows(tensors: Iterable[Tensor]) -> str | None:
    """Return what is wrong if windows have other numbers of rows; otherwise None."""
    windows = [x for x in tensors if x.kind == "window"]
    strides = sorted({x.stride for x in windows})
    if len(strides) > 1:
        return (
            f"combines windows with a row for every {strides[0]} and every {strides[-1]} steps: "
            "give their layers the same strides"
        )
    if len({x.lag - x.delay for x in windows}) > 1:
        return (
            "combines windows of different lengths, because a layer before one of them leaves out "
            'rows at the beginning: give that layer padding="causal"'
        )
    return None
