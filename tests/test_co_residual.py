"""CoResidual against keras.layers.Add on windows."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, pair
from errors import BAD_INPUT
from traced import traced

pytestmark = pytest.mark.sampled(9)


def residual(random, **layer_options):
    """Return a residual around attention, and a Keras function for it on windows, with all rows."""
    attention, regular = pair(random=random, layer_options=layer_options)
    return ct.CoResidual(attention), lambda x: keras.layers.Add()([x, regular(x, x)]).numpy()


@pytest.mark.parametrize("index", [-1, -3, -N, 0, 2])
@pytest.mark.parametrize("single_output", [True, False])
def test_modes_equal_the_sum_on_windows(backend, random, index, single_output):
    layer, regular = residual(random, query_index=index, single_output=single_output)
    x = random.normal(size=(3, 3 * N, E)).astype("float32")
    windows = reference.sliding_windows(x.swapaxes(0, 1), N).swapaxes(1, 2).reshape(-1, N, E)
    expected = regular(windows).astype("float64")  # 2N + 1 windows of 3 streams.
    rows = expected[:, index % N].reshape(2 * N + 1, 3, E)
    for t in range(2 * N):
        output = layer.call_step(x[:, t])
        assert (output is None) == (t < N - 1)
        if output is not None:
            assert reference.relative_error(output, rows[t - N + 1]) < 1e-5
    steps = layer.call_steps(x[:, 2 * N :])
    assert reference.relative_error(steps, rows[N + 1 :].swapaxes(0, 1)) < 1e-5
    if single_output:
        expected = expected[:, [index % N]]
    assert reference.relative_error(layer(windows), expected) < 1e-5


@pytest.mark.parametrize("warm_up", ["none", "partial"])
@pytest.mark.parametrize("index", [-1, -3])
@pytest.mark.parametrize("portions", [[1] * 15, [5, 9, 1], [3, 12]], ids=str)
def test_steps_in_any_portions_are_one_call(random, warm_up, index, portions):
    layer, _ = residual(random, query_index=index, warm_up=warm_up)
    x, first, came = random.normal(size=(2, 15, E)).astype("float32"), 0, []
    whole = layer.call_steps(x)
    layer.clean_state()
    for length in portions:
        came.append(layer.call_steps(x[:, first : first + length]))
        first += length
    came = np.concatenate([y for y in came if y is not None], 1)
    np.testing.assert_allclose(came, whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("index", [-1, -3])
def test_streams_of_different_ages_in_any_order(backend, random, index):
    layer, _ = residual(random, query_index=index, warm_up="partial")
    x = random.normal(size=(3, 3 * N, E)).astype("float32")
    expected = layer.call_steps(x)  # The first row is that of the first step with an output.
    layer.clean_state()
    # This makes room in the inner layer only. The residual's own delay follows.
    layer.layer.ensure_streams(4)
    layer.call_step(x[:1, 0], streams=[3])
    taken = [0, 0, 0, 1]
    for streams in [[2], [2, 0], [0, 1, 2], [1, 2], [2, 1, 0]] * 3:
        rows = np.stack([x[s, taken[s]] for s in streams])
        peek = layer.call_step(rows, streams=streams, update_state=False)
        y = layer.call_step(rows, streams=streams)
        assert (peek is None) == (y is None)
        for i, s in enumerate(streams):
            if taken[s] >= layer.delay:
                np.testing.assert_allclose(
                    y[i], expected[s, taken[s] - layer.delay], rtol=2e-5, atol=2e-5
                )
                np.testing.assert_array_equal(peek[i], y[i])
            taken[s] += 1
    np.testing.assert_array_equal(layer.position, taken)
    np.testing.assert_array_equal(layer.ready, [t >= N for t in taken])


@pytest.mark.parametrize("index", [-1, -3])
def test_state_goes_on_in_another_layer_bit_for_bit(backend, random, index):
    here, _ = residual(random, query_index=index)
    there = ct.CoResidual(ct.CoSiMultiHeadAttention(N, H, D, query_index=index))
    there.build((None, N, E))
    there.set_weights(here.get_weights())
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    here.call_steps(x[:, : N - 1])
    assert set(here.get_state()) == ({"layer"} if index == -1 else {"layer", "skip"})
    there.ensure_streams(4)
    there.set_state(here.get_state(streams=[1, 0]), streams=[3, 1])
    for t in range(N - 1, 2 * N):
        y = here.call_step(x[:, t])
        np.testing.assert_array_equal(there.call_step(x[:, t], streams=[1, 3]), y)
    before = there.get_state()
    for bad in (
        {"layer": before["layer"], "more": 1},
        {**before, "layer": {"position": np.zeros(4, "int64")}},
        {name: {"position": np.zeros(4, "int64")} for name in before},
    ):
        with pytest.raises(ValueError, match="Expected"):
            there.set_state(bad)
        for part, state in there.get_state().items():
            for name, array in state.items():
                np.testing.assert_array_equal(array, before[part][name])
    there.clean_state(streams=[3])
    np.testing.assert_array_equal(there.position, [0, 2 * N, 0, 0])


def test_around_other_layers(random):
    x = random.normal(size=(2, 3 * N, E)).astype("float32")
    encoding = ct.CoResidual(ct.CircularPositionalEncoding(4, E, 0))
    rows = encoding(np.zeros_like(x))
    np.testing.assert_allclose(encoding(x), 2 * x + rows, atol=1e-6)
    np.testing.assert_allclose(encoding.call_steps(x), 2 * x + rows, atol=1e-6)
    delay = ct.CoResidual(ct.CoDelay(2))
    np.testing.assert_array_equal(delay(x), 2 * x)
    np.testing.assert_array_equal(delay.call_steps(x[:, :5]), 2 * x[:, :3])
    np.testing.assert_array_equal(delay.call_step(x[:, 5]), 2 * x[:, 3])
    last = ct.CoResidual(ct.CoDelay(2, temporal_dim=2))
    np.testing.assert_array_equal(last(x), 2 * x)
    np.testing.assert_array_equal(last.call_steps(x[:, :, :5]), 2 * x[:, :, :3])
    encoder = ct.CoResidual(ct.CoSiTransformerEncoder(N, E, H, 9))
    window = x[:, :N]
    np.testing.assert_allclose(encoder(window), encoder.layer(window) + window[:, -1:], atol=1e-6)
    np.testing.assert_allclose(encoder.call_steps(window), encoder(window), atol=1e-5)
    twice = ct.CoResidual(ct.CoResidual(ct.CoDelay(1)))
    np.testing.assert_array_equal(twice.call_steps(x), 3 * x[:, :-1])


def test_delay_and_receptive_field(random):
    layer, _ = residual(random, query_index=-3)
    assert (layer.delay, layer.receptive_field) == (2, N)
    deeper = ct.CoResidual(ct.CoDelay(2))
    assert (deeper.delay, deeper.receptive_field, deeper.warm_up) == (2, 3, "none")


def test_masks_of_keras_and_arguments_of_the_layer(random):
    layer, _ = residual(random, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    x[1, 2:4] = 0
    masking = keras.layers.Masking()
    kept = np.arange(N)[None] != np.array([[9], [2]])
    kept[1, 3] = False
    expected = layer.layer.call_regular(x, key_mask=kept, value_mask=kept) + x[:, -1:]
    np.testing.assert_allclose(layer(masking(x)), expected, atol=1e-5)
    np.testing.assert_allclose(layer.call_steps(x, key_mask=kept)[:, -1:], expected, atol=1e-5)
    with ct.call_mode("steps"):
        np.testing.assert_allclose(layer(masking(x), streams=[1, 0])[:, -1].shape, (2, E))
    with pytest.raises(ValueError, match="Expected outputs only"):
        layer.call_step(x[:, 0], return_attention_scores=True)


@pytest.mark.parametrize("index", [-1, -3])
def test_in_a_graph(backend, random, index):
    layer, _ = residual(random, query_index=index, warm_up="partial")
    layer.ensure_streams(3)
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    eager = [layer.call_step(x[:, t]) for t in range(2 * N)]
    layer.clean_state()
    signature = [tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)]
    step = tf.function(
        lambda x, s: layer.call_step(x, streams=s),
        input_signature=signature,
        autograph=index == -1,  # With it, tracing takes twice as long.
    )
    for t in range(2 * N):
        y = step(x[:, t], [0, 1])
        if eager[t] is not None:
            np.testing.assert_allclose(y, eager[t], rtol=2e-5, atol=2e-5)
    before = layer.get_state()
    for bad in ([0, 0], [0, 7], [2]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
            step(x[:, 0], tf.constant(bad))
    for part, state in layer.get_state().items():
        for name, array in state.items():
            np.testing.assert_array_equal(array, before[part][name])


def test_where_the_layer_fails_in_a_graph_nothing_goes_past_it(backend, random):
    layer, _ = residual(random, query_index=-3, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    layer.call_steps(x)
    signature = [tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.bool)]
    step = traced(
        lambda x, mask: layer.call_step(x, key_mask=mask, streams=[1, 0]), input_signature=signature
    )
    step(x[:, 0], [True, False])
    before = layer.get_state()
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(x[:, 1], [True, False, True])  # Only the inner layer checks the mask.
    for part, state in layer.get_state().items():
        for name, array in state.items():
            np.testing.assert_array_equal(array, before[part][name])


def test_gradients_of_steps(random):
    layer, _ = residual(random, query_index=-3, warm_up="partial")
    x = tf.constant(random.normal(size=(1, N, E)), "float32")
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        steps = tf.reduce_sum(layer.call_steps(x)[:, -1] ** 2)
        whole = tf.reduce_sum(layer(x) ** 2)
    got, expected = (tape.gradient(y, x).numpy() for y in (steps, whole))
    assert reference.relative_error(got, expected.astype("float64")) < 2e-5


def test_trains_comes_back_from_a_file_and_is_converted(random, tmp_path):
    inputs = keras.Input((N, E))
    x = ct.CoResidual(ct.CoSiMultiHeadAttention(N, H, D), name="block")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))
    model.compile("adam", "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)  # Otherwise fit traces its graph twice.
    windows = random.normal(size=(16, N, E)).astype("float32")
    losses = model.fit(windows, windows[:, -1, :1], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(windows), model(windows), atol=1e-6)
    assert loaded.get_layer("block").layer.receptive_field == N
    streaming = ct.StreamingModel(loaded)
    stream = random.normal(size=(2, 2 * N, E)).astype("float32")
    for t in range(2 * N):
        y = streaming.call_step(stream[:, t])
        if y is not None:
            expected = model(stream[:, t - N + 1 : t + 1])
            np.testing.assert_allclose(y, expected, atol=1e-5)
    state = streaming.get_state()
    streaming.set_state(state)
    shorter = ct.convert(model, seq_len=3)
    assert shorter.receptive_field == shorter.model.get_layer("block").layer.seq_len == 3
    ct.clean_state(streaming)
    np.testing.assert_array_equal(streaming.position, [0, 0])


def test_attention_to_what_sees_later_steps_is_refused_through_a_residual():
    inputs = keras.Input((N, E))

    def block(x, **options):
        attention = ct.CoSiMultiHeadAttention(N, H, D, single_output=False)
        return ct.CoResidual(attention)(x, **options)

    with pytest.raises(ValueError, match="attends to the outputs of another attention"):
        ct.StreamingModel(keras.Model(inputs, block(block(inputs))))
    causal = block(block(inputs, use_causal_mask=True))
    ct.StreamingModel(keras.Model(inputs, causal))


def test_is_exported(random, tmp_path):
    layer, _ = residual(random, query_index=-3, warm_up="partial")
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    layer.call_steps(x[:, :3])
    ct.export(layer, tmp_path / "saved")
    step = tf.saved_model.load(str(tmp_path / "saved")).signatures["step"]
    for t in range(3, 2 * N):
        result = step(x=tf.constant(x[:, t]), streams=tf.constant([0, 1]))
        np.testing.assert_allclose(result["y"], layer.call_step(x[:, t]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(result["ready"], layer.ready)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_half_precision(random, dtype):
    """The residual has the dtype of its inner layer, or another one."""
    attention = ct.CoSiMultiHeadAttention(N, H, D, query_index=-2, dtype="bfloat16")
    layer = ct.CoResidual(attention, **({} if dtype is None else dict(dtype=dtype)))
    x = tf.cast(random.normal(size=(2, N, E)), "float32")
    steps, whole = layer.call_steps(x), layer(x)
    assert steps.dtype == whole.dtype == (dtype or "bfloat16")
    np.testing.assert_allclose(tf.cast(steps, "float32"), tf.cast(whole, "float32"), atol=0.05)


@pytest.mark.parametrize(
    "layer", [keras.layers.Dense(3), keras.layers.MultiHeadAttention(2, 3), None, "attention"]
)
def test_what_is_no_continual_layer_is_refused(layer):
    with pytest.raises(ValueError, match="Expected a continual layer"):
        ct.CoResidual(layer)


@pytest.mark.parametrize("mode", ["regular", "step", "steps"])
def test_features_that_cannot_be_added_are_refused(mode):
    attention = ct.CoSiMultiHeadAttention(N, H, D, output_shape=E + 1)
    layer = ct.CoResidual(attention, call_mode=mode)
    x = np.zeros((2, E) if mode == "step" else (2, N, E), "float32")
    with pytest.raises(ValueError, match=f"Expected a layer that returns the features.*{E + 1}"):
        layer(x)
    assert attention.position.shape[0] in (None, 0)


@pytest.mark.parametrize("index", [-1, -3])
@pytest.mark.parametrize(
    "call",
    [
        dict(x=np.zeros((2, E + 1), "float32")),
        dict(x=np.zeros((2, 1, E), "float32")),
        dict(x=np.zeros((2, E), "int32")),
        dict(x=np.zeros((2, E), "float32"), streams=[0, 9]),
        dict(x=np.zeros((2, E), "float32"), streams=[1, 1]),
    ],
)
def test_bad_input_changes_nothing(backend, random, index, call):
    layer, _ = residual(random, query_index=index)
    layer.call_steps(random.normal(size=(2, N, E)))
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**call)
    for part, state in layer.get_state().items():
        for name, array in state.items():
            np.testing.assert_array_equal(array, before[part][name])
    assert layer.call_step(np.zeros((2, E), "float32")).shape == (2, E)


def test_a_residual_within_a_residual_is_converted(random):
    x = keras.Input((None, E))
    model = keras.Model(x, ct.CoResidual(ct.CoResidual(ct.CoDelay(2)))(x))
    streaming = ct.convert(model, warm_up="partial")
    given = random.normal(size=(1, 7, E)).astype("float32")
    np.testing.assert_allclose(streaming.call_steps(given)[:, 2:], 3 * given[:, :-2], rtol=1e-6)
