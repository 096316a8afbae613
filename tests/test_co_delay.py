"""Tests of CoDelay: its outputs on windows and on streams."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from errors import BAD_INPUT
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")

E = 3


def numbers(streams, steps, features=(E,)):
    """Return x [M, T, ...] in which all numbers differ, and none is 0."""
    return np.arange(1, 1 + streams * steps * int(np.prod(features)), dtype="float32").reshape(
        streams, steps, *features
    )


def late(x, delay):
    """Return the expected outputs of the first T steps: zeros, then the steps of `delay` before."""
    zeros = np.zeros_like(x[:, :delay])
    return np.concatenate([zeros, x], 1)[:, : x.shape[1]]


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("features", [(), (E,), (2, E)], ids=str)
def test_each_step_comes_out_that_many_steps_later(delay, features):
    layer, x = ct.CoDelay(delay), numbers(2, 11, features)
    for t in range(11):
        y = layer.call_step(x[:, t])
        if t < delay:
            assert y is None
        else:
            np.testing.assert_array_equal(y, x[:, t - delay])
    np.testing.assert_array_equal(layer.ready, [True, True])
    np.testing.assert_array_equal(layer.position, [11, 11])
    np.testing.assert_array_equal(layer(x), x)  # Windows are not delayed.
    assert (layer.delay, layer.receptive_field) == (delay, delay + 1)


@pytest.mark.parametrize("delay", [0, 1, 3, 5])
@pytest.mark.parametrize("portions", [[12], [1] * 12, [5, 1, 6], [2, 10], [3, 3, 3, 3]], ids=str)
def test_steps_in_any_portions(delay, portions):
    layer, x, first, came = ct.CoDelay(delay), numbers(2, 12), 0, []
    for length in portions:
        y = layer.call_steps(x[:, first : first + length])
        first += length
        assert (y is None) == (first <= delay)
        if y is not None:
            assert y.shape[1] == min(length, first - delay)
            came.append(y)
    np.testing.assert_array_equal(np.concatenate(came, 1), x[:, : 12 - delay])


def test_a_program_written_for_the_original_package():
    layer = ct.CoDelay(2, tf.float32, 1, "regular")
    x = numbers(1, 5)
    np.testing.assert_array_equal(layer(x), x)
    assert layer.call_steps(x[:, :2]) is None
    np.testing.assert_array_equal(layer.call_step(x[:, 2]), x[:, 0])
    np.testing.assert_array_equal(layer.call_steps(x[:, 3:]), x[:, 1:3])
    layer.clean_state()
    layer.call_mode = "step"
    assert layer(x[:, 0]) is None


def test_streams_of_different_ages_in_any_order():
    layer, x = ct.CoDelay(2), numbers(3, 9)
    layer.ensure_streams(3)
    assert layer.call_step(x[[2], 0], streams=[2]) is None
    assert layer.call_step(x[[2, 0], [1, 0]], streams=[2, 0]) is None
    y = layer.call_step(x[[0, 1, 2], [1, 0, 2]], streams=[0, 1, 2])
    np.testing.assert_array_equal(y, [0 * x[0, 0], 0 * x[1, 0], x[2, 0]])
    np.testing.assert_array_equal(layer.ready, [False, False, True])
    y = layer.call_steps(np.stack([x[1, 1:4], x[0, 2:5]]), streams=[1, 0])
    np.testing.assert_array_equal(y, [np.stack([0 * x[1, 0], *x[1, :2]]), x[0, :3]])
    layer.clean_state(streams=[0])
    y = layer.call_step(x[[0, 1], [0, 4]], streams=[0, 1])
    np.testing.assert_array_equal(y, [0 * x[0, 0], x[1, 2]])
    np.testing.assert_array_equal(layer.position, [1, 5, 3])


def test_what_an_earlier_stream_left_is_never_given():
    layer = ct.CoDelay(2, warm_up="partial")
    layer.call_steps(np.full((1, 3, E), np.nan, "float32"))
    layer.clean_state()
    np.testing.assert_array_equal(layer.call_steps(numbers(1, 4)), late(numbers(1, 4), 2))


def test_more_rows_are_more_streams():
    layer, x = ct.CoDelay(1), numbers(3, 3)
    ct.ensure_streams(layer, 1)  # This also works before the layer is built.
    assert layer.call_step(x[:2, 0]) is None
    y = layer.call_step(x[:, 1])
    np.testing.assert_array_equal(y, [*x[:2, 0], 0 * x[2, 0]])
    assert layer.call_step(x[:0, 2], streams=[]) is None
    assert layer.get_state()["position"].tolist() == [2, 2, 1]


@pytest.mark.parametrize("delay", [0, 2])
def test_peeking_is_the_next_step(delay):
    layer, x = ct.CoDelay(delay), numbers(2, 6)
    for t in range(6):
        peek = layer.call_step(x[:, t], update_state=False)
        several = layer.call_steps(x[:, t : t + 2], update_state=False)
        y = layer.call_step(x[:, t])
        assert (peek is None) == (y is None) == (t < delay)
        assert (several is None) == (min(t + 2, 6) <= delay)
        if y is not None:
            np.testing.assert_array_equal(peek, y)
    np.testing.assert_array_equal(layer.position, [6, 6])


def test_state_goes_on_in_another_layer_bit_for_bit(tmp_path):
    x = numbers(2, 9)
    here, there = ct.CoDelay(3), ct.CoDelay(3)
    here.call_steps(x[:, :5])
    np.savez(tmp_path / "state.npz", **here.get_state(streams=[1, 0]))
    there.set_state(dict(np.load(tmp_path / "state.npz")))  # This layer was never built.
    there.ensure_streams(6)
    there.set_state(here.get_state(), streams=[5, 2])
    for t in range(5, 9):
        y = here.call_step(x[:, t])
        np.testing.assert_array_equal(there.call_step(x[::-1, t]), y[::-1])
        np.testing.assert_array_equal(there.call_step(x[:, t], streams=[5, 2]), y)
    for name, array in there.get_state(streams=[5, 2]).items():
        np.testing.assert_array_equal(array, here.get_state()[name])


def test_without_a_delay_only_the_position_is_kept():
    here, there = ct.CoDelay(0), ct.CoDelay(0)
    here.call_steps(numbers(2, 4))
    assert set(here.get_state()) == {"position"}
    there.set_state(here.get_state())
    np.testing.assert_array_equal(there.position, [4, 4])


@pytest.mark.parametrize("temporal_dim", [2, -1])
def test_time_on_another_axis(temporal_dim):
    x, first, last = numbers(2, 6), ct.CoDelay(2), ct.CoDelay(2, temporal_dim=temporal_dim)
    np.testing.assert_array_equal(last(x.swapaxes(1, 2)), x.swapaxes(1, 2))
    for part in (slice(0, 3), slice(3, 5)):
        expected = first.call_steps(x[:, part])
        y = last.call_steps(x[:, part].swapaxes(1, 2))
        np.testing.assert_array_equal(y, np.swapaxes(expected, 1, 2))
    np.testing.assert_array_equal(last.call_step(x[:, 5]), first.call_step(x[:, 5]))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_gives_zeros_and_does_not_retrace(jit_compile):
    layer, x = ct.CoDelay(2), numbers(2, 8)
    layer.ensure_streams(2)
    layer.call_step(x[:, 0])
    layer.clean_state()
    traces = []

    @tf.function(jit_compile=jit_compile, reduce_retracing=True)
    def step(x):
        traces.append(1)
        return layer.call_step(x)

    for t in range(6):
        np.testing.assert_array_equal(step(tf.constant(x[:, t])), late(x, 2)[:, t])
    assert len(traces) == 1
    steps = traced(layer.call_steps, jit_compile=jit_compile)
    np.testing.assert_array_equal(steps(x[:, 6:]), x[:, 4:6])


def test_a_graph_with_open_sizes_moves_no_stream_of_a_call_that_fails():
    layer, x = ct.CoDelay(1), numbers(3, 5)
    layer.build((None, None, E))
    layer.ensure_streams(3)
    signature = [tf.TensorSpec([None, None, E]), tf.TensorSpec([None], tf.int32)]
    steps = traced(
        lambda x, streams: layer.call_steps(x, streams=streams), input_signature=signature
    )
    np.testing.assert_array_equal(steps(x[:2, :3], [2, 0]), late(x[:2, :3], 1))
    before = layer.get_state()
    for bad in ([0, 0], [0, 7], [-1, 0], [1]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Expected"):
            steps(x[:2, :2], tf.constant(bad))
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])


def test_gradients_flow_to_the_steps_of_the_call():
    layer, x = ct.CoDelay(2), tf.constant(numbers(1, 5))
    layer.call_step(x[:, 0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer.call_steps(x[:, 1:]) * [[[1.0], [2.0], [3.0]]])
    # The outputs are steps 0 to 2, but step 0 is an input of another call.
    np.testing.assert_array_equal(tape.gradient(loss, x)[0, :, 0], [0, 2, 3, 0, 0])


@pytest.mark.parametrize("dtype", [tf.float64, "bfloat16", np.int32, "bool", None])
def test_dtypes(dtype):
    layer = ct.CoDelay(1, dtype)
    name = "float32" if dtype is None else tf.as_dtype(dtype).name
    assert layer.compute_dtype == name
    x = tf.cast(numbers(2, 3), name)
    y = layer.call_steps(x)
    assert y.dtype == name
    np.testing.assert_array_equal(y, x[:, :2])


def test_comes_back_from_a_file_and_streams(tmp_path):
    inputs = keras.Input((4, E))
    model = keras.Model(inputs, ct.CoDelay(2, name="late")(inputs))
    x = numbers(2, 4)
    model(x)
    model.get_layer("late").call_steps(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), x)
    layer = loaded.get_layer("late")
    assert layer.get_config() == model.get_layer("late").get_config()
    assert not layer.weights
    ct.ensure_streams(loaded, 2)
    # A loaded layer's streams are clean.
    np.testing.assert_array_equal(layer.call_steps(x), x[:, :2])
    ct.clean_state(loaded)
    assert layer.call_step(x[:, 0]) is None


def test_is_exported(tmp_path):
    layer, x = ct.CoDelay(2), numbers(2, 6, (2, E))
    layer.call_steps(x[:, :3])
    ct.export(layer, tmp_path / "saved")
    step = tf.saved_model.load(str(tmp_path / "saved")).signatures["step"]
    for t in range(3, 6):
        result = step(x=tf.constant(x[:, t]), streams=tf.constant([0, 1]))
        np.testing.assert_array_equal(result["y"], x[:, t - 2])
        assert result["ready"].numpy().all()


def test_in_a_streaming_model():
    inputs = keras.Input((4, E))
    streaming = ct.StreamingModel(keras.Model(inputs, ct.CoDelay(0)(inputs) * 2.0))
    np.testing.assert_array_equal(streaming.call_step(numbers(1, 1)[:, 0]), 2 * numbers(1, 1)[:, 0])
    streaming = ct.StreamingModel(keras.Model(inputs, ct.CoDelay(2)(inputs) * 2.0))
    x = numbers(1, 5)
    np.testing.assert_array_equal(streaming.call_steps(x), 2 * x[:, :3])


@pytest.mark.parametrize(
    "options",
    [
        dict(delay=-1),
        dict(delay=1.5),
        dict(delay=1, temporal_dim=0),
        dict(delay=1, temporal_dim="time"),
        dict(delay=1, warm_up="never"),
        dict(delay=1, call_mode="slow"),
    ],
    ids=str,
)
def test_bad_construction(options):
    with pytest.raises(ValueError, match="Expected"):
        ct.CoDelay(**options)


@pytest.mark.parametrize(
    ("method", "call", "message"),
    [
        ("call_step", dict(x=np.zeros((2, E + 1), "float32")), "(M, 3), but got (2, 4)"),
        ("call_step", dict(x=np.zeros((2, 1, E), "float32")), "(M, 3), but got (2, 1, 3)"),
        ("call_step", dict(x=np.float32(0)), "(M, ...)"),
        ("call_step", dict(x=np.zeros((2, E), "int32")), "float32, but got int32"),
        ("call_step", dict(x=np.zeros((2, E), "float32"), streams=[0, 7]), "but got 7"),
        ("call_step", dict(x=np.zeros((2, E), "float32"), streams=[1, 1]), "but got 1 twice"),
        ("call_step", dict(x=np.zeros((2, E), "float32"), streams=[0]), "2 streams"),
        ("call_steps", dict(x=np.zeros((2, 0, E), "float32")), "at least one step"),
        ("call_steps", dict(x=np.zeros((2, 2, E + 1), "float32")), "(M, T, 3), but got (2, 2, 4)"),
        ("call_steps", dict(x=np.zeros(2, "float32")), "rank 1"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(method, call, message):
    layer, x = ct.CoDelay(2), numbers(2, 4)
    layer.call_steps(x[:, :3])
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected") as error:
        getattr(layer, method)(**call)
    assert message in str(error.value)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(layer.call_step(x[:, 3]), x[:, 1])


def test_bad_state_is_named_and_changes_nothing():
    layer = ct.CoDelay(2)
    layer.call_steps(numbers(2, 3))
    state = layer.get_state()
    for bad in (
        dict(steps=state["steps"][:, :1]),
        dict(position=np.array([-1, 0])),
        dict(steps=state["steps"].astype("float64")),
        dict(more=1),
    ):
        with pytest.raises(ValueError, match="Expected"):
            layer.set_state({**state, **bad})
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, state[name])
