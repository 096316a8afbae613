"""Tests of CircularPositionalEncoding: which row each step gets, on windows and on streams."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")

ROWS, E = 5, 3


def encoding(**options):
    layer = ct.CircularPositionalEncoding(ROWS, E, **options)
    layer.build((None, None, E))
    table = np.arange(1, ROWS + 1, dtype="float32")[:, None] * np.ones(E, "float32")
    layer.set_weights([table])
    return layer


def rows_of(output):
    """Return which row was added to zeros: an index for each step."""
    output = np.asarray(output)
    assert (output == output[..., :1]).all()
    return (output[..., 0] - 1).astype(int).tolist()


def zeros(*shape):
    return np.zeros((*shape, E), np.float32)


def test_regular_calls_move_by_the_steps_asked_for():
    layer = encoding()
    assert rows_of(layer(zeros(2, 7))) == [[0, 1, 2, 3, 4, 0, 1]] * 2
    assert rows_of(layer(zeros(1, 3))) == [[1, 2, 3]]
    still = encoding(call_update_index_steps=0)
    assert rows_of(still(zeros(1, 3))) == rows_of(still(zeros(1, 3))) == [[0, 1, 2]]


@pytest.mark.parametrize("portions", [[12], [1] * 12, [5, 1, 6], [1, 11]])
def test_steps_go_round(portions):
    layer = encoding()
    rows = [row for t in portions for row in rows_of(layer.call_steps(zeros(2, t)))[1]]
    assert rows == [i % ROWS for i in range(12)]
    assert rows_of(layer.call_step(zeros(2))) == [12 % ROWS] * 2


def test_steps_continue_windows_as_in_the_original_package():
    """The original package's test: a window and the same steps begin at the same index."""
    layer = encoding(call_update_index_steps=0)
    whole = rows_of(layer(zeros(2, 4)))
    steps = rows_of(layer.call_steps(zeros(2, 3)))
    last = rows_of(layer.call_step(zeros(2)))
    assert [[*s, t] for s, t in zip(steps, last, strict=True)] == whole
    moving = encoding()
    moving(zeros(2, 4))
    assert rows_of(moving.call_step(zeros(2))) == [1, 1]


def test_each_stream_has_its_index():
    layer = encoding()
    layer.ensure_streams(3)
    layer.call_steps(zeros(1, 2), streams=[2])
    assert rows_of(layer.call_step(zeros(2), streams=[2, 0])) == [2, 0]
    assert rows_of(layer.call_step(zeros(3), update_state=False)) == [1, 0, 3]
    assert rows_of(layer.call_step(zeros(4))) == [1, 0, 3, 0]
    layer.clean_state(streams=[0])
    assert rows_of(layer.call_step(zeros(4))) == [0, 1, 4, 1]
    layer.clean_state()
    assert rows_of(layer.call_step(zeros(4))) == [0] * 4


@pytest.mark.parametrize("temporal_dim", [2, -1])
def test_time_on_the_last_axis(temporal_dim):
    x = np.random.default_rng(0).normal(size=(2, 4, E)).astype("float32")
    first, last = encoding(), encoding(temporal_dim=temporal_dim)
    for call in ("call_regular", "call_steps"):
        expected = np.swapaxes(getattr(first, call)(x), 1, 2)
        np.testing.assert_array_equal(getattr(last, call)(np.swapaxes(x, 1, 2)), expected)
    np.testing.assert_array_equal(last.call_step(x[:, 0]), first.call_step(x[:, 0]))


def test_streams_go_on_in_another_layer():
    here, there = encoding(), encoding()
    here(zeros(1, 3))
    here.call_steps(zeros(3, 4))
    there.set_state(here.get_state())
    assert rows_of(there.call_step(zeros(3))) == rows_of(here.call_step(zeros(3)))
    here.call_step(zeros(1), streams=[1])
    there.set_state(here.get_state(streams=[1]), streams=[2])
    assert rows_of(there.call_step(zeros(3))) == [1, 1, 2]
    with pytest.raises(ValueError, match="Expected"):
        there.set_state({"position": np.array([1])})


def test_the_position_goes_with_the_index():
    """The index wraps around, and the position does not. Windows move only the index."""
    here, there = encoding(), encoding()
    here(zeros(1, 3))  # This moves the index of all streams by one.
    here.call_steps(zeros(2, ROWS + 2))
    state = here.get_state()
    assert state["position"].tolist() == [ROWS + 2] * 2
    there.set_state(state)
    np.testing.assert_array_equal(there.position, [ROWS + 2] * 2)
    assert rows_of(there.call_step(zeros(2))) == rows_of(here.call_step(zeros(2))) == [3, 3]
    there.clean_state(streams=[1])
    assert rows_of(there.call_step(zeros(3))) == [4, 0, 0]
    there.clean_state()
    assert rows_of(there.call_step(zeros(2))) == [0, 0]
    there.set_state(state)
    there.set_state({name: array[:1] for name, array in state.items()})
    assert rows_of(there.call_step(zeros(2))) == [3, 0]
    for bad in (dict(index=np.array([1])), dict(index=[0.5, 1.5]), dict(position=np.array([-1]))):
        with pytest.raises(ValueError, match="Expected"):
            there.set_state({**state, **bad})


def test_a_graph_moves_no_stream_of_a_call_that_fails():
    layer = encoding()
    layer.ensure_streams(3)
    step = tf.function(lambda x, streams: layer.call_step(x, streams=streams))
    for bad in ([0, 0], [0, 7], [-1, 0]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Expected"):
            step(zeros(2), tf.constant(bad))
    open_sizes = [tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)]
    step = traced(lambda x, s: layer.call_step(x, streams=s), input_signature=open_sizes)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Expected as many streams"):
        step(zeros(3), tf.constant([2]))
    assert layer.get_state()["index"].tolist() == [0, 0, 0]


def test_call_modes_and_training():
    layer = encoding(call_mode="steps")
    assert rows_of(layer(zeros(1, 2))) == [[0, 1]]
    with ct.call_mode("step"):
        assert rows_of(layer(zeros(1))) == [2]
    model = keras.Sequential([encoding(), keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 4, E)), np.ones((8, 1)), epochs=2, verbose=0, batch_size=4)
    before = model.layers[0].get_weights()[0]
    assert (before != encoding().get_weights()[0]).any()


def test_the_index_is_not_a_weight_and_the_layer_comes_back_from_a_file(tmp_path):
    model = keras.Sequential([keras.Input((4, E)), encoding(name="position")])
    model(zeros(1, 4))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.layers[0].weights) == 1
    assert rows_of(loaded(zeros(1, 4))) == [[0, 1, 2, 3]]
    assert loaded.layers[0].get_config() == model.layers[0].get_config()


def functional():
    inputs = keras.Input((4, E))
    return keras.Model(inputs, encoding()(inputs))


def sequential():
    return keras.Sequential([keras.Input((4, E)), encoding()])


def within_another():
    inputs = keras.Input((4, E))
    return keras.Model(inputs, functional()(inputs))


def streaming():
    return ct.StreamingModel(functional(), warm_up="partial")


class Subclassed(keras.Model):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, x, training=None):
        return self.model(x, training=training)


MODELS = [functional, sequential, within_another, streaming, lambda: Subclassed(functional())]


@pytest.mark.parametrize("make", MODELS)
def test_outside_training_a_model_is_a_function_of_its_input(make):
    model = make()
    for _ in range(2):
        assert rows_of(model(zeros(2, 4))) == [[0, 1, 2, 3]] * 2
        assert rows_of(model.predict(zeros(2, 4), verbose=0)) == [[0, 1, 2, 3]] * 2
    assert rows_of(model(zeros(2, 4), training=True)) == [[0, 1, 2, 3]] * 2
    assert rows_of(model(zeros(2, 4), training=True)) == [[1, 2, 3, 4]] * 2
    assert rows_of(model(zeros(2, 4))) == [[0, 1, 2, 3]] * 2


def test_streams_of_a_model_keep_their_own_rows():
    model = streaming()
    assert rows_of(model.call_steps(zeros(2, 3))) == [[0, 1, 2]] * 2
    assert rows_of(model(zeros(3, 4))) == [[0, 1, 2, 3]] * 3
    assert rows_of(model(zeros(3, 4), training=True)) == [[0, 1, 2, 3]] * 3
    assert rows_of(model.call_step(zeros(3))) == [3, 3, 0]
    session = ct.Session(model)
    assert rows_of(session.step(zeros(1))) == [0]
    ids = session.open(2)
    session.set_state(model.get_state(streams=[1, 2]), ids)
    assert rows_of(session.step(zeros(2), streams=ids)) == [4, 1]


def test_a_model_whose_encoding_is_told_to_move_moves():
    inputs = keras.Input((4, E))
    model = keras.Model(inputs, encoding(call_update_index_steps=2)(inputs))
    assert rows_of(model(zeros(1, 4))) == [[0, 1, 2, 3]]
    assert rows_of(model(zeros(1, 4))) == [[2, 3, 4, 0]]


def test_a_layer_by_itself_and_in_a_subclassed_model_moves():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.position = encoding()

        def call(self, x):
            return self.position(x)

    for model in (Model(), encoding(), functional().layers[1]):
        assert rows_of(model(zeros(1, 2))) == [[0, 1]]
        assert rows_of(model(zeros(1, 2))) == [[1, 2]]


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (2.5, 3), (3, 3, -1), (3, 3, 1, 0)])
def test_bad_construction(sizes):
    with pytest.raises(ValueError, match="Expected"):
        ct.CircularPositionalEncoding(*sizes)


@pytest.mark.parametrize(
    "call",
    [
        dict(x=zeros(2, 3)),
        dict(x=np.zeros((2, E + 1), np.float32)),
        dict(x=np.zeros((2, E), np.int32)),
        dict(x=zeros(2), streams=[0, 7]),
        dict(x=zeros(2), streams=[1, 1]),
        dict(x=zeros(2), streams=[0]),
        dict(x=zeros(2), streams=[0.5, 1.5]),
    ],
)
def test_bad_input_moves_nothing(call):
    layer = encoding()
    layer.call_steps(zeros(2, 3))
    with pytest.raises(ValueError, match="Expected"):
        layer.call_step(**call)
    assert rows_of(layer.call_step(zeros(2))) == [3, 3]


def test_sinusoids_go_round_and_are_no_weights():
    rows, features = 2 * 8 - 1, 8
    layer = ct.CircularPositionalEncoding(rows, features, 0, encoding="sinusoidal")
    table = layer(np.zeros((1, rows, features), np.float32)).numpy()[0]
    assert layer.weights == []
    # The definition, in float64: each pair goes round a whole number of times, fewer for each
    # later pair.
    times = [7, 4, 2, 1]
    angles = 2 * np.pi * np.arange(rows)[:, None] * times / rows
    np.testing.assert_allclose(table[:, 0::2], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(table[:, 1::2], np.cos(angles), atol=1e-6)
    # The similarity of rows depends only on their distance, also past the end. None are equal.
    alike = table @ table.T
    for i in range(rows):
        np.testing.assert_allclose(np.roll(alike[i], -i), alike[0], atol=1e-5)
    assert alike[0, 1:].max() < alike[0, 0] - 0.1
    steps = layer.call_steps(np.zeros((1, 2 * rows, features), np.float32))
    np.testing.assert_array_equal(steps[0], [*table, *table])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (6, 1), (6, 2), (9, 5), (3, 64), (127, 1024)])
def test_sinusoids_of_any_size_tell_rows_apart(sizes):
    layer = ct.CircularPositionalEncoding(*sizes, 0, encoding="sinusoidal")
    table = layer(np.zeros((1, *sizes), np.float32)).numpy()[0]
    assert table.shape == sizes
    assert np.isfinite(table).all()
    assert np.abs(table).max() <= 1
    if sizes[1] > 1:
        assert len(np.unique(table.round(5), axis=0)) == sizes[0]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_sinusoids_stream_are_saved_and_exported(tmp_path, dtype):
    inputs = keras.Input((4, E), dtype=dtype)
    layer = ct.CircularPositionalEncoding(
        ROWS, E, 0, encoding="sinusoidal", dtype=dtype, name="position"
    )
    model = keras.Model(inputs, layer(inputs))
    x = tf.cast(np.random.default_rng(0).normal(size=(2, 4, E)), dtype)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    streaming = ct.StreamingModel(loaded)
    np.testing.assert_array_equal(streaming.call_steps(x), model(x))
    again = loaded.get_layer("position")
    assert again.get_config() == layer.get_config()
    streaming.clean_state(streams=[1])
    state = again.get_state()
    ct.export(again, tmp_path / "saved")
    step = tf.saved_model.load(str(tmp_path / "saved")).signatures["step"]
    y = step(x=x[:, 0], streams=tf.constant([0, 1]))["y"]
    assert y.dtype == dtype
    layer.set_state(state)
    # The exported step runs in a session, which computes in float32 and rounds once.
    rounding = {"float32": 1e-6, "float64": 1e-15, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    expected = tf.cast(layer.call_step(x[:, 0]), tf.float64)
    np.testing.assert_allclose(tf.cast(y, tf.float64), expected, rtol=rounding, atol=rounding)


def test_bad_encoding():
    with pytest.raises(ValueError, match="Expected encoding to be one of .* but got 'fourier'"):
        ct.CircularPositionalEncoding(ROWS, E, encoding="fourier")
