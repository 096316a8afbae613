"""CoSiMultiHeadAttention against keras.layers.MultiHeadAttention on sliding windows."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, newest_of_windows, pair

pytestmark = pytest.mark.sampled(6)


@pytest.mark.parametrize(
    ("seq_len", "num_heads", "key_dim", "features", "batch"),
    [
        (1, 1, 1, 1, 1),
        (2, 3, 5, 4, 2),
        (3, 1, 12, 12, 1),
        (10, 2, 8, 16, 1),
        (16, 4, 12, 24, 3),
        (17, 2, 33, 10, 2),
        (64, 4, 32, 128, 1),
        (120, 16, 12, 192, 1),
    ],
)
def test_steps_equal_regular_attention_on_sliding_windows(
    backend, random, seq_len, num_heads, key_dim, features, batch
):
    """Eager steps until the window is full, then a graph. The ring wraps around three times.

    Another test takes 100,000 steps.
    """
    layer, regular = pair(seq_len, num_heads, key_dim, features, random=random)
    steps = 3 * seq_len + 50
    x = random.normal(size=(batch, steps, features)).astype("float32")
    # One call begins long windows, because eager steps are slow.
    begun = seq_len - 10 if seq_len > 60 else 0
    assert begun == 0 or layer.call_steps(x[:, :begun]) is None
    eager_steps = seq_len + 20
    outputs = [None] * begun + [layer.call_step(x[:, t]) for t in range(begun, eager_steps)]
    assert outputs[: seq_len - 1] == [None] * (seq_len - 1)
    graph = tf.function(layer.call_step, autograph=False)  # Traced in half the time.
    outputs += [graph(tf.constant(x[:, t])) for t in range(eager_steps, steps)]
    # The reference takes most of the time, so long windows are compared at every seventh step.
    # That includes every place where a ring can begin.
    every = 7 if seq_len > 60 else 1
    outputs = np.stack(outputs[seq_len - 1 :: every], 1)
    expected = newest_of_windows(regular, x, seq_len, every)
    assert reference.relative_error(outputs, expected) < 5e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [[30], [1] * 10, [2, 3, 1, 9], [5, 1, 1], [6, 6], [11]])
def test_steps_in_any_portions(backend, random, lengths, dtype):
    """Calls of one step equal one call of several, in outputs and state, at every age."""
    layer, regular = pair(random=random, dtype=dtype)
    x = random.normal(size=(2, sum(lengths), E))
    outputs, first = [], 0
    for length in lengths:
        chunk = x[:, first : first + length]
        first += length
        output = layer.call_steps(chunk)
        ready = min(length, max(0, first - N + 1))
        assert (output is None) == (ready == 0)
        if output is not None:
            assert output.shape == (2, ready, E)
            outputs.append(output)
    # Not compared with Keras: it rounds the scale to float32, which exceeds float64's bound.
    weights = [w.astype("float64") for w in regular.get_weights()]
    windows = reference.sliding_windows(x.astype(dtype).swapaxes(0, 1), N).transpose(2, 0, 1, 3)
    expected = reference.newest_of_multi_head_attention(weights, windows)
    outputs = np.concatenate(outputs, 1)
    assert reference.relative_error(outputs, expected) < reference.BOUNDS[dtype]

    stepped, _ = pair(random=random, dtype=dtype)
    stepped.set_weights(layer.get_weights())
    for t in range(first):
        stepped.call_step(x[:, t])
    for name, array in stepped.get_state().items():
        np.testing.assert_allclose(layer.get_state()[name], array, rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_regular_layer(backend, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    _, scores = regular(x[:, :N], x[:, :N], return_attention_scores=True)
    for t in range(N - 1):
        assert layer.call_step(x[:, t], return_attention_scores=True) == (None, None)
    output, step_scores = layer.call_step(x[:, N - 1], return_attention_scores=True)
    assert output.shape == (2, E)
    assert step_scores.shape == (2, H, N)
    assert reference.relative_error(step_scores, scores[:, :, -1].numpy()) < 5e-6
    _, steps_scores = layer.call_steps(x[:, N:], return_attention_scores=True)
    assert steps_scores.shape == (2, H, 3, N)


@pytest.mark.parametrize("with_scores", [False, True])
def test_regular_call_gives_the_newest_row(backend, random, with_scores):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    row = layer(x, return_attention_scores=with_scores)
    full = regular(x, x, return_attention_scores=True)
    row, scores = row if with_scores else (row, None)
    assert row.shape == (2, 1, E)
    assert reference.relative_error(row, full[0][:, -1:].numpy()) < 5e-6
    if with_scores:
        assert reference.relative_error(scores, full[1][:, :, -1:].numpy()) < 5e-6
    assert layer.get_state()["position"].size == 0


@pytest.mark.parametrize(
    "call",
    [
        dict(use_causal_mask=True),
        dict(attention_mask=np.tril(np.ones((2, N, N), bool), 1)),
        dict(attention_mask=np.array([[[True] * N] * N, [[False] * 2 + [True] * (N - 2)] * N])),
    ],
)
def test_regular_masks_act_as_in_keras(random, call):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = regular(x, x, **call)[:, -1:].numpy()
    assert reference.relative_error(layer(x, **call), expected) < 5e-6


def test_keras_masks_of_the_inputs_are_heeded(random):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    x[:, :2] = 0
    masked = keras.layers.Masking()(x)
    expected = regular(masked, masked)[:, -1:].numpy()
    masked = keras.layers.Masking()(x)
    assert reference.relative_error(layer(masked, masked), expected) < 5e-6


def test_all_outputs_are_exactly_keras(random):
    layer, regular = pair(random=random, layer_options=dict(single_output=False))
    x, y = random.normal(size=(2, 2, N, E)).astype("float32")
    np.testing.assert_array_equal(
        layer(x, y, use_causal_mask=True), regular(x, y, use_causal_mask=True)
    )
    np.testing.assert_array_equal(layer(x), regular(x, x))


@pytest.mark.parametrize(
    "options",
    [
        dict(value_dim=9),
        dict(use_bias=False),
        dict(output_shape=4),
        dict(output_shape=(2, 3)),
        dict(use_gate=True),
        dict(sliding_window=3),
        dict(sliding_window=N + 4),
        dict(attention_axes=1),
        dict(flash_attention=False),
        dict(dropout=0.3),
        dict(kernel_initializer="he_normal", kernel_regularizer="l2", seed=3),
    ],
    ids=str,
)
def test_options_of_the_keras_layer(backend, random, options):
    layer, regular = pair(random=random, **options)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    windows = reference.sliding_windows(x.swapaxes(0, 1), N).transpose(2, 0, 1, 3)
    expected = np.stack([regular(w, w).numpy()[:, -1] for w in windows.swapaxes(0, 1)], 1)
    steps = layer.call_steps(x)
    assert steps.shape == expected.shape
    assert reference.relative_error(steps, expected) < 5e-6
    assert reference.relative_error(layer(x[:, :N])[:, 0], expected[:, 0]) < 5e-6
    peeked = layer.call_step(x[:, -1], update_state=False)
    assert peeked.shape == expected[:, 0].shape

    clone = ct.CoSiMultiHeadAttention.from_config(layer.get_config())
    assert clone.get_config() == layer.get_config()


def test_query_value_and_key_of_different_sizes(backend, random):
    regular = keras.layers.MultiHeadAttention(H, D, value_dim=4)
    sizes = (E, 9, 11)
    query, value, key = (random.normal(size=(2, N + 4, e)).astype("float32") for e in sizes)
    regular(query, value, key)
    layer = ct.CoSiMultiHeadAttention(N, H, D, value_dim=4)
    layer.call_steps(query, value, key)
    layer.clean_state()
    layer.set_weights(regular.get_weights())
    expected = [
        regular(query[:, t : t + N], value[:, t : t + N], key[:, t : t + N])[:, -1]
        for t in range(5)
    ]
    steps = layer.call_steps(query, value, key)
    assert reference.relative_error(steps, np.stack(expected, 1)) < 5e-6
    only_value = ct.CoSiMultiHeadAttention(N, H, D, warm_up="partial")
    assert only_value.call_step(query[:, 0], value[:, 0]).shape == (2, E)


def test_weights_are_those_of_the_keras_layer(random):
    layer, regular = pair(random=random, use_gate=True)
    assert [w.path.split("/")[1:] for w in layer.weights] == [
        w.path.split("/")[1:] for w in regular.weights
    ]
    layer.call_steps(random.normal(size=(2, N, E)))
    assert len(layer.weights) == len(layer.get_weights()) == len(regular.weights)
    assert layer.count_params() == regular.count_params()
    regular.set_weights(layer.get_weights())


def test_call_modes(random):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    expected = newest_of_windows(regular, x, N)
    layer.call_mode = "steps"
    assert reference.relative_error(layer(x[:, :N]), expected[:, :1]) < 5e-6
    layer.call_mode = "step"
    assert reference.relative_error(layer(x[:, N]), expected[:, 1]) < 5e-6
    with ct.call_mode("steps"):
        assert reference.relative_error(layer(x[:, N + 1 :]), expected[:, 2:]) < 5e-6
        with ct.call_mode("regular"):
            assert layer(x[:, :N]).shape == (2, 1, E)
    assert layer.call_mode == layer.active_call_mode == "step"
    layer.clean_state()
    assert layer(x[:, 0]) is None
    for wrong in ("stepwise", None, 3):
        with pytest.raises(ValueError, match="call_mode"):
            layer.call_mode = wrong
        with pytest.raises(ValueError, match="call_mode"), ct.call_mode(wrong):
            pass


def test_a_program_written_for_the_original_package(random):
    """Its order of calls: build by steps, clean, set weights, warm up, step, set mode."""
    regular = keras.layers.MultiHeadAttention(num_heads=4, key_dim=6)
    query, key, value = random.normal(size=(3, 2, 12, 4)).astype("float32")
    whole = [x[:, :10] for x in (query, value, key)]
    regular(*whole)
    layer = ct.CoSiMultiHeadAttention(seq_len=10, num_heads=4, key_dim=6)
    layer.call_steps(*whole)
    layer.clean_state()
    layer.set_weights(regular.get_weights())
    expected, scores = regular(*whole, return_attention_scores=True)
    np.testing.assert_allclose(layer(*whole), expected[:, -1:], atol=1e-6)
    output, step_scores = layer.call_steps(*whole, return_attention_scores=True)
    np.testing.assert_allclose(output, expected[:, -1:], atol=1e-6)
    np.testing.assert_allclose(step_scores, scores[:, :, -1:], atol=1e-6)
    step = layer.call_step(query[:, 10], value[:, 10], key[:, 10])
    expected = regular(*(x[:, 1:11] for x in (query, value, key)))
    np.testing.assert_allclose(step, expected[:, -1], atol=1e-6)
    layer.call_mode = "step"
    step = layer(query[:, 11], value[:, 11], key[:, 11])
    expected = regular(*(x[:, 2:] for x in (query, value, key)))
    np.testing.assert_allclose(step, expected[:, -1], atol=1e-6)


def test_trained_on_windows_then_streamed(random):
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    model = keras.Sequential([layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    x = random.normal(size=(64, N, E)).astype("float32")
    y = x[:, -1, :1] + x[:, 0, 1:2]
    model.compile("adam", "mse")
    losses = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.abs(w).sum() > 0 for w in layer.get_weights())
    steps = layer.call_steps(x)
    assert reference.relative_error(steps, layer(x).numpy()) < 5e-6


@pytest.mark.parametrize(
    "options", [{}, dict(use_gate=True), dict(layer_options=dict(query_index=2))]
)
def test_an_eager_step_is_one_op(monkeypatch, executed_ops, random, options):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, **options)
    x = tf.constant(random.normal(size=(2, E)).astype("float32"))
    for _ in range(N + 1):
        executed_ops.clear()
        layer.call_step(x)
    assert executed_ops == ["ContinualTransformers>CoSiMultiHeadAttentionStep"]


def test_low_rank_additions_stream(random):
    layer, _ = pair(random=random)
    layer.query_dense.enable_lora(2)
    x = random.normal(size=(1, N, E)).astype("float32")
    for weight in layer.query_dense.trainable_weights:
        weight.assign(random.normal(size=weight.shape))
    assert reference.relative_error(layer.call_steps(x), layer(x).numpy()) < 5e-6


def test_receptive_field_and_delay():
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    assert (layer.receptive_field, layer.delay, layer.seq_len) == (N, 0, N)
