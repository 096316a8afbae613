"""Which streams a SavedModel has on disk: those that have taken a step, and no others."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct

N, E, H = 4, 5, 2
GRAPH = 30_000  # Bytes of the graph that makes room. The states of 1000 streams have 1.2 MB.

pytestmark = pytest.mark.cpu_only("sessions run on the CPU")


def model_of(activation=None):
    x = inputs = keras.Input((N, E))
    x = ct.CircularPositionalEncoding(2 * N, E)(x)
    x = ct.CoReTransformerEncoder(N, E, H, 9)(x)
    x = ct.CoSiTransformerEncoder(N, E, H, 9)(x)
    x = keras.layers.Dense(3, activation=activation)(x)
    return ct.StreamingModel(keras.Model(inputs, x), warm_up="partial")


# TensorFlow takes seconds to trace a graph.
GRAPHS = [pytest.param(name, marks=pytest.mark.slow) for name in ("graph", "plain graph")]


@pytest.fixture(params=["session", *GRAPHS])
def model(request, monkeypatch):
    """Return a model that is exported on a session, as a graph, or as a graph without our ops."""
    plain = request.param == "plain graph"
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow" if plain else "fused")
    return model_of(tf.nn.crelu if request.param == "graph" else None)


@pytest.fixture
def x(random):
    return random.normal(size=(2 * N + 3, 1000, E)).astype("float32")


def exported(model, path, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is exported as a graph")
        ct.export(model, path, **options)
    return tf.saved_model.load(str(path))


def step(loaded, x, streams):
    result = loaded.signatures["step"](x=tf.constant(x), streams=tf.constant(streams, tf.int32))
    return result["y"].numpy(), result["ready"].numpy()


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def some_steps(model, x):
    """Take steps of streams 3 and 997 only, of different ages."""
    model.ensure_streams(1000)
    for t in range(N + 1):
        streams = [997, 3] if t % 2 else [997]
        model.call_step(x[t, streams], streams=streams)
    return model


def check_same_streams(model, loaded, x):
    """Check that all streams of both go on in the same way, among them those that were clean."""
    for t, streams in enumerate([[3, 0, 997], [997, 999], *[np.arange(1000)] * N]):
        y, ready = step(loaded, x[-1 - t, streams], streams)
        expected = model.call_step(x[-1 - t, streams], streams=streams)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(ready, model.ready.numpy()[streams])


def test_streams_that_have_taken_no_step_take_no_room(model, x, tmp_path):
    exported(model, tmp_path / "one", streams=1)
    loaded = exported(model, tmp_path / "many", streams=1000)
    assert bytes_of(tmp_path / "many") < bytes_of(tmp_path / "one") + GRAPH
    assert loaded.signatures["ensure_streams"](count=tf.constant(0))["count"] == 1000
    some_steps(model, x)
    fresh = exported(model, tmp_path / "fresh", states=False)
    assert bytes_of(tmp_path / "fresh") < bytes_of(tmp_path / "one") + GRAPH
    model.clean_state()
    check_same_streams(model, loaded, x)
    model.clean_state()
    check_same_streams(model, fresh, x)


def test_only_streams_that_have_taken_a_step_are_saved(model, x, tmp_path):
    exported(model, tmp_path / "none")
    some_steps(model, x)
    before = keras.tree.map_structure(np.array, model.get_state())
    loaded = exported(model, tmp_path / "two", streams=1005)
    keras.tree.map_structure(np.testing.assert_array_equal, model.get_state(), before)
    of_one = sum(array[0].nbytes for array in keras.tree.flatten(before))
    assert bytes_of(tmp_path / "two") < bytes_of(tmp_path / "none") + 2 * of_one + GRAPH
    check_same_streams(model, loaded, x)
    step(loaded, x[0, :2], [1004, 0])
    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
        step(loaded, x[0, :2], [1005, 0])


def test_all_streams_have_taken_a_step(model, x, tmp_path):
    model.call_step(x[0])
    check_same_streams(model, exported(model, tmp_path), x)


def test_the_c_api_s_loader_makes_the_same_room(model, x, tmp_path):
    some_steps(model, x)
    exported(model, tmp_path)
    expected = model.call_step(x[-1])
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path))
        signature = meta.signature_def["step"]
        feeds = {
            signature.inputs["x"].name: x[-1],
            signature.inputs["streams"].name: np.arange(1000),
        }
        y = session.run(signature.outputs["y"].name, feeds)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_model_that_is_saved_again_as_a_part(model, x, tmp_path):
    """Its streams are all there already: a graph's are saved with it, a session's are as before."""
    some_steps(model, x)
    module = tf.Module()
    module.inner = exported(model, tmp_path / "inner")
    inner = module.inner.signatures["step"]

    @tf.function(input_signature=[tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)])
    def again(x, streams):
        return inner(x=x, streams=streams)["y"]

    module.again = again
    tf.saved_model.save(module, str(tmp_path / "outer"))
    outer = tf.saved_model.load(str(tmp_path / "outer"))
    y = outer.again(tf.constant(x[-1]), tf.range(1000))
    np.testing.assert_allclose(y, model.call_step(x[-1]), rtol=1e-4, atol=1e-5)


def test_a_states_file_that_was_cut_is_refused(monkeypatch, x, tmp_path):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    ct.export(some_steps(model_of(), x), tmp_path)
    states = tmp_path / "assets" / "streams.states"
    whole = states.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        states.write_bytes(whole[:size])
        with pytest.raises(tf.errors.InvalidArgumentError, match="streams.states") as error:
            tf.saved_model.load(str(tmp_path))
        assert len(str(error.value)) < 2000
