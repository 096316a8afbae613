"""A keyword spotter in the shape of the Keyword Transformer, streamed.

    python examples/models/keyword_spotter.py

The Keyword Transformer (Berg et al., arXiv 2104.00769) attends among the 98 rows of a second of
speech. Here the rows are 40 mel features every 10 ms, as there. Its first block is retroactive, so
that every step has the outputs of the model on the newest second, exactly; positions go round with
the stream. It builds the model, untrained, streams random features with `ct.Session`, and compares
the steps with the same model on windows.
"""

import keras
import numpy as np
from comparison import compare_first_window
from keras import layers

import continual_transformers_tf as ct

WINDOW = 98


def build(features=64, heads=1, blocks=3, words=12, window=WINDOW):
    """Return a classifier of windows: rows `(B, window, 40)` to words `(B, words)`."""
    rows = keras.Input((window, 40), name="rows")
    x = ct.CircularPositionalEncoding(window, features)(layers.Dense(features)(rows))
    stack = ct.TransformerEncoder(
        blocks, window, features, heads, 4 * features, key_dim=64, kind="retroactive"
    )
    x = stack(x)
    return keras.Model(rows, layers.Dense(words)(layers.Flatten()(x)), name="keyword_spotter")


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    rows = np.random.default_rng(1).normal(size=(1, 2 * WINDOW, 40)).astype("float32")
    print(compare_first_window(build(), rows))
