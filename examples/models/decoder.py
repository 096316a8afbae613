"""A decoder of today, streamed: rotary positions, grouped queries, RMS norms, SwiGLU.

    python examples/models/decoder.py

It builds the untrained model, takes the steps of a stream with `ct.Session`, and compares them
with the same model on the whole sequence.
"""

import keras
import numpy as np
from comparison import compare

import continual_transformers_tf as ct


def build(vocabulary=1000, features=128, heads=8, key_heads=2, blocks=4, window=64, **options):
    """Return a causal language model: tokens `(B, T)` to logits `(B, T, vocabulary)`.

    Every query attends to the newest `window` steps, so the model may be called on sequences of any
    length, and its rows are the steps of a stream. `options` are further ones of the attention.
    """
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(vocabulary, features)(tokens)
    for _ in range(blocks):
        attention = ct.CoSiMultiHeadAttention(
            window,
            heads,
            features // heads,
            num_key_value_heads=key_heads,
            rotary=ct.Rotary(max_wavelength=500_000),
            use_bias=False,
            sliding_window=window,
            single_output=False,
            **options,
        )
        y = keras.layers.RMSNormalization()(x)
        x = x + attention(y, y, use_causal_mask=True)
        x = x + swiglu(keras.layers.RMSNormalization()(x), 4 * features)
    x = keras.layers.RMSNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(vocabulary, use_bias=False)(x), name="decoder")


def swiglu(x, size):
    """Apply a gated feed-forward layer (Shazeer, arXiv 2002.05202)."""
    gate = keras.layers.Dense(size, activation="silu", use_bias=False)(x)
    up = keras.layers.Dense(size, use_bias=False)(x)
    return keras.layers.Dense(x.shape[-1], use_bias=False)(gate * up)


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    tokens = np.random.default_rng(1).integers(0, 1000, (1, 300)).astype("int32")
    print(compare(build(), tokens))
