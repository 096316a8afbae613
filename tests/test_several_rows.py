"""Attention, positions and masks before strides, where a step of the model has several rows."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import attention_kinds
import continual_transformers_tf as ct
import reference
from attention_kinds import KINDS, E, N
from strided_models import check

pytestmark = pytest.mark.sampled(6, rest="slow")

FAR = 10**9 + 8  # A multiple of all strides below.


def strided(before, strides, size=3):
    """Return a model with strides after what a function puts there."""
    x = keras.Input((None, E))
    y = before(kl.Dense(E)(x))
    y = kl.Conv1D(4, size, strides, padding="causal")(y)
    return keras.Model(x, kl.Dense(3)(y))


def of_kind(kind, random, **options):
    """Return a function that adds causal attention of a kind to its input."""
    options = {"sliding_window": N, **KINDS[kind], "query_index": -1, **options}
    layer = attention_kinds.build(kind, random, single_output=False, **options)

    def attend(x):
        # The layer was built for windows of N rows, and is called on sequences.
        return x + kl.Dense(E)(layer(x, use_causal_mask=True))

    return attend


@pytest.mark.parametrize("strides", [2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_attention(kind, strides, random):
    """With strides of 7, a step writes more rows than the window has."""
    check(strided(of_kind(kind, random), strides), random, seq_len=N, bound=2e-5)


OTHERS = {
    "keras": lambda x: (
        x + kl.MultiHeadAttention(2, 3, sliding_window=N)(x, x, use_causal_mask=True)
    ),
    "keras_gated": lambda x: kl.MultiHeadAttention(2, 3, sliding_window=N, use_gate=True)(
        x, x, use_causal_mask=True
    ),
    "rotary": lambda x: ct.RotaryEmbedding()(x),
    "positions": lambda x: ct.CircularPositionalEncoding(60, E, call_update_index_steps=0)(x),
    "residual": lambda x: ct.CoResidual(
        ct.CoSiMultiHeadAttention(N, 2, 3, sliding_window=N, single_output=False)
    )(x, use_causal_mask=True),
    "after_valid": lambda x: kl.MultiHeadAttention(2, 3, sliding_window=N)(
        y := kl.Conv1D(E, 4, padding="valid")(x), y, use_causal_mask=True
    ),
    "between_strides": lambda x: kl.MultiHeadAttention(2, 3, sliding_window=N)(
        y := kl.Conv1D(E, 2, 2, padding="causal")(x), y, use_causal_mask=True
    ),
    "after_same": lambda x: kl.MultiHeadAttention(2, 3, sliding_window=N)(
        y := kl.Conv1D(E, 3, padding="same")(x), y, use_causal_mask=True
    ),
}


@pytest.mark.parametrize("strides", [2, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers(name, strides, random):
    check(strided(OTHERS[name], strides), random, blocks=10, seq_len=N, bound=2e-5)


# Masks.


def masked(x, random):
    """Return x with zeros in a fifth of its rows."""
    return np.where(random.random((*x.shape[:2], 1)) < 0.2, 0, x).astype("float32")


MASKED = {
    "gru": lambda x: kl.GRU(E, return_sequences=True)(x),
    "gru_reset_before": lambda x: kl.GRU(E, return_sequences=True, reset_after=False)(x),
    "lstm": lambda x: kl.LSTM(E, return_sequences=True)(x),
    "rnn": lambda x: kl.RNN([kl.SimpleRNNCell(E), kl.GRUCell(E)], return_sequences=True)(x),
    "attention": lambda x: kl.MultiHeadAttention(2, 3, sliding_window=N)(
        x, x, use_causal_mask=True
    ),
}


@pytest.mark.filterwarnings("ignore:Layer 'conv1d:UserWarning")  # It destroys the mask.
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("name", MASKED)
def test_masks_of_rows(name, strides, random):
    """A session heeds the mask of each row, as steps in Keras do."""
    x = keras.Input((None, E))
    y = MASKED[name](kl.Masking()(x))
    model = keras.Model(x, kl.Conv1D(4, 3, strides, padding="causal")(y))
    given = masked(random.normal(size=(2, 30, E)), random)
    expected = np.asarray(model(given))
    assert reference.relative_error(model(given + 1e-9), expected) > 1e-3  # The mask matters.
    streaming = ct.convert(model, N, warm_up="partial")
    if name == "attention":  # A regular call also masks queries, whose rows the convolution reads.
        expected = np.asarray(streaming.call_steps(given))
        streaming.clean_state()
    assert reference.relative_error(streaming.call_steps(given), expected) < 5e-6
    session = ct.Session(streaming)
    halves = [session.steps(given[:, :12]), session.steps(given[:, 12:])]
    assert reference.relative_error(np.concatenate(halves, 1), expected) < 5e-6


def hidden(x):
    """Return x with zeros in rows whose first number is small, and a mask of these rows."""
    return kl.Masking()(keras.ops.where(x[..., :1] > 0.3, x, keras.ops.zeros_like(x)))


def recurrent(x, **options):
    return kl.GRU(E, return_sequences=True)(x, **options)


HEEDED = {
    "multiply": lambda x: kl.Multiply()([hidden(x), x]),
    "multiply_hidden": lambda x: kl.Multiply()([hidden(x), hidden(kl.Dense(E)(x))]),
    "maximum": lambda x: kl.Maximum()([hidden(x), x]),
    "minimum": lambda x: kl.Minimum()([x, hidden(x)]),
    "of_the_call": lambda x: recurrent(x, mask=x[..., 0] > 0.3),
    "through_a_residual": lambda x: recurrent(
        ct.CoResidual(
            ct.CoSiMultiHeadAttention(N, 2, 3, single_output=False, sliding_window=N)
        )(hidden(x), use_causal_mask=True)
    ),
    "causal_residual": lambda x: ct.CoResidual(
        ct.CoSiMultiHeadAttention(
            N, 2, 3, single_output=False, query_index=-2, sliding_window=N - 1
        )
    )(x, use_causal_mask=True),
}  # fmt: skip


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("name", HEEDED)
def test_a_session_heeds_what_steps_in_keras_heed(name, strides, random):
    x = keras.Input((None, E))
    model = keras.Model(x, kl.AveragePooling1D(strides, strides)(HEEDED[name](x)))
    streaming = ct.convert(model, N, warm_up="partial")
    given = random.normal(size=(2, 24, E)).astype("float32")
    expected = np.asarray(streaming.call_steps(given))
    first = max(0, streaming._graph.outputs[0].lag)
    got = ct.Session(streaming).steps(given).reshape(expected.shape)
    assert reference.relative_error(got[:, first:], expected[:, first:]) < 5e-6


def test_integers_are_not_delayed_before_strides():
    x = keras.Input((None, E), dtype="int32")
    y = keras.ops.cast(ct.CoDelay(2, dtype="int32")(x), "float32")
    model = keras.Model(x, kl.AveragePooling1D(2, 2)(y))
    with pytest.raises(ValueError, match="Cast the input to floats first"):
        ct.Session(ct.convert(model, warm_up="partial"))


@pytest.mark.filterwarnings("ignore:Layer 'conv1d:UserWarning")
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_masks_of_tokens(dtype, strides, random):
    x = keras.Input((None,), dtype=dtype)
    y = kl.Embedding(5, E, mask_zero=True)(x)
    y = kl.GRU(E, return_sequences=True)(y)
    model = keras.Model(x, kl.Conv1D(4, 3, strides, padding="causal")(y))
    given = random.integers(0, 5, (2, 24)).astype(dtype)
    expected = np.asarray(model(given))
    session = ct.Session(model)
    assert reference.relative_error(session.steps(given), expected) < 5e-6


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_gap_is_a_gap_for_all_rows_of_a_step(dtype, random):
    """Steps before the gap are attended to after it, and its own rows are not."""
    model = strided(OTHERS["keras"], 2)
    session = ct.Session(model, seq_len=N, cache_dtype=dtype)
    x = random.normal(size=(1, 20, E)).astype("float32")
    changed = x.copy()
    changed[:, 8:10] = random.normal(size=(1, 2, E))
    gap = np.ones((1, 10), bool)
    gap[0, 4] = False
    a, b = session.open(2)
    with_gap = [session.steps(y, streams=[i], key_mask=gap) for i, y in ((a, x), (b, changed))]
    # Rows of the gap are queries, and the convolution reads 3 rows.
    assert np.abs(with_gap[0][:, 4] - with_gap[1][:, 4]).max() > 1e-3
    np.testing.assert_array_equal(with_gap[0][:, 6:], with_gap[1][:, 6:])
    assert np.abs(with_gap[0] - session.steps(x, streams=session.open(1)))[:, 6:].max() > 1e-3


# States.


@pytest.mark.parametrize("taken", [1, 2, 3, 9])
def test_a_state_moves_while_the_window_fills(taken, random):
    """A copied state has the rows of a ring that were written, which are more than the steps."""
    session = ct.Session(strided(OTHERS["keras"], 3), seq_len=8)
    x = random.normal(size=(1, 60, E)).astype("float32")
    stream, other = session.open(2)
    session.steps(np.full((1, 60, E), 1e3, "float32"), streams=[other])
    session.steps(x[:, : 3 * taken], streams=[stream])
    state = session.get_state([stream])
    session.set_state(state, [other])
    rest = [session.steps(x[:, 3 * taken :], streams=[i]) for i in (stream, other)]
    np.testing.assert_array_equal(*rest)


@pytest.mark.parametrize("kind", ["rotary", "rotary_part", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_into_a_stream(kind, dtype, random):
    """Steps are as exact as those of a young stream, and their number does not overflow."""
    x = keras.Input((None, E), dtype=dtype)
    layer = attention_kinds.build(
        kind, random, single_output=False, sliding_window=N, query_index=-1, dtype=dtype
    )
    y = kl.Dense(4, dtype=dtype)(layer(x, use_causal_mask=True))
    model = keras.Model(x, kl.AveragePooling1D(2, 2, dtype=dtype)(y))
    streaming = ct.convert(model, N, warm_up="partial")
    given = random.normal(size=(3, 24, E)).astype(dtype)
    young = ct.Session(streaming).steps(given)
    streaming.ensure_streams(3)
    state = streaming.get_state()
    far = np.array([FAR, 2**61, 2**62])
    for part in keras.tree.flatten(state):
        if part.dtype == np.int64 and part.shape == (3,):
            part[:] = far
        if part.dtype == bool:
            part[:] = False
    session = ct.Session(streaming)
    ids = session.open(3)
    session.set_state(state, ids)
    halves = [session.steps(given[:, :8], streams=ids), session.steps(given[:, 8:], streams=ids)]
    bound = reference.BOUNDS[dtype] * 4
    assert reference.relative_error(np.concatenate(halves, 1), young) < bound


# `ct.explain` and `ct.cost` of such models.


@pytest.mark.parametrize(
    "place",
    ["attention pooling", "pooling attention", "pooling residual pooling", "attention delay"],
)
def test_the_windows_that_steps_equal(place, random):
    """explain names the shortest windows on which the model gives what a step gives."""
    layers = {
        "attention": OTHERS["keras"],
        "pooling": lambda x: kl.AveragePooling1D(2, 2)(x),
        "residual": OTHERS["residual"],
        "delay": lambda x: kl.AveragePooling1D(4, 2)(ct.CoDelay(0)(x)),
    }
    x = y = keras.Input((None, E))
    for name in place.split():
        y = layers[name](y)
    model = keras.Model(x, y)
    found = ct.explain(model, N)
    assert found.equals_windows
    (least,) = (int(word) for word in found.windows.split() if word.isdigit())
    block = ct.Session(model, seq_len=N).block
    given = random.normal(size=(1, 64, E)).astype("float32")
    whole = np.asarray(model(given))[:, -1]
    enough = least + -least % block  # Its rows must end where those of the stream end.
    for length in (enough, enough - block):
        window = np.asarray(model(given[:, -length:]))[:, -1]
        assert (reference.relative_error(window, whole) < 1e-5) == (length >= least)


def test_no_window_equals_a_step_that_keeps_rows_of_full_windows(random):
    """The older of two pooled rows sees fewer steps in a window than in a stream."""
    x = keras.Input((None, E))
    y = kl.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True)
    found = ct.explain(keras.Model(x, kl.AveragePooling1D(2, 2)(y)), N)
    assert not found.equals_windows
    assert "convolution or pooling" in found.windows


def test_the_cost_is_that_of_every_row():
    def cost(strides):
        return ct.cost(ct.convert(strided(OTHERS["keras"], strides), N))

    x = keras.Input((None, E))
    attention = ct.cost(ct.convert(keras.Model(x, OTHERS["keras"](kl.Dense(E)(x))), N))
    convolution = ct.cost(ct.convert(keras.Model(x, kl.Dense(3)(kl.Conv1D(4, 3, 1, "causal")(x)))))
    for strides in (1, 2, 5):
        found = cost(strides)
        expected = attention.multiplications * strides + convolution.multiplications
        assert found.multiplications == expected
        assert found.exponentials == attention.exponentials * strides
        assert found.state_bytes == cost(1).state_bytes
