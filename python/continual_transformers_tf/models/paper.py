"""The paper's models: Hedegaard et al., "Continual Transformers", ICLR 2023."""

from typing import Any

import keras

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.ops.stream_state import check_integer


def co_oad_tr(
    num_layers: int = 1,
    *,
    features: int = 3072,
    classes: int = 22,
    seq_len: int = 64,
    embed_dim: int = 1024,
    num_heads: int = 8,
    ff_dim: int = 1024,
    dropout_rate: float = 0.1,
    **options: Any,
) -> StreamingModel:
    """Return CoOadTR, which detects actions in a live video (arXiv 2201.06268, section 4.2).

    It has a linear embedding, a circular encoding with 2N - 1 rows, a retroactive stack of pre-norm
    blocks and a linear classifier. The defaults are the paper's for THUMOS14. They give the paper's
    parameter counts, 9,468,950 with one block and 15,766,550 with two, which are those without
    biases in the attention and with an encoding that has no parameters.

    Args:
        num_layers: L, the number of encoder blocks.
        features: The features of each step of the input.
        classes: The number of classes.
        seq_len: N, the window.
        embed_dim: E, the features of the blocks, divided among the heads.
        num_heads: H, the number of heads. E must be a multiple of it.
        ff_dim: The features of the feed-forward parts.
        dropout_rate: As in `ct.TransformerEncoder`.
        **options: Further arguments of `ct.TransformerEncoder`, and `name`.

    Returns:
        A `ct.StreamingModel`: windows `(B, N, features)` to logits `(B, 1, classes)`, a step
        `(M, features)` to `(M, classes)`.

    Raises:
        ValueError: If a size is not a positive integer, or E is not a multiple of H.
    """
    return _classifier(
        "co_oad_tr",
        features,
        classes,
        encoding=dict(encoding="sinusoidal"),
        stack=dict(
            num_layers=num_layers,
            seq_len=seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            ff_dim=ff_dim,
            dropout_rate=dropout_rate,
            **{"kind": "retroactive", "norm_first": True, "use_bias": False, **options},
        ),
    )


def co_audio_transformer(
    num_layers: int = 1,
    *,
    features: int = 128,
    classes: int = 10,
    seq_len: int = 120,
    embed_dim: int = 192,
    num_heads: int = 16,
    ff_dim: int = 192,
    dropout_rate: float = 0.1,
    **options: Any,
) -> StreamingModel:
    """Return the paper's audio model (section 4.3), from spectra to ten genres of music.

    It differs from `co_oad_tr` in its learned encoding, its biases, and the sizes, which are those
    of the paper's audio experiments: sixteen heads of twelve features.

    Args:
        num_layers, ..., **options: As in `co_oad_tr`.

    Returns:
        A `ct.StreamingModel`, as `co_oad_tr` does.

    Raises:
        ValueError: As in `co_oad_tr`.
    """
    return _classifier(
        "co_audio_transformer",
        features,
        classes,
        encoding={},
        stack=dict(
            num_layers=num_layers,
            seq_len=seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            ff_dim=ff_dim,
            dropout_rate=dropout_rate,
            **{"kind": "retroactive", "norm_first": True, **options},
        ),
    )


def _classifier(
    name: str, features: int, classes: int, encoding: dict[str, Any], stack: dict[str, Any]
) -> StreamingModel:
    name = stack.pop("name", name)
    n, embed_dim, heads = stack["seq_len"], stack["embed_dim"], stack["num_heads"]
    sizes = {"features": features, "classes": classes, "seq_len": n, "embed_dim": embed_dim}
    for size, value in {**sizes, "num_heads": heads}.items():
        check_integer(size, value, 1)
    if embed_dim % heads:
        raise ValueError(f"Expected embed_dim, {embed_dim}, to be a multiple of num_heads, {heads}")
    warm_up = stack.pop("warm_up", "none")
    model = keras.Sequential(
        [
            keras.Input((n, features)),
            keras.layers.Dense(embed_dim, name="embedding"),
            # In a stream a window may begin at any row. On windows, each call begins one row after
            # the call before, so training meets every row.
            CircularPositionalEncoding(2 * n - 1, embed_dim, **encoding, name="position"),
            TransformerEncoder(**{"key_dim": embed_dim // heads, **stack}, name="encoder"),
            keras.layers.Dense(classes, name="classifier"),
        ],
        name=f"{name}_on_windows",
    )
    return StreamingModel(model, warm_up=warm_up, name=name)
