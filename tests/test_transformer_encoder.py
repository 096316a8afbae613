"""Stacks of any depth, of both kinds, against regular encoders on windows."""

import functools
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from encoder_cases import FF, E, H, N, RegularStack
from errors import BAD_INPUT

pytestmark = pytest.mark.sampled(6)

DEPTHS = [1, 2, 3, pytest.param(6, marks=pytest.mark.slow)]


def stack(random, depth, kind, n=N, **options):
    layer = ct.TransformerEncoder(depth, n, E, H, FF, kind=kind, **options)
    layer.build((None, n, E))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    return layer


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("options", [{}, dict(norm_first=True, use_bias=False)], ids=str)
def test_retroactive_is_the_regular_encoder_on_every_window(backend, random, depth, options):
    layer = stack(random, depth, "retroactive", **options)
    regular = RegularStack(layer, **options)
    assert (layer.receptive_field, layer.delay) == (N, 0)
    x = random.normal(size=(2, 2 * N + 3, E)).astype("float32")
    # One call for all windows: each op in eager mode costs more than its work.
    windows = np.concatenate([x[:, t : t + N] for t in range(N + 4)])
    of_windows = np.split(regular(windows)[:, -1].numpy(), N + 4)
    calls = np.split(layer(windows)[:, 0].numpy(), N + 4)
    for t, (call, expected) in enumerate(zip(calls, of_windows, strict=True)):
        assert reference.relative_error(call, expected) < 2e-5, t
    for t in range(2 * N):
        output = layer.call_step(x[:, t])
        if t < N - 1:
            assert output is None
        else:
            assert reference.relative_error(output, of_windows[t - N + 1]) < 2e-5, t
    assert layer.ready.numpy().all()
    steps = layer.call_steps(x[:, 2 * N :])
    assert steps.shape == (2, 3, E)
    for t, expected in enumerate(of_windows[-3:]):
        assert reference.relative_error(steps[:, t], expected) < 2e-5, t


@pytest.mark.parametrize("depth", DEPTHS)
def test_retroactive_warms_up_as_the_shorter_sequence(backend, random, depth):
    layer = stack(random, depth, "retroactive", warm_up="partial")
    regular = RegularStack(layer)
    x = random.normal(size=(2, N + 1, E)).astype("float32")
    steps = layer.call_steps(x, update_state=False)
    for t in range(N + 1):
        output = layer.call_step(x[:, t])
        expected = regular(x[:, max(0, t - N + 1) : t + 1])[:, -1].numpy()
        assert reference.relative_error(output, expected) < 2e-5
        assert reference.relative_error(steps[:, t], expected) < 2e-5


def banded(layer, x, n=N):
    """Return all rows of regular blocks in which each step attends only to the n newest."""
    regular = RegularStack(layer)
    for block in regular.blocks:
        # Each row comes from the window that ends with it. The first windows are shorter.
        rows = [block(x[:, :t])[:, -1] for t in range(1, min(n, x.shape[1] + 1))]
        if x.shape[1] >= n:
            windows = reference.sliding_windows(x.swapaxes(0, 1), n).swapaxes(1, 2)  # [T', B, n, E]
            newest = block(windows.reshape(-1, n, E))[:, -1]
            rows += list(newest.numpy().reshape(-1, *x.shape[::2]))
        x = np.stack(rows, 1)
    return x


@pytest.mark.parametrize("depth", DEPTHS)
def test_single_output_is_a_band_in_every_layer(backend, random, depth):
    n = 3
    layer = stack(random, depth, "single_output", n)
    field = 1 + depth * (n - 1)
    assert (layer.receptive_field, layer.delay) == (field, 0)
    x = random.normal(size=(2, field + 4, E)).astype("float32")
    expected = banded(layer, x, n)
    # One call for all windows: each op in eager mode costs more than its work.
    windows = np.concatenate([x[:, t : t + field] for t in range(5)])
    calls = np.split(layer(windows)[:, 0].numpy(), 5)
    for t in range(field + 4):
        output = layer.call_step(x[:, t])
        assert (output is None) == (t < field - 1)
        if output is not None:
            assert reference.relative_error(output, expected[:, t]) < 2e-5, t
            assert reference.relative_error(calls[t - field + 1], expected[:, t]) < 2e-5, t
    np.testing.assert_array_equal(layer.ready, [True, True])
    for t in (field, field + 3):  # Steps before the receptive field have no effect.
        assert reference.relative_error(layer(x[:, : t + 1])[:, 0], expected[:, t]) < 2e-5, t


@pytest.mark.parametrize("depth", DEPTHS)
def test_single_output_warms_up_as_the_shorter_sequence(backend, random, depth):
    layer = stack(random, depth, "single_output", 4, warm_up="partial")
    x = random.normal(size=(2, 7, E)).astype("float32")
    expected = banded(layer, x, 4)
    for t in range(7):
        output = layer.call_step(x[:, t])
        assert reference.relative_error(output, expected[:, t]) < 2e-5, t
        assert reference.relative_error(layer(x[:, : t + 1])[:, 0], expected[:, t]) < 2e-5, t


@functools.cache
def stack_and_outputs(backend, kind, depth):
    """Return a stack, 16 steps of two streams, and one call's outputs and state after them.

    `backend` is in use. Tests share the stack, and clean its streams before they use it.
    """
    random = np.random.default_rng(20260611)
    layer = stack(random, depth, kind, 3)
    x = random.normal(size=(2, 16, E)).astype("float32")
    return layer, x, layer.call_steps(x).numpy(), layer.get_state()


@pytest.mark.parametrize("kind", ["single_output", "retroactive"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("lengths", [[16], [1] * 16, [2, 6, 1, 7]], ids=str)
def test_steps_are_one_call(backend, kind, depth, lengths):
    """Calls of any lengths, with streams in changing order, give one call's outputs and state."""
    layer, x, expected, whole = stack_and_outputs(backend, kind, depth)
    layer.ensure_streams(5)
    layer.clean_state()
    outputs, first = [], 0
    for i, length in enumerate(lengths):
        order = [0, 1] if i % 2 else [1, 0]
        chunk = x[order, first : first + length]
        streams = [4 - s for s in order]
        peeks = i % 3 == 0  # In both orders; before and after the first outputs.
        peek = layer.call_steps(chunk, streams=streams, update_state=False) if peeks else None
        if length == 1:
            output = layer.call_step(chunk[:, 0], streams=streams)
            output = None if output is None else output[:, tf.newaxis]
        else:
            output = layer.call_steps(chunk, streams=streams)
        if peeks:
            assert (peek is None) == (output is None)
        if peek is not None:
            assert reference.relative_error(peek, output.numpy()) < 2e-5
        if output is not None:
            outputs.append(output.numpy()[order])  # Each order is its own inverse.
        first += length
    outputs = np.concatenate(outputs, 1)
    assert outputs.shape == expected.shape == (2, 16 - layer.receptive_field + 1, E)
    assert reference.relative_error(outputs, expected) < 2e-5
    got = layer.get_state(streams=[4, 3])
    for part, state in whole.items():
        np.testing.assert_array_equal(got[part]["position"], state["position"])


@pytest.mark.parametrize("kind", ["single_output", "retroactive"])
@pytest.mark.parametrize("xla", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trained_on_steps_it_is_what_streams(random, kind, xla):
    """fit in "steps" mode from a clean state; then single steps give the same outputs."""
    layer = ct.TransformerEncoder(2, 4, E, H, FF, kind=kind, dropout_rate=0.0, warm_up="partial")
    model = keras.Sequential([layer, keras.layers.Dense(1)])
    x = random.normal(size=(24, 10, E)).astype("float32")
    y = np.cumsum(x[..., :1], 1)
    ct.ensure_streams(model, 24)
    with ct.call_mode("steps"):
        model.compile("adam", "mse", jit_compile=xla)
        model.build((None, *x.shape[1:]))
        model.optimizer.build(model.trainable_variables)  # Otherwise fit traces its graph twice.
        history = model.fit(
            x, y, batch_size=24, epochs=6, verbose=0, callbacks=[ct.CleanState()]
        ).history["loss"]
        ct.clean_state(model)
        expected = model(x).numpy()  # predict would trace another graph.
    assert history[-1] < history[0]
    ct.clean_state(model)
    for t in range(10):
        output = model.layers[-1](layer.call_step(x[:, t]))
        assert reference.relative_error(output, expected[:, t]) < 2e-5


@pytest.mark.parametrize("kind", ["single_output", "retroactive"])
def test_comes_back_from_a_file_and_takes_steps_in_graphs(tmp_path, random, kind):
    inputs = keras.Input((N, E))
    layer = ct.TransformerEncoder(2, N, E, H, FF, kind=kind, norm_first=True, activation="relu")
    assert layer.final_norm is not None
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").layers[1]
    assert again.get_config() == layer.get_config()
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    np.testing.assert_allclose(again(x[:, :N]), layer(x[:, :N]), atol=1e-6)
    layer.ensure_streams(2)
    # AutoGraph doubles the time of tracing, and both kinds have the same code for it.
    step = tf.function(layer.call_step, autograph=kind == "retroactive")
    outputs = [step(tf.constant(x[:, t])) for t in range(2 * N)]
    assert step.experimental_get_tracing_count() == 1
    expected = again.call_steps(x)
    np.testing.assert_allclose(outputs[-1], expected[:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", ["single_output", "retroactive"])
def test_state_goes_on_elsewhere(random, kind):
    layer, other = (stack(random, 2, kind, warm_up="partial") for _ in range(2))
    other.set_weights(layer.get_weights())
    x = random.normal(size=(2, N + 2, E)).astype("float32")
    layer.call_steps(x[:, :N])
    other.set_state(layer.get_state())
    np.testing.assert_array_equal(other.call_step(x[:, N]), layer.call_step(x[:, N]))
    layer.clean_state()
    assert layer.position.numpy().tolist() == [0, 0]
    with pytest.raises(ValueError, match="Expected"):
        layer.set_state({"0": {}})


@pytest.mark.parametrize("what", [
    dict(num_layers=0), dict(kind="both"), dict(warm_up="full"), dict(seq_len=0), dict(ff_dim=0),
    dict(embed_dim=1.5), dict(num_heads=0), dict(cache_dtype="int8"),
], ids=str)  # fmt: skip
def test_bad_construction(what):
    arguments = dict(num_layers=2, seq_len=N, embed_dim=E, num_heads=H, ff_dim=FF)
    with pytest.raises(ValueError, match="Expected|num_heads"):
        ct.TransformerEncoder(**{**arguments, **what})


@functools.cache
def stepped_stack(backend, kind):
    """Return a stack with streams, for calls that must change nothing. `backend` is in use."""
    random = np.random.default_rng(3)
    layer = stack(random, 2, kind)
    layer.call_steps(random.normal(size=(2, N, E)))
    return layer


@pytest.mark.parametrize("kind", ["single_output", "retroactive"])
@pytest.mark.parametrize("call", [
    dict(x=np.zeros((2, 1, E), np.float32)), dict(x=np.zeros((2, E + 1), np.float32)),
    dict(x=np.zeros((2, E), np.int64)), dict(x=None),
    dict(x=np.zeros((2, E), np.float32), streams=[0, 9]),
    dict(x=np.zeros((2, E), np.float32), streams=[0, 0]),
    dict(x=np.zeros((2, E), np.float32), streams=[0]),
])  # fmt: skip
def test_bad_input_changes_nothing(backend, kind, call):
    layer = stepped_stack(backend, kind)
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**call)
    for part, state in layer.get_state().items():
        for name, array in state.items():
            np.testing.assert_array_equal(array, before[part][name])


def test_gradients_of_an_eager_step(backend, random):
    layer = ct.TransformerEncoder(2, N, E, H, FF, kind="retroactive")
    layer.call_steps(random.normal(size=(2, N, E)))
    x = tf.constant(random.normal(size=(2, E)).astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer.call_step(x) ** 2)
    assert np.abs(tape.gradient(loss, x)).max() > 0


@pytest.mark.parametrize("kind", ["single_output", "retroactive"])
def test_threads_step_streams_of_one_stack(backend, random, kind):
    layer = ct.TransformerEncoder(2, 4, E, H, FF, kind=kind)
    layer.build((None, 4, E))
    streams, steps = 3, layer.receptive_field + 3
    x = random.normal(size=(streams, steps, E)).astype("float32")
    layer.ensure_streams(streams)
    outputs = {}

    def run(i):
        outputs[i] = [layer.call_step(x[i : i + 1, t], streams=[i]) for t in range(steps)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = layer.call_regular(x[:, -layer.receptive_field :])[:, 0].numpy()
    for i in range(streams):
        assert outputs[i][layer.receptive_field - 2] is None
        assert reference.relative_error(outputs[i][-1], expected[i : i + 1]) < 1e-5, i
