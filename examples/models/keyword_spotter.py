"""A keyword spotter in the shape of the Keyword Transformer, streamed.

    python examples/models/keyword_spotter.py

The Keyword Transformer (Berg et al., arXiv 2104.00769) attends among the 98 rows of a second of
speech. Here the rows are 40 mel features every 10 ms, as there. Its first block is retroactive, so
that every step has the outputs of the model on the newest second, exactly; positions go round with
the stream. It builds the model, untrained, streams random features with `ct.Session`, and compares
the steps with the same model on windows.
"""

import time

import keras
import numpy as np
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


def compare(model, steps=2 * WINDOW):
    """Stream random rows.

    Returns:
        (the largest difference from the model on the first window, as a part of the largest output;
        the median time of a step in microseconds).
    """
    window = model.inputs[0].shape[1]
    data = np.random.default_rng(1).normal(size=(1, steps, 40)).astype("float32")
    session = ct.Session(model)
    stream = session.open(1)
    outputs, times = [], []
    for t in range(steps):
        start = time.perf_counter()
        outputs.append(session.step(data[:, t], streams=stream))
        times.append(time.perf_counter() - start)
    expected = model(data[:, :window]).numpy()
    error = np.abs(outputs[window - 1] - expected).max() / np.abs(expected).max()
    return float(error), float(np.median(times[window:])) * 1e6


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    error, microseconds = compare(build())
    print(f"largest error {error:.1e}, {microseconds:.0f} us a step")
