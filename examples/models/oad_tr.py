"""OadTR with its decoder, streamed: what happens now, and what will happen next.

    python examples/models/oad_tr.py

OadTR (Wang et al., arXiv 2106.11149) encodes the newest 64 features of a video. A decoder with
learned queries, one for each of the coming steps, attends to all of them. The encoder is
retroactive, so every step has the outputs of the model on the newest window, exactly. It builds the
model, untrained, streams random features with `ct.Session`, and compares the steps with the same
model on windows.
"""

import time

import keras
import numpy as np
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


def compare(model, steps=2 * WINDOW):
    """Stream random features.

    Returns:
        (the largest difference from the model on the first window, as a part of the largest output;
        the median time of a step in microseconds).
    """
    window, inputs = model.inputs[0].shape[1:]
    data = np.random.default_rng(1).normal(size=(1, steps, inputs)).astype("float32")
    session = ct.Session(model)
    stream = session.open(1)
    outputs, times = [], []
    for t in range(steps):
        start = time.perf_counter()
        outputs.append(session.step(data[:, t], streams=stream))
        times.append(time.perf_counter() - start)
    error = max(
        np.abs(got - want.numpy()).max() / np.abs(want).max()
        for got, want in zip(outputs[window - 1], model(data[:, :window]), strict=True)
    )
    return float(error), float(np.median(times[window:])) * 1e6


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    error, microseconds = compare(build())
    print(f"largest error {error:.1e}, {microseconds:.0f} us a step")
