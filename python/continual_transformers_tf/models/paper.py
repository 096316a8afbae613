"""The models of the paper: Hedegaard & Iosifidis, "Continual Transformers", ICLR 2023."""

import keras

from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.models.streaming_model import StreamingModel
from continual_transformers_tf.ops.stream_state import check_integer


def co_oad_tr(
    num_layers=1,
    *,
    features=3072,
    classes=22,
    seq_len=64,
    embed_dim=1024,
    num_heads=8,
    ff_dim=1024,
    dropout_rate=0.1,
    **options,
):
    """CoOadTR, which tells the actions in a video as it is seen (arXiv 2201.06268, section 4.2).

    A linear embedding, an encoding that goes round 2N - 1 rows, a retroactive stack of pre-norm
    blocks, a linear classifier. The defaults are the paper's for THUMOS14: with one block 9,468,950
    parameters, with two 15,766,550, which are those counts without biases in the attention and with
    an encoding that has no parameters.

    Args:
        num_layers: L, the encoder blocks.
        features: of each step of the input.
        classes: of the output.
        seq_len: N, the window.
        embed_dim: E, of the blocks, whose heads share it.
        num_heads: H, of which E is a multiple.
        ff_dim: of the feed-forward parts.
        dropout_rate: as `ct.TransformerEncoder` has it.
        **options: further arguments of `ct.TransformerEncoder`, and `name`.

    Returns:
        A `ct.StreamingModel`: windows `(B, N, features)` to logits `(B, 1, classes)`, a step
        `(M, features)` to `(M, classes)`.

    Raises:
        ValueError: if a size is not a positive integer, or the heads cannot share E.
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
    num_layers=1,
    *,
    features=128,
    classes=10,
    seq_len=120,
    embed_dim=192,
    num_heads=16,
    ff_dim=192,
    dropout_rate=0.1,
    **options,
):
    """The paper's model of sound (section 4.3): spectra in, ten kinds of music out.

    As `co_oad_tr`, with a learned encoding, biases, and the sizes of the paper's audio experiments;
    sixteen heads of twelve features.

    Args:
        num_layers, ..., **options: as `co_oad_tr` has them.

    Returns:
        A `ct.StreamingModel`, as there.

    Raises:
        ValueError: as there.
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


def _classifier(name, features, classes, encoding, stack):
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
            # In a stream a window may begin at any row; on windows each begins at the next one.
            CircularPositionalEncoding(2 * n - 1, embed_dim, **encoding, name="position"),
            TransformerEncoder(**{"key_dim": embed_dim // heads, **stack}, name="encoder"),
            keras.layers.Dense(classes, name="classifier"),
        ],
        name=f"{name}_on_windows",
    )
    return StreamingModel(model, warm_up=warm_up, name=name)
