"""OadTR with its decoder, streamed: what happens now, and what will happen next.

    python examples/models/oad_tr.py

OadTR (Wang et al., arXiv 2106.11149) encodes the newest 64 features of a video. A decoder with
learned queries, one for each of the coming steps, attends to all of them. The encoder is
retroactive, so every step has the outputs of the model on the newest window, exactly. It builds the
model, untrained, streams random features with `ct.Session`, and compares the steps with the same
model on windows.
"""

import keras
import numpy as np
from comparison import compare_first_window
from keras import layers

import continual_transformers_tf as ct

WINDOW = 64


def build(features=128, heads=4, ahead=8, classes=22, decoder_layers=2, window=WINDOW, inputs=256):
    """Return a model: `(B, window, inputs)` to actions now and ahead, each `(B, ..., classes)`."""
    video = keras.Input((window, inputs), name="video")
    x = ct.CircularPositionalEncoding(2 * window - 1, features)(layers.Dense(features)(video))
    x = ct.CoReTransformerEncoder(window, features, heads, features)(x)
    y = ct.LearnedQueries(ahead, features)(x)
    for _ in range(decoder_layers):
        size = features // heads
        y = layers.LayerNormalization()(y + layers.MultiHeadAttention(heads, size)(y, y))
        y = layers.LayerNormalization()(y + layers.MultiHeadAttention(heads, size)(y, x))
        z = layers.Dense(features)(layers.Dense(features, activation="relu")(y))
        y = layers.LayerNormalization()(y + z)
    future = layers.Dense(classes, name="future")(y)
    joined = layers.Concatenate()([x[:, -1], layers.GlobalAveragePooling1D()(y)])
    return keras.Model(video, [layers.Dense(classes, name="now")(joined), future], name="oad_tr")


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    video = np.random.default_rng(1).normal(size=(1, 2 * WINDOW, 256)).astype("float32")
    print(compare_first_window(build(), video))
