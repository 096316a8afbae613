"""Convolutions, pooling and spectra on the steps of streams, against Keras on whole sequences."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import continual_transformers_tf as ct
import reference

F = 5


def sequence(model, x, block=1):
    """Return Keras' outputs for the whole sequence, (T / stride, ...)."""
    return np.asarray(model(x[np.newaxis]))[0]


def streamed(streaming, x, splits):
    """Return a StreamingModel's outputs for the steps x, in calls of these numbers of steps."""
    parts, first = [], 0
    for count in splits:
        y = streaming.call_steps(x[:, first : first + count])
        parts.append(np.asarray(y))
        first += count
    return np.concatenate(parts, 1)


def check(model, random, blocks=12, first=None, bound=5e-6, seq_len=None, **options):
    """Compare steps of two streams with Keras on the whole sequence, in Keras and in a Session."""
    streaming = ct.convert(model, seq_len, warm_up="partial", **options)
    block, features = streaming.block, model.inputs[0].shape[2:]
    x = random.normal(size=(2, blocks * block, *features)).astype("float32")
    delay = streaming._graph.outputs[0].delay
    lag = streaming._graph.outputs[0].lag
    first = max(0, lag) if first is None else first
    expected = np.stack([np.asarray(model(x[i : i + 1]))[0] for i in range(2)])
    # Row n of the sequence comes at step n + lag.
    rows = blocks * block // streaming._graph.outputs[0].stride
    got = streamed(streaming, x, [block, 3 * block, (blocks - 4) * block])
    assert got.shape[1] == rows
    got, lag_rows = got[:, first:], first - lag
    want = expected[:, lag_rows : lag_rows + got.shape[1]]
    assert want.shape == got.shape, (want.shape, got.shape)
    assert expected.shape[1] - delay == rows - lag
    assert reference.relative_error(got, want) < bound
    session = ct.Session(streaming)
    assert session.block == block
    ids = session.open(2)
    parts = [session.steps(x[:, : 4 * block], streams=ids)]
    for step in range(4, blocks):
        now = x[:, step * block : (step + 1) * block]
        parts.append(session.step(now if block > 1 else now[:, 0], streams=ids)[:, np.newaxis])
    y = np.concatenate(parts, 1)
    y = y.reshape(2, rows, *y.shape[y.ndim - (got.ndim - 2) :])[:, first:]
    assert reference.relative_error(y, want) < bound
    # The state of the Keras model continues in the session.
    half = blocks // 2 * block
    streaming.clean_state()
    streaming.call_steps(x[:, :half])
    session.set_state(streaming.get_state(), ids)
    y = session.steps(x[:, half:], streams=ids)
    y = y.reshape(2, -1, *want.shape[2:])
    after = max(0, first - (rows - y.shape[1]))
    assert reference.relative_error(y[:, after:], want[:, want.shape[1] - y.shape[1] + after :]) < bound
    return streaming


CONVOLUTIONS = {
    "causal": dict(padding="causal"),
    "causal_dilated": dict(padding="causal", dilation_rate=3),
    "causal_strided": dict(padding="causal", strides=2),
    "causal_strided_wide": dict(padding="causal", strides=3, kernel_size=2),
    "same": dict(padding="same"),
    "same_dilated": dict(padding="same", dilation_rate=2),
    "same_strided": dict(padding="same", strides=2, kernel_size=4),
    "valid": dict(padding="valid"),
    "valid_dilated": dict(padding="valid", dilation_rate=2),
    "valid_strided": dict(padding="valid", strides=2),
    "valid_strided_wide": dict(padding="valid", strides=4, kernel_size=5),
    "valid_narrow": dict(padding="valid", strides=4, kernel_size=2),
    "groups": dict(padding="causal", groups=2, filters=4),
    "activation": dict(padding="causal", activation="gelu", use_bias=False),
    "one_row_strided": dict(kernel_size=1, strides=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv1d(name, random):
    options = {"filters": 6, "kernel_size": 3, **CONVOLUTIONS[name]}
    features = 4 if name == "groups" else F
    x = keras.Input((None, features))
    check(keras.Model(x, kl.Conv1D(**options)(x)), random)


@pytest.mark.parametrize("kind", [kl.DepthwiseConv1D, kl.SeparableConv1D])
@pytest.mark.parametrize(
    "options",
    [
        dict(padding="same"),
        dict(padding="valid", strides=2),
        dict(padding="valid", dilation_rate=2, depth_multiplier=2),
    ],
)
def test_other_convolutions(kind, options, random):
    x = keras.Input((None, F))
    given = {"filters": 4} if kind is kl.SeparableConv1D else {}
    y = kind(kernel_size=3, bias_initializer="glorot_normal" if False else "ones", **given, **options)(x)
    check(keras.Model(x, y), random)


@pytest.mark.parametrize("kind", [kl.AveragePooling1D, kl.MaxPooling1D])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(2, 2, "valid"), (3, 1, "same"), (3, 1, "valid"), (4, 2, "same"), (4, 3, "valid"), (2, 3, "valid")],
)
def test_pooling(kind, size, stride, padding, random):
    x = keras.Input((None, F))
    check(keras.Model(x, kind(size, stride, padding)(x)), random)


@pytest.mark.parametrize("mode", ["log", "magnitude", "psd", "real", "imag", "stft"])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_spectrogram(mode, padding, random):
    x = keras.Input((None, 1))
    layer = kl.STFTSpectrogram(mode, 16, 6, padding=padding)
    check(keras.Model(x, kl.Dense(4)(layer(x))), random, bound=2e-5)


def test_padding_in_front(random):
    x = keras.Input((None, F))
    y = kl.Conv1D(4, 3, strides=2)(kl.ZeroPadding1D((2, 0))(x))
    check(keras.Model(x, y), random)


def test_stack_of_strides(random):
    x = keras.Input((None, F))
    y = kl.Conv1D(6, 3, 2, "causal", activation="relu")(x)
    y = kl.Dense(4, "tanh")(y)
    y = kl.MaxPooling1D(2)(y)
    y = kl.Conv1D(3, 2, padding="causal")(y)
    streaming = check(keras.Model(x, y), random)
    assert streaming.block == 4


def test_valid_then_causal_reads_no_row_before_the_first(random):
    x = keras.Input((None, F))
    y = kl.Conv1D(4, 4, activation="sigmoid", bias_initializer="ones")(x)
    y = kl.Conv1D(4, 3, padding="causal")(y)
    check(keras.Model(x, y), random)


def test_valid_in_several_rows_a_step(random):
    x = keras.Input((None, F))
    y = kl.Conv1D(4, 4, bias_initializer="ones")(x)
    y = kl.Conv1D(4, 3, padding="causal")(y)
    y = kl.Conv1D(4, 3, padding="same")(y)
    y = kl.Conv1D(4, 3, strides=3)(y)
    check(keras.Model(x, y), random)


@pytest.mark.parametrize("kind", [kl.GRU, kl.LSTM, kl.SimpleRNN])
@pytest.mark.parametrize("before", [None, "valid", "causal"])
def test_recurrent(kind, before, random):
    x = keras.Input((None, F))
    y = x if before is None else kl.Conv1D(F, 3, padding=before)(x)
    y = kl.Dense(3)(kind(7, return_sequences=True, bias_initializer="glorot_uniform" if False else "ones")(y))
    assert check(keras.Model(x, y), random).goes_on


def test_gru_that_resets_before_the_product(random):
    x = keras.Input((None, F))
    y = kl.GRU(6, reset_after=False, return_sequences=True)(x)
    check(keras.Model(x, y), random)


def test_stacked_cells(random):
    x = keras.Input((None, F))
    y = kl.RNN([kl.GRUCell(4), kl.LSTMCell(5)], return_sequences=True)(x)
    check(keras.Model(x, y), random)


def test_recurrence_before_strides(random):
    x = keras.Input((None, F))
    y = kl.LSTM(4, return_sequences=True)(x)
    check(keras.Model(x, kl.AveragePooling1D(2)(y)), random)
