"""Pairs of layers with the same weights, for the tests of CoSiMultiHeadAttention."""

import keras
import numpy as np

import continual_transformers_tf as ct
import reference

N, H, D, E = 6, 3, 5, 7  # The window and sizes for tests that do not depend on them.


def pair(seq_len=N, num_heads=H, key_dim=D, features=E, *, random, layer_options=None, **options):
    """Return a continual layer and the regular one with the same weights, none of them zero.

    If inputs are of order one, so are their projections and the logits.
    """
    dtype = options.get("dtype", "float32")
    regular = keras.layers.MultiHeadAttention(num_heads, key_dim, **options)
    regular.build((None, seq_len, features), (None, seq_len, features))
    outputs = regular.output_dense.kernel
    regular.set_weights([
        random.normal(scale=np.prod(w.shape[: 2 if w is outputs else 1]) ** -0.5, size=w.shape)
        for w in regular.weights
    ])  # fmt: skip
    layer = ct.CoSiMultiHeadAttention(
        seq_len, num_heads, key_dim, **options, **(layer_options or {})
    )
    layer.build((None, seq_len, features))
    layer.set_weights(regular.get_weights())
    assert layer.compute_dtype == dtype
    return layer, regular


def newest_of_windows(regular, x, seq_len, every=1, **kwargs):
    """Return the regular layer's newest row for each full window of x [B, T, E].

    The result is [B, T - N + 1, E]. With `every`, only the first and each `every`th after it.
    """
    windows = reference.sliding_windows(x.swapaxes(0, 1), seq_len)[::every]  # [T', N, B, E]
    windows = windows.transpose(2, 0, 1, 3)
    batch, count = windows.shape[:2]
    flat = windows.reshape(batch * count, *windows.shape[2:])
    # The newest row needs only the newest query, unless a mask counts from the first query.
    queries = flat if kwargs or regular.get_config()["sliding_window"] else flat[:, -1:]
    newest = [
        regular(queries[i : i + 256], flat[i : i + 256], **kwargs)[:, -1]
        for i in range(0, len(flat), 256)
    ]
    return np.concatenate(newest).reshape(batch, count, -1)
