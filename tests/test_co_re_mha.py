"""CoReMultiHeadAttention against keras.layers.MultiHeadAttention on sliding windows."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_re_mha_cases import D, E, H, N, all_of_windows, pair
from traced import traced

pytestmark = pytest.mark.sampled(9)


@pytest.mark.parametrize(
    ("seq_len", "num_heads", "key_dim", "features", "batch"),
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 4, 2),
        (3, 1, 12, 12, 1),
        (16, 4, 12, 24, 3),
        (17, 2, 33, 10, 2),
        (64, 4, 32, 128, 1),
    ],
)
def test_steps_equal_regular_attention_on_all_of_sliding_windows(
    backend, random, seq_len, num_heads, key_dim, features, batch
):
    layer, regular = pair(seq_len, num_heads, key_dim, features, random=random)
    steps = 2 * seq_len + 30 if backend == "fused" else seq_len + 8
    x = random.normal(size=(batch, steps, features)).astype("float32")
    outputs = [layer.call_step(x[:, t]) for t in range(x.shape[1])]
    assert outputs[: seq_len - 1] == [None] * (seq_len - 1)
    assert outputs[-1].shape == (batch, seq_len, features)
    outputs = np.stack(outputs[seq_len - 1 :], 1)
    expected = all_of_windows(regular, x, seq_len)
    assert reference.relative_error(outputs, expected) < 5e-6


SUMS = ("softmax", "weighted_sum", "made_with")
PORTIONS = ([30], [1] * 10, [2, 3, 1, 9], [5, 1, 1], [6, 6])


# Layers in half precision keep and attend to float32, with the same ops as float32 layers. So
# `make test` takes fewer of their calls.
@pytest.mark.parametrize(("lengths", "dtype"), [
    *((lengths, dtype) for lengths in PORTIONS for dtype in ("float32", "float64")),
    *(
        pytest.param(lengths, dtype, marks=() if len(lengths) == 4 else pytest.mark.slow)
        for lengths in PORTIONS
        for dtype in ("mixed_bfloat16", "float16")
    ),
])  # fmt: skip
def test_steps_in_any_portions_of_all_rows(backend, random, lengths, dtype):
    """Calls of one step equal one call of several, in outputs and state, at every age."""
    layer, regular = pair(random=random, dtype=dtype)
    x = random.normal(size=(2, sum(lengths), E)).astype("float32")
    outputs, first = [], 0
    for length in lengths:
        output = layer.call_steps(x[:, first : first + length])
        first += length
        ready = min(length, max(0, first - N + 1))
        assert (output is None) == (ready == 0)
        if output is not None:
            assert output.shape == (2, ready, N, E)
            assert output.dtype == layer.compute_dtype
            outputs.append(tf.cast(output, "float64"))
    exact = keras.layers.MultiHeadAttention(H, D, dtype="float64")
    exact.build((None, N, E), (None, N, E))
    exact.set_weights(regular.get_weights())
    expected = all_of_windows(exact, x.astype("float64"), N)
    # Keras rounds its scale to float32, also in float64.
    bounds = {"float32": 5e-6, "float64": 1e-7, "mixed_bfloat16": 0.03, "float16": 4e-3}
    assert reference.relative_error(np.concatenate(outputs, 1), expected) < bounds[dtype]

    stepped, _ = pair(random=random, dtype=dtype)
    stepped.set_weights(layer.get_weights())
    for t in range(first):
        stepped.call_step(x[:, t])
    state = layer.get_state()
    for name, array in stepped.get_state().items():
        if name not in SUMS:
            np.testing.assert_allclose(state[name], array, rtol=1e-4, atol=1e-5)
    # A call of several steps keeps no sums: the next step computes them again.
    newest = random.normal(size=(2, E)).astype("float32")
    outputs = [tf.cast(x.call_step(newest), "float64") for x in (layer, stepped)]
    if outputs[1] is not None:
        assert reference.relative_error(outputs[0], outputs[1].numpy()) < bounds[dtype]


@pytest.mark.parametrize("algorithm", ["update", "recompute"])
def test_partial_warm_up_and_streams_of_different_ages(backend, random, algorithm):
    """Rows of steps that were never taken are zeros, regardless of the projection's bias."""
    options = dict(warm_up="partial", algorithm=algorithm)
    layer, regular = pair(random=random, layer_options=options)
    layer.ensure_streams(5)
    history = [[] for _ in range(5)]
    for _ in range(25):
        streams = random.permutation(5)[: random.integers(1, 5)]
        x = random.normal(size=(len(streams), E)).astype("float32")
        peeked = layer.call_step(x, streams=streams, update_state=False)
        output = layer.call_step(x, streams=streams)
        np.testing.assert_array_equal(peeked, output)
        for row, stream in enumerate(streams):
            history[stream].append(x[row])
            window = np.stack(history[stream][-N:])[None]
            expected = np.zeros((N, E))
            expected[N - window.shape[1] :] = regular(window, window)[0]
            assert reference.relative_error(output[row], expected) < 5e-6
            assert (output[row, : N - window.shape[1]].numpy() == 0).all()
    np.testing.assert_array_equal(layer.ready, [len(h) >= N for h in history])
    layer.clean_state(streams=[3])
    history[3] = []
    np.testing.assert_array_equal(layer.ready, [len(h) >= N for h in history])
    x = random.normal(size=(1, 2, E)).astype("float32")
    output = layer.call_steps(x, streams=[3])
    assert (output[0, 0, : N - 1].numpy() == 0).all()
    assert reference.relative_error(output[0, 1, N - 2 :], regular(x, x)[0].numpy()) < 5e-6


def test_a_gap_in_a_recording(backend, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(1, 2 * N, E)).astype("float32")
    has_key = random.random((1, 2 * N)) < 0.6
    x[~has_key] *= 5
    outputs = layer.call_steps(x, key_mask=has_key)
    for i in range(outputs.shape[1]):
        window, mask = x[:, i : i + N], has_key[:, None, i : i + N]
        expected = regular(window, window, attention_mask=np.repeat(mask, N, 1))
        assert reference.relative_error(outputs[:, i], expected.numpy()) < 5e-6
    layer.clean_state()
    value_mask = np.ones((1, 2 * N), bool)
    value_mask[:, ::3] = False
    both = layer.call_steps(x, key_mask=has_key, value_mask=value_mask)
    layer.clean_state()
    together = layer.call_steps(x, key_mask=has_key & value_mask)
    np.testing.assert_array_equal(both, together)


def test_regular_calls_are_exactly_keras(random):
    layer, regular = pair(random=random)
    x, y = random.normal(size=(2, 2, N, E)).astype("float32")
    np.testing.assert_array_equal(layer(x), regular(x, x))
    np.testing.assert_array_equal(
        layer(x, y, use_causal_mask=True), regular(x, y, use_causal_mask=True)
    )
    for got, expected in zip(
        layer(x, return_attention_scores=True),
        regular(x, x, return_attention_scores=True),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
    assert layer.get_state()["position"].size == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(value_dim=9),
        dict(use_bias=False),
        dict(output_shape=4),
        dict(output_shape=(2, 3)),
        dict(attention_axes=1),
        dict(flash_attention=False),
        dict(use_gate=True),
        dict(use_gate=True, value_dim=9, use_bias=False),
        dict(sliding_window=3),
        dict(sliding_window=N + 1),
        dict(dropout=0.3),
        dict(kernel_initializer="he_normal", kernel_regularizer="l2", seed=3),
    ],
    ids=str,
)
def test_options_of_the_keras_layer_in_all_rows(backend, random, options):
    layer, regular = pair(random=random, **options)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    expected = all_of_windows(regular, x, N)
    steps = layer.call_steps(x)
    assert steps.shape == expected.shape
    assert reference.relative_error(steps, expected) < 5e-6
    partial = tf.function(layer.call_steps, autograph=False)  # Traced in half the time.
    layer.clean_state()
    assert reference.relative_error(partial(x)[:, N - 1 :], expected) < 5e-6
    clone = ct.CoReMultiHeadAttention.from_config(layer.get_config())
    assert clone.get_config() == layer.get_config()


def test_query_value_and_key_of_their_own(backend, random):
    regular = keras.layers.MultiHeadAttention(H, D, value_dim=4)
    sizes = (E, 9, 11)
    query, value, key = (random.normal(size=(2, N + 4, e)).astype("float32") for e in sizes)
    regular(query, value, key)
    layer = ct.CoReMultiHeadAttention(N, H, D, value_dim=4)
    layer.call_steps(query, value, key)
    layer.clean_state()
    layer.set_weights(regular.get_weights())
    expected = [
        regular(query[:, t : t + N], value[:, t : t + N], key[:, t : t + N]) for t in range(5)
    ]
    steps = layer.call_steps(query, value, key)
    assert reference.relative_error(steps, np.stack(expected, 1)) < 5e-6


def test_state_goes_on_in_another_layer_of_all_rows(backend, random):
    layer, _ = pair(random=random)
    x = random.normal(size=(2, N + 9, E)).astype("float32")
    layer.call_steps(x[:, : N + 1])
    other, _ = pair(random=random)
    other.set_weights(layer.get_weights())
    other.set_state(layer.get_state())
    for t in range(N + 1, N + 9):
        np.testing.assert_array_equal(other.call_step(x[:, t]), layer.call_step(x[:, t]))
    with pytest.raises(ValueError, match="Expected"):
        other.set_state({"position": 3})


def test_fused_and_plain_go_on_from_each_other(monkeypatch, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, 5 * N, E)).astype("float32")
    outputs = []
    for t in range(5 * N):
        plain = random.random() < 0.3
        monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow" if plain else "fused")
        outputs.append(layer.call_step(x[:, t]))
    expected = all_of_windows(regular, x, N)
    assert reference.relative_error(np.stack(outputs[N - 1 :], 1), expected) < 5e-6


def test_in_graphs_warm_up_is_partial_and_nothing_retraces(backend, random):
    layer, regular = pair(random=random)
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([None, E])])
    def step(x):
        traces.append(1)
        return layer.call_step(x)

    x = random.normal(size=(2, N + 3, E)).astype("float32")
    for t in range(N + 3):
        output = step(tf.constant(x[:, t]))
        window = x[:, max(0, t - N + 1) : t + 1]
        expected = np.zeros((2, N, E))
        expected[:, N - window.shape[1] :] = regular(window, window)
        assert reference.relative_error(output, expected) < 5e-6
    assert len(traces) == 1
    np.testing.assert_array_equal(layer.ready, [True, True])


def test_under_xla_all_rows_are_equal(random):
    layer, regular = pair(random=random)
    layer.ensure_streams(2)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    steps = traced(layer.call_steps, jit_compile=True)
    expected = all_of_windows(regular, x, N)
    assert reference.relative_error(steps(x)[:, N - 1 :], expected) < 5e-6


def test_gradients_in_steps_mode_are_those_of_keras(backend, random):
    layer, regular = pair(random=random)
    x = tf.constant(random.normal(size=(2, N + 2, E)).astype("float32"))
    weights = random.normal(size=(2, 3, N, E)).astype("float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(weights * layer.call_steps(x, training=True))
    gradients = tape.gradient(loss, [x, *layer.trainable_weights])
    with tf.GradientTape() as tape:
        tape.watch(x)
        windows = [regular(x[:, i : i + N], x[:, i : i + N]) for i in range(3)]
        loss = tf.reduce_sum(weights * tf.stack(windows, 1))
    for got, expected in zip(
        gradients, tape.gradient(loss, [x, *regular.trainable_weights]), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_a_model_learns_in_steps_and_then_streams(random):
    layer = ct.CoReMultiHeadAttention(N, H, D, warm_up="partial")
    inputs = keras.Input((2 * N, E))
    with ct.call_mode("steps"):
        rows = layer(inputs)
    assert rows.shape == (None, 2 * N, N, E)
    x = random.normal(size=(32, 2 * N, E)).astype("float32")
    y = x.cumsum(1)[:, :, None, :1] * np.ones((1, 1, N, 1), np.float32)
    with ct.call_mode("steps"):
        model = keras.Model(inputs, keras.layers.Dense(1)(rows))
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)  # Otherwise fit traces its graph twice.
        history = model.fit(x, y, epochs=4, verbose=0, callbacks=[ct.CleanState()])
    assert history.history["loss"][-1] < history.history["loss"][0]
    layer.clean_state()
    steps = layer.call_steps(x[:2])
    assert reference.relative_error(steps[:, -1], layer(x[:2, N:]).numpy()) < 5e-6


def test_dropout_acts_on_all_rows_in_training_alone(backend, random):
    layer, _ = pair(random=random, dropout=0.5, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, N, E)).astype("float32")
    calm = layer.call_steps(x, update_state=False)
    np.testing.assert_array_equal(layer.call_steps(x, update_state=False), calm)
    dropped = layer.call_steps(x, training=True)
    assert np.isfinite(dropped).all()
    assert np.abs(dropped - calm).max() > 0.01


def test_from_regular_gives_all_rows(random):
    regular = keras.layers.MultiHeadAttention(H, D, name="mine")
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = regular(x, x).numpy()
    layer = ct.CoReMultiHeadAttention.from_regular(regular, N, algorithm="update")
    assert (layer.name, layer.algorithm) == ("mine", "update")
    assert [w.path for w in layer.weights] == [w.path for w in regular.weights]
    assert reference.relative_error(layer.call_steps(x)[:, -1], expected) < 5e-6


def test_call_modes_and_masks_of_keras(random):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, N, E)).astype("float32")
    x[:, :2] = 0
    with ct.call_mode("steps"):
        steps = layer(keras.layers.Masking()(x))
    attended = np.zeros((2, N, N), bool)
    attended[:, :, 2:] = True
    expected = regular(x, x, attention_mask=attended)
    assert reference.relative_error(steps[:, -1], expected.numpy()) < 5e-6
    layer.call_mode = "step"
    assert layer(x[:, 0]).shape == (2, N, E)
    assert (layer.receptive_field, layer.delay, layer.seq_len) == (N, 0, N)
    assert layer.input_features == dict(query=E, value=E, key=E)
