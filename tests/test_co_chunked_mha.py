"""Attention in chunks: steps against regular calls, and those against a reference in float64."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import continual_transformers_tf as ct
import reference

pytestmark = pytest.mark.sampled(3, rest="slow")

E, H, D = 6, 2, 3


def built(chunk, left_chunks, **options):
    keras.utils.set_random_seed(3)
    layer = ct.CoChunkedMultiHeadAttention(chunk, left_chunks, H, D, warm_up="partial", **options)
    x = keras.Input((None, E))
    layer(x)
    for weight in layer.weights:
        if weight.path.endswith("bias"):
            weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    return layer


def expected(layer, x, chunk, left_chunks):
    """Return the outputs (B, T, E), computed in float64 from the layer's weights."""
    wq, bq, wk, bk, wv, bv, wo, bo = (np.asarray(w, "float64") for w in layer.get_weights())
    q, k, v = (np.einsum("bte,ehd->bthd", x, w) + b for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    of = np.arange(x.shape[1]) // chunk
    before = of[:, None] - of
    mask = (before >= 0) & (before <= left_chunks)
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
    scores = reference.softmax(np.where(mask, logits, -np.inf))
    return np.einsum("bhts,bshd,hde->bte", scores, v, wo) + bo


@pytest.mark.parametrize("left_chunks", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_steps_equal_windows(chunk, left_chunks, random):
    layer = built(chunk, left_chunks)
    x = random.normal(size=(2, 8 * chunk, E)).astype("float32")
    want = expected(layer, x, chunk, left_chunks)
    assert reference.relative_error(np.asarray(layer(x)), want) < 5e-6
    first = np.asarray(layer.call_steps(x[:, : 3 * chunk]))
    steps = [np.asarray(layer.call_step(x[:, i * chunk : (i + 1) * chunk])) for i in range(3, 8)]
    assert reference.relative_error(np.concatenate([first, *steps], 1), want) < 5e-6
    assert int(layer.position[0]) == 8 * chunk
    session = ct.Session(layer)
    y = session.steps(x).reshape(want.shape)
    assert reference.relative_error(y, want) < 5e-6
    assert session.block == chunk
    # A state of the layer goes on in the session.
    layer.clean_state()
    layer.call_steps(x[:, : 4 * chunk])
    ids = session.open(2)
    session.set_state(layer.get_state(), ids)
    y = session.steps(x[:, 4 * chunk :], streams=ids).reshape(2, -1, E)
    assert reference.relative_error(y, want[:, 4 * chunk :]) < 5e-6


def test_streams_of_different_ages(random):
    layer, x = built(2, 2), random.normal(size=(3, 12, E)).astype("float32")
    layer.call_steps(np.full((3, 8, E), np.nan, "float32"))
    layer.clean_state()
    want = expected(layer, x, 2, 2)
    layer.call_steps(x[1:2, :4], streams=[1])
    got = np.asarray(layer.call_steps(np.stack([x[1, 4:8], x[0, :4]]), streams=[1, 0]))
    assert reference.relative_error(got, np.stack([want[1, 4:8], want[0, :4]])) < 5e-6


def test_a_last_chunk_may_be_shorter_in_a_regular_call(random):
    layer, x = built(4, 1), random.normal(size=(1, 10, E)).astype("float32")
    assert reference.relative_error(np.asarray(layer(x)), expected(layer, x, 4, 1)) < 5e-6


@pytest.mark.parametrize("strides", [1, 2])
def test_in_a_model_with_convolutions(strides, random, tmp_path):
    x = keras.Input((None, E))
    y = kl.Conv1D(E, 3, strides, "causal", activation="relu")(x)
    y = y + ct.CoChunkedMultiHeadAttention(3, 2, H, D)(kl.LayerNormalization()(y))
    y = kl.DepthwiseConv1D(3)(kl.ZeroPadding1D((2, 0))(y))
    y = y + ct.CoChunkedMultiHeadAttention(2, 1, H, D)(y)
    y = kl.Dense(4)(kl.GRU(5, return_sequences=True)(y))
    model = keras.Model(x, y)
    streaming = ct.convert(model, warm_up="partial")
    assert streaming.block == 6 * strides
    data = random.normal(size=(2, 24 * strides, E)).astype("float32")
    want = np.asarray(model(data))
    assert reference.relative_error(np.asarray(streaming.call_steps(data)), want) < 2e-5
    session = ct.Session(streaming)
    assert reference.relative_error(session.steps(data).reshape(want.shape), want) < 2e-5
    streaming.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert reference.relative_error(np.asarray(loaded(data)), want) < 1e-6


def test_what_sees_later_rows_is_refused(random):
    x = keras.Input((None, E))
    y = kl.MultiHeadAttention(H, D)(x, x)
    model = keras.Model(x, ct.CoChunkedMultiHeadAttention(2, 1, H, D)(y))
    with pytest.raises(ValueError, match="reads the outputs of attention"):
        ct.convert(model, 4)
    y = ct.CoChunkedMultiHeadAttention(3, 1, H, D)(kl.Conv1D(E, 2)(x))
    with pytest.raises(ValueError, match='chunks would begin elsewhere.*"causal"'):
        ct.convert(keras.Model(x, y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk=0), "chunk to be an integer >= 1"),
        (dict(left_chunks=-1), "left_chunks to be an integer >= 0"),
        (dict(sliding_window=3), "Expected no sliding_window"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ct.CoChunkedMultiHeadAttention(
            **{"chunk": 2, "left_chunks": 1, **options}, num_heads=H, key_dim=D
        )


def test_wrong_steps(random):
    layer = built(3, 1)
    x = random.normal(size=(1, 4, E)).astype("float32")
    with pytest.raises(ValueError, match="a multiple of 3 steps"):
        layer.call_steps(x)
    with pytest.raises(ValueError, match=r"\(M, 3, E\)"):
        layer.call_step(x)
