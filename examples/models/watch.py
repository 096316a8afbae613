"""A recurrent layer and attention on a smartwatch's sensors, streamed.

    python examples/models/watch.py

A convolution halves the rate, a GRU follows the wearer, and causal attention looks back at the
newest rows. It builds the model, untrained, streams random samples with `ct.Session`, and compares
the steps with the same model on the whole recording. With labels, `fit` trains it on whole
recordings.
"""

import keras
import numpy as np
from comparison import compare
from keras import layers


def build(sensors=6, features=48, heads=4, window=64, activities=6):
    """Return a classifier: samples `(B, T, sensors)` to activities `(B, T / 2, activities)`."""
    samples = keras.Input((None, sensors), name="samples")
    x = layers.Conv1D(features, 5, strides=2, padding="causal", activation="relu")(samples)
    x = layers.GRU(features, return_sequences=True)(x)
    attention = layers.MultiHeadAttention(heads, features // heads, sliding_window=window)
    x = layers.LayerNormalization()(x + attention(x, x, use_causal_mask=True))
    return keras.Model(samples, layers.Dense(activities)(x), name="watch")


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(1)
    print(compare(build(), random.normal(size=(1, 1000, 6)).astype("float32"), seq_len=64))
