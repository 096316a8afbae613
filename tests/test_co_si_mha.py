"""CoSiMultiHeadAttention against keras.layers.MultiHeadAttention on sliding windows."""

import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from conftest import BAD_INPUT

N, H, D, E = 6, 3, 5, 7  # The window and sizes of tests that are about something else.


def pair(seq_len=N, num_heads=H, key_dim=D, features=E, *, random, layer_options=None, **options):
    """A continual layer and the regular one with the same weights, none of them zero."""
    dtype = options.get("dtype", "float32")
    regular = keras.layers.MultiHeadAttention(num_heads, key_dim, **options)
    regular.build((None, seq_len, features), (None, seq_len, features))
    regular.set_weights([random.normal(scale=0.4, size=w.shape) for w in regular.weights])
    layer = ct.CoSiMultiHeadAttention(
        seq_len, num_heads, key_dim, **options, **(layer_options or {})
    )
    layer.build((None, seq_len, features))
    layer.set_weights(regular.get_weights())
    assert layer.compute_dtype == dtype
    return layer, regular


def newest_of_windows(regular, x, seq_len, **kwargs):
    """What the regular layer says of each full window of x [B, T, E]: [B, T - N + 1, E]."""
    windows = reference.sliding_windows(x.swapaxes(0, 1), seq_len)  # [T', N, B, E]
    windows = windows.transpose(2, 0, 1, 3)
    batch, count = windows.shape[:2]
    flat = windows.reshape(batch * count, *windows.shape[2:])
    regular = tf.function(regular, reduce_retracing=True)
    newest = [
        regular(flat[i : i + 256], flat[i : i + 256], **kwargs)[:, -1]
        for i in range(0, len(flat), 256)
    ]
    return np.concatenate(newest).reshape(batch, count, -1)


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
    """Over two thousand steps: eagerly while the window fills and a little on, then as a graph."""
    layer, regular = pair(seq_len, num_heads, key_dim, features, random=random)
    steps, eager_steps = 2000, seq_len + 20
    x = random.normal(size=(batch, steps, features)).astype("float32")
    outputs = [layer.call_step(x[:, t]) for t in range(eager_steps)]
    assert outputs[: seq_len - 1] == [None] * (seq_len - 1)
    graph = tf.function(layer.call_step)
    outputs += [graph(tf.constant(x[:, t])) for t in range(eager_steps, steps)]
    outputs = np.stack(outputs[seq_len - 1 :], 1)
    expected = newest_of_windows(regular, x, seq_len)
    assert reference.relative_error(outputs, expected) < 5e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [[30], [1] * 10, [2, 3, 1, 9], [5, 1, 1], [6, 6], [11]])
def test_steps_in_any_portions(backend, random, lengths, dtype):
    """T calls of call_step are one call_steps: outputs and state, at every age."""
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
    # Not Keras' own answer: it rounds the scale to float32, which float64's bound would notice.
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


def test_partial_warm_up_equals_regular_attention_on_the_shorter_sequence(backend, random):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, N + 2, E)).astype("float32")
    for t in range(N + 2):
        window = x[:, max(0, t - N + 1) : t + 1]
        expected = regular(window, window)[:, -1].numpy()
        assert reference.relative_error(layer.call_step(x[:, t]), expected) < 5e-6
        np.testing.assert_array_equal(layer.ready, [t >= N - 1] * 2)
    layer.clean_state()
    together = layer.call_steps(x)
    assert together.shape == (2, N + 2, E)
    assert reference.relative_error(together[:, -1], expected) < 5e-6


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


@pytest.mark.parametrize("mask_rank", [1, 2, 3])
def test_attention_mask_in_a_step(backend, random, mask_rank):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    mask = random.random({1: (N,), 2: (2, N), 3: (2, H, N)}[mask_rank]) < 0.6
    layer.call_steps(x[:, :-1])
    output = layer.call_step(x[:, -1], attention_mask=mask)
    full = {1: (None, None, None), 2: (slice(None), None, None), 3: (..., None, slice(None))}
    full = np.broadcast_to(mask[full[mask_rank]], (2, H, N, N))
    expected = regular(x, x, attention_mask=full)[:, -1].numpy()
    assert reference.relative_error(output, expected) < 5e-6


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
    """Its order of calls: built by steps, cleaned, weights set, warmed up, stepped, mode set."""
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


def test_streams_of_different_ages_in_any_order(backend, random):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(5)
    history = [[] for _ in range(5)]
    for _ in range(25):
        streams = random.permutation(5)[: random.integers(1, 5)]
        x = random.normal(size=(len(streams), E)).astype("float32")
        output = layer.call_step(x, streams=streams)
        for row, stream in enumerate(streams):
            history[stream].append(x[row])
            window = np.stack(history[stream][-N:])[None]
            expected = regular(window, window)[0, -1].numpy()
            assert reference.relative_error(output[row], expected) < 1e-5
    np.testing.assert_array_equal(layer.ready, [len(h) >= N for h in history])
    layer.clean_state(streams=[3])
    history[3] = []
    np.testing.assert_array_equal(layer.ready, [len(h) >= N for h in history])


def test_warm_up_none_with_streams_of_different_ages(backend, random):
    """None while no stream of the call is ready; and ready tells which rows are full."""
    layer, _ = pair(random=random)
    layer.ensure_streams(2)
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    layer.call_steps(x[:1, :N], streams=[0])
    assert layer.call_step(x[1:, 0], streams=[1]) is None
    assert layer.call_step(x[:, 1]).shape == (2, E)
    np.testing.assert_array_equal(layer.ready, [True, False])
    layer.clean_state(streams=[0])
    assert layer.call_step(x[:, 2]) is None
    # Stream 1 has come furthest: after its steps 4, ..., N + 2, three of them end a full window.
    assert layer.call_steps(x[:, : N - 1]).shape == (2, 3, E)


def test_more_rows_are_more_streams(backend, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(3, N + 1, E)).astype("float32")
    layer.call_steps(x[:1, :-1])
    layer.ensure_streams(3)
    layer.call_steps(x[1:, :-1], streams=[1, 2])
    expected = newest_of_windows(regular, x, N)
    assert reference.relative_error(layer.call_step(x[:, -1]), expected[:, -1]) < 5e-6


def test_peeking_with_and_without_prior_state(backend, random):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, 3, E)).astype("float32")
    peek = layer.call_step(x[:, 0], update_state=False)
    np.testing.assert_array_equal(layer.get_state()["position"], [0, 0])
    np.testing.assert_array_equal(layer.call_step(x[:, 0]), peek)
    peek = layer.call_steps(x[:, 1:], update_state=False)
    np.testing.assert_array_equal(layer.call_steps(x[:, 1:]), peek)
    strict, _ = pair(random=random)
    for t in range(N - 1):
        assert strict.call_step(x[:, 0]) is None
        assert (strict.call_step(x[:, 0], update_state=False) is None) == (t + 1 < N - 1)


def test_state_goes_on_in_another_layer_bit_for_bit(backend, random):
    layer, _ = pair(random=random)
    x = random.normal(size=(2, N + 4, E)).astype("float32")
    layer.call_steps(x[:, : N + 1])
    other, _ = pair(random=random)
    other.set_weights(layer.get_weights())
    other.set_state(layer.get_state())
    for t in range(N + 1, N + 4):
        np.testing.assert_array_equal(other.call_step(x[:, t]), layer.call_step(x[:, t]))
    with pytest.raises(ValueError, match="Expected"):
        other.set_state({"position": 3})


def test_config_and_file_round_trip(tmp_path, random):
    inputs = keras.Input((N, E))
    layer = ct.CoSiMultiHeadAttention(
        N, H, D, value_dim=4, warm_up="partial", sliding_window=4, use_gate=True
    )
    model = keras.Model(inputs, layer(inputs))
    x = random.normal(size=(2, N, E)).astype("float32")
    layer.call_steps(x)  # The state is not saved.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    again = loaded.layers[1]
    assert again.get_config() == layer.get_config()
    assert again.get_state()["position"].size == 0
    layer.clean_state()
    np.testing.assert_array_equal(again.call_steps(x), layer.call_steps(x))


@pytest.mark.parametrize("mode", ["step", "steps", "regular"])
def test_symbolic_shapes(mode):
    layer = ct.CoSiMultiHeadAttention(N, H, D, call_mode=mode)
    lead = (None,) if mode == "step" else (None, None)
    x = keras.KerasTensor((*lead, E))
    output, scores = layer(x, return_attention_scores=True)
    assert (
        output.shape == {"step": (None, E), "steps": (None, None, E), "regular": (None, 1, E)}[mode]
    )
    scores_shapes = {
        "step": (None, H, N),
        "steps": (None, H, None, N),
        "regular": (None, H, 1, None),
    }
    assert scores.shape == scores_shapes[mode]
    assert layer.compute_output_shape(x.shape) == output.shape


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


def test_inside_a_graph_warm_up_is_partial_and_nothing_retraces(backend, random):
    layer, regular = pair(random=random)
    traces = []

    @tf.function
    def step(x):
        traces.append(1)
        return layer.call_step(x)

    x = random.normal(size=(2, N + 3, E)).astype("float32")
    for t in range(N + 3):
        output = step(tf.constant(x[:, t]))
        window = x[:, max(0, t - N + 1) : t + 1]
        assert reference.relative_error(output, regular(window, window)[:, -1].numpy()) < 5e-6
    assert len(traces) == 1
    np.testing.assert_array_equal(layer.ready, [True, True])
    # The eager layer knows how far the graph has come.
    assert layer.call_step(x[:, 0]) is not None

    clean = tf.function(layer.clean_state)
    clean()
    assert layer.call_step(x[:, 0]) is None


def test_a_graph_makes_room_for_as_many_streams_as_come(backend, random):
    layer, _ = pair(random=random)
    step = tf.function(layer.call_steps, input_signature=[tf.TensorSpec([None, None, E])])
    x = random.normal(size=(3, N, E)).astype("float32")
    assert step(x[:1, :1]).shape == (1, 1, E)
    assert step(x).shape == (3, N, E)
    np.testing.assert_array_equal(layer.get_state()["position"], [N + 1, N, N])


def test_eagerly_one_op_attends(monkeypatch, executed_ops, random):
    """The projections are matrix products; all the rest is in the one custom op."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = tf.constant(random.normal(size=(2, E)).astype("float32"))
    layer.call_step(x)
    executed_ops.clear()
    layer.call_step(x)
    custom = [op for op in executed_ops if op.startswith("ContinualTransformers>")]
    assert custom == ["ContinualTransformers>SingleOutputAttention"]
    assert set(executed_ops) - set(custom) == {
        "AddV2", "ExpandDims", "MatMul", "ReadVariableOp", "Reshape", "Squeeze",
    }  # fmt: skip
    assert executed_ops.count("MatMul") == 4


@pytest.mark.parametrize(
    "options",
    [
        dict(seq_len=0),
        dict(seq_len=2.5),
        dict(seq_len=True),
        dict(num_heads=0),
        dict(key_dim=-1),
        dict(attention_axes=2),
        dict(attention_axes=(1, 2)),
        dict(warm_up="full"),
        dict(call_mode="walk"),
    ],
    ids=str,
)
def test_bad_construction(options):
    with pytest.raises(ValueError, match="(?i)expected"):
        ct.CoSiMultiHeadAttention(**{**dict(seq_len=N, num_heads=H, key_dim=D), **options})


STEP = np.ones((2, E), np.float32)
BAD = {
    "rank": dict(query=np.ones((2, 1, E), np.float32)),
    "features of query": dict(query=np.ones((2, E + 1), np.float32)),
    "features of value": dict(query=STEP, value=np.ones((2, E + 1), np.float32)),
    "rows of key": dict(query=STEP, value=STEP, key=np.ones((3, E), np.float32)),
    "dtype": dict(query=np.ones((2, E), np.int32)),
    "stream beyond": dict(query=STEP, streams=[0, 9]),
    "stream negative": dict(query=STEP, streams=[-1, 0]),
    "stream twice": dict(query=STEP, streams=[1, 1]),
    "streams too many": dict(query=STEP, streams=[0, 1, 2]),
    "streams not integers": dict(query=STEP, streams=["a", "b"]),
    "mask of another window": dict(query=STEP, attention_mask=np.ones((2, N + 1), bool)),
    "mask not bool": dict(query=STEP, attention_mask=np.ones((2, N), np.int32)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_changes_nothing(backend, random, what):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.call_steps(random.normal(size=(2, N - 2, E)))
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**BAD[what])
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    steps = {
        name: x[:, None] if name in ("query", "value", "key") else x
        for name, x in BAD[what].items()
    }
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_steps(**steps)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert layer.call_step(STEP).shape == (2, E)


def test_a_failing_call_holds_no_more_streams_and_builds_no_layer(backend, random):
    layer, _ = pair(random=random)
    layer.call_step(STEP)
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(np.ones((5, E), np.float32), attention_mask=np.ones((4, N), bool))
    assert layer.get_state()["position"].tolist() == [1, 1]
    new = ct.CoSiMultiHeadAttention(N, H, D)
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        new.call_step(STEP, value=np.ones((3, E + 2), np.float32))
    assert not new.built
    new.call_step(STEP)


def test_a_step_is_ready_by_what_has_really_been_taken(backend, random):
    """However the state came about: in a graph, by a checkpoint, by streams a graph made room for."""
    layer, _ = pair(random=random)
    x = random.normal(size=(3, N, E)).astype("float32")
    checkpoint = tf.train.Checkpoint(state=layer._stream_state)
    layer.call_steps(x[:, :2])
    young = checkpoint.save(tempfile.mkdtemp() + "/state")
    assert layer.call_steps(x[:, 2:]) is not None
    checkpoint.restore(young)
    assert layer.call_step(x[:, 2]) is None
    graph = tf.function(layer.call_steps, input_signature=[tf.TensorSpec([None, None, E])])
    graph(x)
    assert layer.call_step(x[:, 0]) is not None
    graph(np.ones((5, 1, E), np.float32))
    assert layer.call_step(x[:2, 0], streams=[3, 4]) is None


def test_a_mask_of_the_query_is_that_of_the_newest_row(random):
    x = random.normal(size=(2, N, E)).astype("float32")
    x[0, :2] = 0
    layer, _ = pair(random=random)
    output = layer(keras.layers.Masking()(x))
    assert keras.src.backend.get_keras_mask(output).shape == (2, 1)
    assert keras.layers.LSTM(3)(output).shape == (2, 3)


def test_low_rank_additions_stream(random):
    layer, _ = pair(random=random)
    layer.query_dense.enable_lora(2)
    x = random.normal(size=(1, N, E)).astype("float32")
    for weight in layer.query_dense.trainable_weights:
        weight.assign(random.normal(size=weight.shape))
    assert reference.relative_error(layer.call_steps(x), layer(x).numpy()) < 5e-6


def test_regular_input_of_another_rank_is_named_and_lists_are_taken(random):
    layer, _ = pair(random=random)
    with pytest.raises(ValueError, match=r"query of shape \(B, T, E\), but got \(2, 7\)"):
        layer.call_regular(STEP)
    x = random.normal(size=(1, N, E)).astype("float32")
    assert layer.call_regular(x.tolist()).shape == (1, 1, E)


def test_state_is_part_of_a_saved_model(tmp_path, random):
    layer, _ = pair(random=random)
    x = tf.constant(random.normal(size=(2, N + 2, E)).astype("float32"))
    module = tf.Module()
    module.layer = layer
    module.step = tf.function(layer.call_step, input_signature=[tf.TensorSpec([None, E])])
    for t in range(N):
        module.step(x[:, t])
    tf.saved_model.save(module, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for t in range(N, N + 2):
        np.testing.assert_array_equal(loaded.step(x[:, t]), module.step(x[:, t]))


def test_no_steps_and_training_with_dropout_are_refused(random):
    layer, _ = pair(random=random, dropout=0.5)
    with pytest.raises(ValueError, match="at least one step"):
        layer.call_steps(np.ones((2, 0, E), np.float32))
    with pytest.raises(ValueError, match="dropout"):
        layer.call_step(STEP, training=True)
    with pytest.raises(ValueError, match="mask"), ct.call_mode("step"):
        layer(STEP, key_mask=np.ones(2, bool))
    assert layer.get_state()["position"].sum() == 0


def test_receptive_field_and_delay():
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    assert (layer.receptive_field, layer.delay, layer.seq_len) == (N, 0, N)
