"""Convolutions, pooling and spectra on the steps of streams, against Keras on whole sequences."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl

import continual_transformers_tf as ct
import reference
from strided_models import check

pytestmark = pytest.mark.sampled(4, rest="slow")

F = 5


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
    y = kind(kernel_size=3, bias_initializer="ones", **given, **options)(x)
    check(keras.Model(x, y), random)


@pytest.mark.parametrize("kind", [kl.AveragePooling1D, kl.MaxPooling1D])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (2, 2, "valid"),
        (3, 1, "same"),
        (3, 1, "valid"),
        (4, 2, "same"),
        (4, 3, "valid"),
        (2, 3, "valid"),
    ],
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


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_angles_of_a_spectrogram(padding, channels, random):
    """As directions: the angle of a negative number is pi or -pi, by the sign of a zero."""
    x = keras.Input((None, channels))
    angles = kl.STFTSpectrogram("angle", 16, 6, padding=padding, expand_dims=channels > 1)(x)
    y = keras.ops.concatenate([keras.ops.cos(angles), keras.ops.sin(angles)], 2)
    check(keras.Model(x, y), random, bound=1e-4)


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


@pytest.mark.parametrize("strides", [1, 2])
def test_rows_before_the_first_may_be_nan(strides, random):
    x = keras.Input((None, F))
    difference = kl.DepthwiseConv1D(2, use_bias=False)
    # Every step is greater than half the next one. Only of row -1, where there is no step before,
    # the difference is negative, and its root NaN.
    y = keras.ops.sqrt(difference(keras.ops.sigmoid(0.1 * x)))
    y = kl.Conv1D(4, 3, strides=strides, padding="causal")(y)
    difference.set_weights([np.broadcast_to([[[1.0]], [[-0.5]]], (2, F, 1))])
    check(keras.Model(x, y), random)


@pytest.mark.parametrize("kind", [kl.GRU, kl.LSTM, kl.SimpleRNN])
@pytest.mark.parametrize("before", [None, "valid", "causal"])
def test_recurrent(kind, before, random):
    x = keras.Input((None, F))
    y = x if before is None else kl.Conv1D(F, 3, padding=before)(x)
    y = kl.Dense(3)(kind(7, return_sequences=True, bias_initializer="ones")(y))
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


# Before attention.

N = 4


def attention(**options):
    return ct.CoSiMultiHeadAttention(N, 2, 3, **options)


@pytest.mark.parametrize("padding", ["causal", "valid"])
@pytest.mark.parametrize("strides", [1, 2])
def test_causal_attention_over_a_convolution(padding, strides, random):
    x = keras.Input((None, F))
    y = kl.Conv1D(6, 3, strides=strides, padding=padding, activation="relu")(x)
    y = y + kl.MultiHeadAttention(2, 3, sliding_window=N)(y, y, use_causal_mask=True)
    check(keras.Model(x, kl.Dense(2)(y)), random, seq_len=N)


@pytest.mark.parametrize("kind", ["attention", "encoder", "stack"])
@pytest.mark.parametrize("padding", ["causal", "valid"])
def test_newest_attention_over_a_strided_convolution(kind, padding, random):
    """Steps equal attention on the newest N outputs of the convolution on the whole sequence."""
    layer = {
        "attention": attention(),
        "encoder": ct.CoSiTransformerEncoder(N, 6, 2, 8),
        "stack": ct.TransformerEncoder(2, N, 6, 2, 8, kind="retroactive"),
    }[kind]
    x = keras.Input((None, F))
    rows = kl.Conv1D(6, 3, strides=2, padding=padding, name="conv")(x)
    y = layer(rows, rows) if kind == "attention" else layer(rows)
    if kind == "stack" and padding == "valid":
        with pytest.raises(ValueError, match='is given no row in the first 1 steps.*"causal"'):
            ct.convert(keras.Model(x, y), N)
        return
    model = keras.Model(x, kl.Dense(2)(y))
    streaming = ct.convert(model, N, warm_up="partial")
    convolution = keras.Model(x, rows)
    r = keras.Input((None, 6))
    z = layer(r, r) if kind == "attention" else layer(r)
    rest = keras.Model(r, model.layers[-1](z))
    data = random.normal(size=(2, 24, F)).astype("float32")
    got = np.asarray(streaming.call_steps(data))
    session = ct.Session(streaming)
    assert reference.relative_error(session.steps(data), got) < 5e-6
    all_rows = np.asarray(convolution(data))
    lag = 12 - all_rows.shape[1]
    for step in range(lag, 12):
        window = all_rows[:, max(0, step - lag - N + 1) : step - lag + 1]
        want = np.asarray(rest(window)).reshape(2, 2)
        assert reference.relative_error(got[:, step].reshape(2, 2), want) < 5e-6


@pytest.mark.parametrize("kind", [kl.GlobalAveragePooling1D, kl.GlobalMaxPooling1D])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("block", [1, 2])
def test_pooling_of_the_whole_window(kind, keepdims, block, random):
    x = keras.Input((None, F))
    y = kl.Conv1D(6, 3, padding="causal")(x)
    pooled = kl.Dense(3)(kind(keepdims=keepdims)(y))
    slow = kl.Conv1D(2, 2, 2)(y)[:, -1] if block == 2 else y[:, -1]
    model = keras.Model(x, [pooled, slow])
    streaming = ct.convert(model, N, warm_up="partial")
    assert streaming.block == block
    data = random.normal(size=(2, 12, F)).astype("float32")
    got = streaming.call_steps(data)
    rows = keras.Model(x, y)(data)
    of_rows = keras.Input((None, 6))
    dense = pooled._keras_history.operation
    rest = keras.Model(of_rows, dense(kind(keepdims=keepdims)(of_rows)))
    for step in range(12 // block):
        end = (step + 1) * block
        want = np.asarray(rest(rows[:, max(0, end - N) : end])).reshape(2, 3)
        assert reference.relative_error(np.asarray(got[0][:, step]).reshape(2, 3), want) < 5e-6
    for y, want in zip(ct.Session(streaming).steps(data), got, strict=True):
        assert reference.relative_error(y, np.asarray(want)) < 5e-6


@pytest.mark.parametrize("kind", [kl.GRU, kl.LSTM])
@pytest.mark.parametrize("sequences", [False, True])
def test_recurrence_on_windows(kind, sequences, random):
    """Each step equals a call on the newest N steps, from a state of zeros."""
    x = keras.Input((N, F))
    y = kind(5, return_sequences=sequences)(x)
    model = keras.Model(x, kl.Dense(2)(y))
    streaming = ct.convert(model, N, warm_up="partial", recurrence="window")
    assert not streaming.goes_on
    assert streaming.receptive_field == N
    data = random.normal(size=(2, 9, F)).astype("float32")
    got = np.asarray(streaming.call_steps(data))
    assert reference.relative_error(ct.Session(streaming).steps(data), got) < 5e-6
    for step in range(N - 1, 9):
        want = np.asarray(model(data[:, step - N + 1 : step + 1]))
        assert reference.relative_error(got[:, step], want) < 5e-6


def test_a_recurrent_state_goes_on_where_a_window_begins_anew(random):
    x = keras.Input((N, F))
    model = keras.Model(x, kl.GRU(5)(x))
    streaming = ct.convert(model, N)
    data = random.normal(size=(1, 9, F)).astype("float32")
    whole = keras.Model(longer := keras.Input((None, F)), model.layers[1](longer))
    assert streaming.goes_on
    got = np.asarray(streaming.call_steps(data))
    assert reference.relative_error(got[:, -1], np.asarray(whole(data))) < 5e-6
    assert ct.Session(streaming).goes_on


# Saving, and what does not fit.


def test_saved_and_loaded(random, tmp_path):
    x = keras.Input((None, F))
    y = kl.LSTM(4, return_sequences=True)(kl.Conv1D(6, 3, 2, "causal")(x))
    streaming = ct.convert(keras.Model(x, y))
    streaming.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    data = random.normal(size=(2, 8, F)).astype("float32")
    np.testing.assert_array_equal(streaming.call_steps(data), loaded.call_steps(data))
    state = streaming.get_state()
    loaded.clean_state()
    loaded.set_state(state)
    np.testing.assert_array_equal(streaming.call_steps(data), loaded.call_steps(data))


def test_steps_that_are_no_multiple_of_the_block_are_refused(random):
    x = keras.Input((None, F))
    streaming = ct.convert(keras.Model(x, kl.Conv1D(6, 3, 2, "causal")(x)))
    session = ct.Session(streaming)
    data = random.normal(size=(1, 3, F)).astype("float32")
    with pytest.raises(ValueError, match="a multiple of 2 steps"):
        streaming.call_steps(data)
    with pytest.raises(ValueError, match="a multiple of 2 steps"):
        session.steps(data)
    with pytest.raises(ValueError, match=r"\(M, 2, 5\)"):
        streaming.call_step(data)
    with pytest.raises(ValueError, match=r"\(M, 2, 5\)"):
        session.step(data)


def test_positions_count_steps_of_the_input(random):
    x = keras.Input((None, F))
    model = keras.Model(x, kl.AveragePooling1D(2)(kl.Conv1D(6, 4, padding="causal")(x)))
    streaming, data = ct.convert(model), np.ones((1, 4, F), "float32")
    session = ct.Session(streaming)
    assert streaming.receptive_field == session.receptive_field == 5
    a = session.open()
    for taken in (4, 8):
        streaming.call_steps(data)
        session.steps(data, streams=[a])
        assert int(streaming.position[0]) == session.position(a) == taken
        assert bool(streaming.ready[0]) == session.ready(a) == (taken >= 5)


WRONG = {
    "another layer": (lambda: ct.CoTemporal(kl.Dense(3)), "one of these kinds"),
    "no window": (lambda: ct.CoTemporal(kl.GlobalMaxPooling1D()), "Expected window"),
    "a window": (lambda: ct.CoTemporal(kl.Conv1D(3, 3), 4), "only for a global pooling"),
    "channels first": (
        lambda: ct.CoTemporal(kl.Conv1D(3, 3, data_format="channels_first")), "channels last",
    ),
    "backwards": (lambda: ct.CoRecurrent(kl.GRU(3, go_backwards=True)), "go_backwards=False"),
    "stateful": (lambda: ct.CoRecurrent(kl.GRU(3, stateful=True)), "stateful=False"),
    "states": (lambda: ct.CoRecurrent(kl.LSTM(3, return_state=True)), "return_state=False"),
    "recurrence": (
        lambda: ct.convert(keras.Sequential([keras.Input((4, 3)), kl.GRU(3)]), 4, recurrence="x"),
        "'stream' or 'window'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pooling_of_the_window_needs_its_length():
    x = keras.Input((None, F))
    model = keras.Model(x, kl.GlobalAveragePooling1D()(x))
    with pytest.raises(ValueError, match="global_average_pooling1d.*needs seq_len"):
        ct.convert(model)


IN_GRAPHS = {
    "convolution": lambda: kl.Conv1D(4, 3, strides=2, padding="same", activation="tanh"),
    "depthwise": lambda: kl.DepthwiseConv1D(3, padding="same"),
    "separable": lambda: kl.SeparableConv1D(4, 3, strides=2),
    "spectrogram": lambda: kl.STFTSpectrogram("magnitude", 8, 4, 8),
}


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_the_weights_are_those_of_the_layer_in_graphs_too(name, random):
    layer = IN_GRAPHS[name]()
    steps = ct.CoTemporal(layer, warm_up="partial")
    x = tf.constant(random.normal(size=(2, 16, F)), "float32")
    eager = steps.call_steps(x, update_state=False)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(steps.call_steps(x, update_state=False) ** 2)
    assert all(g is not None for g in tape.gradient(loss, steps.trainable_weights))
    unknown = tf.function(
        lambda x: steps.call_steps(x), input_signature=[tf.TensorSpec([None, None, F])]
    )
    np.testing.assert_allclose(unknown(x), eager, atol=1e-5)
    for weight in layer.trainable_weights:
        weight.assign(2 * weight)
    steps.clean_state()
    assert not layer.trainable_weights or np.abs(unknown(x) - eager).max() > 1e-3


def test_strides_within_a_model_within_the_model(random):
    x = keras.Input((None, F))
    inner = keras.Sequential(
        [keras.Input((None, F)), kl.Conv1D(4, 3, 2, "causal"), kl.Conv1D(3, 3, 2, "same")]
    )
    assert check(keras.Model(x, kl.Dense(2)(inner(x))), random).block == 4


def test_one_row_beside_strides(random):
    x = keras.Input((8, F))
    late = kl.Conv1D(2, 3, padding="same")(x)[:, -2]
    last = kl.GRU(3)(x)
    model = keras.Model(x, [kl.Conv1D(2, 4, 4, "causal")(x), last, late])
    streaming = ct.convert(model, 8, warm_up="partial")
    assert (streaming.block, streaming.delay) == (4, 1)  # Not the delay of a block.
    data = random.normal(size=(2, 8, F)).astype("float32")
    expected = model(data)
    session = ct.Session(streaming)
    for source in (streaming, session):
        for first in (0, 4):
            call = source.call_step if source is streaming else source.step
            rows, newest, earlier = call(data[:, first : first + 4])
        np.testing.assert_allclose(earlier, expected[2], atol=1e-5)
        np.testing.assert_allclose(rows, expected[0][:, -1], atol=1e-5)
        np.testing.assert_allclose(newest, expected[1], atol=1e-5)


def test_an_input_without_time_is_refused_beside_strides():
    x, still = keras.Input((8, F)), keras.Input((3,), name="still")
    y = kl.Concatenate()([kl.GlobalMaxPooling1D()(kl.Conv1D(2, 2, 2)(x)), kl.Dense(2)(still)])
    with pytest.raises(ValueError, match="no axis of time in still"):
        ct.convert(keras.Model([x, still], y), 8)


def in_graph(steps, features=F):
    """Return call_steps in a graph that knows neither the streams nor the steps."""
    return tf.function(
        lambda x: steps.call_steps(x), input_signature=[tf.TensorSpec([None, None, features])]
    )


def of_blocks(name):
    options = dict(warm_up="partial")
    if name == "chunks":
        return ct.CoChunkedMultiHeadAttention(2, 1, 2, 3, **options)
    if name == "convolution":
        return ct.CoTemporal(kl.Conv1D(F, 3, 2, "causal"), **options)
    x = keras.Input((None, F))
    y = kl.GRU(F, return_sequences=True)(x)
    return ct.convert(keras.Model(x, kl.Conv1D(F, 2, 2, "causal")(y)), 4, **options)


@pytest.mark.parametrize("name", ["chunks", "convolution", "model"])
def test_a_graph_refuses_steps_that_are_no_multiple_of_the_block(name, random):
    steps = of_blocks(name)
    x = random.normal(size=(2, 8, F)).astype("float32")
    expected = steps.call_steps(x)
    steps.clean_state()
    call = in_graph(steps)
    first = call(x[:, :4])
    for wrong, message in ((3, "multiple of 2 steps"), (1, "multiple of 2"), (0, "at least one")):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            call(x[:, 4 : 4 + wrong])
    y = np.concatenate([first, call(x[:, 4:])], 1)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gru", "lstm", "stack"])
def test_dropout_of_recurrent_layers(kind, random):
    options = dict(dropout=0.5, recurrent_dropout=0.3)
    layer = {
        "gru": lambda: kl.GRU(8, **options),
        "lstm": lambda: kl.LSTM(8, **options),
        "stack": lambda: kl.RNN(
            kl.StackedRNNCells([kl.LSTMCell(4, **options), kl.GRUCell(8, **options)])
        ),
    }[kind]()
    steps = ct.CoRecurrent(layer)
    x = random.normal(size=(2, 6, F)).astype("float32")
    plain = steps.call_steps(x, update_state=False)

    def dropped(x):
        return steps.call_steps(x, training=True, update_state=False)

    for call in (dropped, tf.function(dropped)):
        a, b = call(x), call(x)
        assert np.abs(a - b).max() > 1e-3  # Each call drops others.
        assert call(x[:1]).shape == (1, 6, 8)
    np.testing.assert_allclose(steps.call_steps(x, update_state=False), plain)


@pytest.mark.parametrize("layer", [kl.GRU(3), kl.GlobalAveragePooling1D()])
def test_one_row_of_a_window_that_ended_before_is_refused(layer):
    x = keras.Input((8, F))
    y = layer(kl.Conv1D(4, 3, padding="same", name="late")(x))
    with pytest.raises(ValueError, match='late delays by 1 steps.*padding="causal"'):
        ct.convert(keras.Model(x, y), 8)
