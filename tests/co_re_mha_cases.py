"""Pairs of layers with the same weights, for the tests of CoReMultiHeadAttention."""

import keras
import numpy as np

import continual_transformers_tf as ct
import reference

N, H, D, E = 6, 3, 5, 7  # The window and sizes for tests that do not depend on them.


def pair(seq_len=N, num_heads=H, key_dim=D, features=E, *, random, layer_options=None, **options):
    """Return a continual layer and the regular one with the same weights, none of them zero."""
    regular = keras.layers.MultiHeadAttention(num_heads, key_dim, **options)
    regular.build((None, seq_len, features), (None, seq_len, features))
    outputs = regular.output_dense.kernel
    regular.set_weights([
        random.normal(scale=np.prod(w.shape[: 2 if w is outputs else 1]) ** -0.5, size=w.shape)
        for w in regular.weights
    ])  # fmt: skip
    layer = ct.CoReMultiHeadAttention(
        seq_len, num_heads, key_dim, **options, **(layer_options or {})
    )
    layer.build((None, seq_len, features))
    layer.set_weights(regular.get_weights())
    return layer, regular


def all_of_windows(regular, x, seq_len):
    """Return the regular layer's output for each full window of x [B, T, E].

    The result is [B, T - N + 1, N, ...].
    """
    windows = reference.sliding_windows(x.swapaxes(0, 1), seq_len)  # [T', N, B, E]
    count, _, batch, features = windows.shape
    # One call for all windows: each op in eager mode costs more than its work.
    flat = windows.transpose(2, 0, 1, 3).reshape(batch * count, seq_len, features)
    rows = regular(flat, flat).numpy()
    return rows.reshape(batch, count, *rows.shape[1:])
