"""All rows of CoReTransformerEncoder against the regular encoder on sliding windows."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from encoder_cases import FF, E, H, N, RegularEncoder
from errors import BAD_INPUT

pytestmark = pytest.mark.sampled(6)


def block(random, **options):
    layer = ct.CoReTransformerEncoder(N, E, H, FF, **options)
    layer.build((None, N, E))
    layer.set_weights([random.normal(scale=0.5, size=w.shape) for w in layer.weights])
    return layer


@pytest.mark.parametrize("options", [
    {}, dict(norm_first=True, use_bias=False), dict(activation="relu", key_dim=3),
    dict(algorithm="update"), dict(algorithm="recompute"), dict(dtype="float64"),
], ids=str)  # fmt: skip
def test_modes_equal_the_regular_encoder(backend, random, options):
    layer = block(random, **options)
    dtype = options.pop("dtype", "float32")
    options.pop("algorithm", None)
    regular = RegularEncoder(layer, **options).model
    bound = 1e-5 if dtype == "float32" else 1e-7  # Keras rounds the attention's scale to float32.
    x = random.normal(size=(3, 3 * N, E)).astype(dtype)
    # One call for all windows: each op in eager mode costs more than its work.
    windows = np.concatenate([x[:, t : t + N] for t in range(N + 1)])
    rows, own = (np.split(call(windows).numpy(), N + 1) for call in (regular, layer))
    for t in range(2 * N):
        output = layer.call_step(x[:, t])
        if t < N - 1:
            assert output is None
            continue
        expected = rows[t - N + 1]
        assert output.shape == (3, N, E)
        assert reference.relative_error(output, expected) < bound
        assert reference.relative_error(own[t - N + 1], expected) < bound
    steps = layer.call_steps(x[:, 2 * N :])
    assert steps.shape == (3, N, N, E)
    assert reference.relative_error(steps[:, -1], regular(x[:, -N:]).numpy()) < bound


def test_partial_warm_up_is_the_shorter_sequence(backend, random):
    layer = block(random, warm_up="partial")
    regular = RegularEncoder(layer).model
    x = random.normal(size=(2, N + 2, E)).astype("float32")
    for t in range(N + 2):
        output = layer.call_step(x[:, t])
        seen = x[:, max(0, t - N + 1) : t + 1]
        newest = output[:, N - seen.shape[1] :]
        assert reference.relative_error(newest, regular(seen).numpy()) < 1e-5
        assert not output[:, : N - seen.shape[1]].numpy().any()


@pytest.mark.parametrize("lengths", [[20], [1] * 9, [2, 3, 1, 9], [N, N], [N + 3, 1]])
def test_steps_in_any_portions(backend, random, lengths):
    """Streams have different ages, and their order changes at each call."""
    layer, alone = block(random, warm_up="partial"), None
    x = random.normal(size=(3, sum(lengths), E)).astype("float32")
    alone = block(random, warm_up="partial")
    alone.set_weights(layer.get_weights())
    layer.ensure_streams(4)
    layer.call_steps(x[:1, :2] + 9, streams=[2])  # Stream 2 is older.
    alone.call_steps(np.concatenate([x[:, :2] + 9] * 1))
    alone.clean_state(streams=[0, 1])
    state = alone.get_state(streams=[2])
    state_of = layer.get_state(streams=[2])
    assert state_of.keys() == state.keys()
    layer.set_state(state, streams=[2])
    expected = alone.call_steps(x).numpy()
    first = 0
    for length in lengths:
        order = random.permutation(3)
        peek = layer.call_steps(x[order, first : first + length], streams=order, update_state=False)
        output = layer.call_steps(x[order, first : first + length], streams=order)
        np.testing.assert_array_equal(peek, output)
        for row, stream in enumerate(order):
            part = expected[stream, first : first + length]
            assert reference.relative_error(output[row], part) < 1e-5
        first += length


def test_state_goes_on_elsewhere(random):
    layer, other = block(random), block(random)
    other.set_weights(layer.get_weights())
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    layer.call_steps(x[:, :N])
    other.ensure_streams(5)
    state = layer.get_state()
    other.set_state(state, streams=[4, 1])
    expected = layer.call_step(x[:, N])
    np.testing.assert_array_equal(other.call_step(x[:, N], streams=[4, 1]), expected)
    assert layer.ready.numpy().tolist() == [True, True]
    layer.clean_state(streams=[0])
    assert layer.ready.numpy().tolist() == [False, True]
    before = layer.get_state()
    for bad in (
        {},
        {**state, "window": state["window"][:, 1:]},
        {**state, "keys": state["keys"][0]},
    ):
        with pytest.raises(ValueError, match="Expected"):
            layer.set_state(bad)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert (layer.receptive_field, layer.delay) == (N, 0)


def test_in_a_graph_saved_and_trained(tmp_path, random):
    inputs = keras.Input((N, E))
    layer = ct.CoReTransformerEncoder(N, E, H, FF, algorithm="update")
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)  # Otherwise fit traces its graph twice.
    x = random.normal(size=(32, N, E)).astype("float32")
    losses = model.fit(x, x[:, ::-1], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").layers[1]
    assert again.get_config() == layer.get_config()
    layer.ensure_streams(2)
    graph = tf.function(layer.call_steps)
    steps = graph(tf.constant(x[:2]))
    assert steps.shape == (2, N, N, E)
    np.testing.assert_allclose(steps[:, -1], again(x[:2]), atol=1e-5)
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(layer.call_steps(x[:2]) ** 2)
    assert all(g is not None for g in tape.gradient(y, layer.trainable_weights))


@pytest.mark.parametrize("call", [
    dict(x=np.zeros((2, 1, E), np.float32)), dict(x=np.zeros((2, E + 1), np.float32)),
    dict(x=np.zeros((2, E), np.int64)), dict(x=None),
    dict(x=np.zeros((2, E), np.float32), streams=[0, 9]),
    dict(x=np.zeros((2, E), np.float32), streams=[0, 0]),
    dict(x=np.zeros((2, E), np.float32), streams=[0]),
])  # fmt: skip
def test_bad_input_changes_nothing(backend, random, call):
    layer = block(random)
    layer.call_steps(random.normal(size=(2, N, E)))
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**call)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
