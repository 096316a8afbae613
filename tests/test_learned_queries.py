"""Attention from learned queries to the window of a stream, against Keras on windows."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import continual_transformers_tf as ct
import reference

N, E, H, D = 5, 6, 2, 3


def decoder(x, queries):
    y = ct.LearnedQueries(queries, E)(x)
    y = kl.LayerNormalization()(y + kl.MultiHeadAttention(H, D)(y, y))
    return kl.Dense(3)(y + kl.MultiHeadAttention(H, D)(y, x))


@pytest.mark.sampled(4, rest="slow")
@pytest.mark.parametrize("queries", [1, 3, N, 9])
@pytest.mark.parametrize("below", ["dense", "convolution", "causal", "retroactive"])
def test_steps_equal_windows(below, queries, random, tmp_path):
    inputs = keras.Input((N, E))
    x = kl.Dense(E, "tanh")(inputs)
    if below == "convolution":
        x = kl.Conv1D(E, 1)(x)
    elif below == "causal":
        attention = kl.MultiHeadAttention(H, D, sliding_window=1)
        x = x + attention(x, x, use_causal_mask=True)
    elif below == "retroactive":
        x = ct.CoReTransformerEncoder(N, E, H, 7)(x)
    model = keras.Model(inputs, [decoder(x, queries), x[:, -1]])
    streaming = ct.convert(model, N, warm_up="partial")
    data = random.normal(size=(2, 12, E)).astype("float32")
    got = streaming.call_steps(data)
    session = ct.Session(streaming)
    session.save(tmp_path / "model.safetensors")
    loaded = ct.Session.load(tmp_path / "model.safetensors")
    of_sessions = (session.steps(data), loaded.steps(data))
    for y in of_sessions:
        for a, b in zip(y, got, strict=True):
            assert reference.relative_error(a, np.asarray(b)) < 5e-6
    for t in range(N - 1, 12):
        want = model(data[:, t - N + 1 : t + 1])
        for a, b in zip(got, want, strict=True):
            # Steps have no axis for a single row.
            a = np.asarray(a[:, t]).reshape(b.shape)
            assert reference.relative_error(a, np.asarray(b)) < 5e-6


def test_the_newest_row_asks(random):
    inputs = keras.Input((N, E))
    x = kl.Dense(E, "tanh")(inputs)
    newest = x[:, -1:]
    model = keras.Model(inputs, kl.Dense(3)(newest + kl.MultiHeadAttention(H, D)(newest, x)))
    data = random.normal(size=(2, 12, E)).astype("float32")
    got = ct.Session(ct.convert(model, N)).steps(data)
    for t in range(N - 1, 12):
        want = model(data[:, t - N + 1 : t + 1])[:, 0]
        assert reference.relative_error(got[:, t], np.asarray(want)) < 5e-6


def test_attention_among_rows_that_are_no_steps(random):
    inputs = keras.Input((N, E))
    y = kl.Reshape((3, 2))(kl.MultiHeadAttention(H, D)(inputs, inputs)[:, -1])
    model = keras.Model(inputs, kl.MultiHeadAttention(1, 2)(y, y))
    data = random.normal(size=(2, 12, E)).astype("float32")
    got = ct.Session(ct.convert(model, N)).steps(data)
    for t in range(N - 1, 12):
        want = np.asarray(model(data[:, t - N + 1 : t + 1]))
        assert reference.relative_error(got[:, t], want) < 5e-6


def test_gradients_reach_the_queries(random):
    inputs = keras.Input((N, E))
    model = keras.Model(inputs, kl.Flatten()(decoder(inputs, 3)))
    model.compile(optimizer="sgd", loss="mse")
    before = [np.asarray(w) for w in model.trainable_weights if "queries" in w.path]
    model.fit(random.normal(size=(8, N, E)), random.normal(size=(8, 9)), verbose=0)
    after = [np.asarray(w) for w in model.trainable_weights if "queries" in w.path]
    assert len(before) == 1
    assert np.abs(after[0] - before[0]).max() > 0


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (2.5, 3)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match="to be an integer >= 1"):
        ct.LearnedQueries(*sizes)
