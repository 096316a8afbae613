"""SavedModels whose step is one op on a session. test_export.py tests all SavedModels."""

import gc
import os
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
from continual_transformers_tf.ops.library import fused_ops
from traced import traced

N, E, H, D = 4, 5, 2, 3
SIZES = (N, E, H, 9)
OLD_EXPORT = Path(__file__).parent / "data" / "export_0.1.0.tgz"

pytestmark = pytest.mark.cpu_only("sessions run on the CPU")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")


@pytest.fixture
def random():
    return np.random.default_rng(7)


def block_model(**options):
    x = inputs = keras.Input((N, E))
    x = ct.CircularPositionalEncoding(2 * N, E)(x)
    x = ct.CoSiTransformerEncoder(*SIZES, **options)(x)
    return ct.StreamingModel(keras.Model(inputs, keras.layers.Dense(3)(x)), warm_up="partial")


def token_model():
    tokens, x = keras.Input((N,), dtype="int32", name="tokens"), keras.Input((N, E), name="x")
    y = keras.layers.Embedding(10, E)(tokens) + x
    y = ct.CoSiMultiHeadAttention(N, H, D)(y, y)
    outputs = {"logits": keras.layers.Dense(2)(y), "sizes": keras.layers.Dense(1)(y)}
    return ct.StreamingModel(keras.Model([tokens, x], outputs), warm_up="partial")


def load(path):
    return tf.saved_model.load(str(path))


def exported(model, path, **options):
    ct.export(model, path, **options)
    return load(path)


def ops_of(loaded, signature="step"):
    """Return the types of all ops that a signature runs."""
    graph = loaded.signatures[signature].graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return {node.op for node in nodes}


def numbers(*streams):
    return tf.constant(streams, tf.int32)


def step(loaded, x, streams):
    result = loaded.signatures["step"](x=tf.constant(x), streams=numbers(*streams))
    return result["y"].numpy(), result["ready"].numpy()


def states(loaded, *streams):
    return loaded.get_state(numbers(*streams)).numpy().tolist()


def test_a_step_is_one_op_and_equals_the_session_and_the_model(random, tmp_path):
    model = block_model()
    model.ensure_streams(6)
    loaded = exported(model, tmp_path)
    assert "ContinualTransformers>SessionStep" in ops_of(loaded)
    assert not any("Variable" in op for op in ops_of(loaded))
    assert (tmp_path / "assets" / "model.safetensors").exists()
    assert not (tmp_path / "assets" / "streams.states").exists()
    session = ct.Session.load(tmp_path / "assets" / "model.safetensors")
    ids = session.open(6)
    for t in range(2 * N + 3):
        streams = random.permutation(6)[: 1 + t % 6]
        x = random.normal(size=(len(streams), E)).astype("float32")
        y, ready = step(loaded, x, streams)
        np.testing.assert_array_equal(y, session.step(x, ids[streams]))
        np.testing.assert_array_equal(ready, session.ready(ids[streams]))
        expected = model.call_step(x, streams=streams)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    y, ready = step(loaded, np.zeros((0, E), "float32"), [])
    assert y.shape == (0, 3)
    assert ready.shape == (0,)


def test_shapes_are_known_and_checked_when_a_graph_is_made(tmp_path):
    model = block_model()
    loaded = exported(model, tmp_path)
    graph = loaded.signatures["step"].structured_outputs
    assert graph["y"].shape.as_list() == [None, 3]
    assert graph["ready"].shape.as_list() == [None]
    ops = fused_ops("CPU", "ContinualTransformers>SessionStep")
    with tf.Graph().as_default():
        handle = ops.continual_transformers_session_handle()
        options = dict(output_types=[tf.float32], output_shapes=[[None, 3]])
        y, ready = ops.continual_transformers_session_step(
            handle, tf.zeros([2], tf.int32), [tf.zeros([2, E])], **options
        )
        assert y[0].shape.as_list() == [2, None, 3]
        assert ready.shape.as_list() == [2]
        with pytest.raises(ValueError, match="Dimensions must be equal"):
            ops.continual_transformers_session_step(
                handle, tf.zeros([2], tf.int32), [tf.zeros([3, E])], **options
            )
        with pytest.raises(ValueError, match="expected one of output_shapes for each output"):
            ops.continual_transformers_session_step(
                handle,
                tf.zeros([2], tf.int32),
                [tf.zeros([2, E])],
                output_types=[tf.float32, tf.float32],
                output_shapes=[[3]],
            )
        with pytest.raises(ValueError, match="rank"):
            ops.continual_transformers_session_clean(handle, tf.zeros([2, 2], tf.int32))
        with pytest.raises(ValueError, match="Dimension"):
            ops.continual_transformers_session_set_state(
                handle, tf.zeros([2], tf.int32), tf.constant(["a", "b", "c"])
            )


def test_several_inputs_and_outputs_by_name(random, tmp_path):
    model = token_model()
    loaded = exported(model, tmp_path, streams=2)
    for _ in range(N + 2):
        tokens = random.integers(0, 10, size=2).astype("int32")
        x = random.normal(size=(2, E)).astype("float32")
        got = loaded.signatures["step"](
            tokens=tf.constant(tokens), x=tf.constant(x), streams=numbers(0, 1)
        )
        expected = model.call_step([tokens, x])
        assert set(got) == {"logits", "sizes", "ready"}
        for name, y in expected.items():
            np.testing.assert_allclose(got[name], y, rtol=1e-5, atol=1e-5)
    assert got["ready"].numpy().all()


@pytest.mark.parametrize("dtype", ["mixed_float16", "bfloat16", "float64"])
def test_dtypes_of_the_signature_are_the_model_s(random, tmp_path, dtype):
    layer = ct.CoSiMultiHeadAttention(N, H, D, dtype=dtype, warm_up="partial")
    layer.build((None, N, E))
    loaded = exported(layer, tmp_path, streams=2)
    x = tf.constant(random.normal(size=(2, E)), layer.compute_dtype)
    result = loaded.signatures["step"](x=x, streams=numbers(0, 1))
    assert result["y"].dtype == x.dtype
    expected = tf.cast(layer.call_step(x), tf.float64)
    tolerance = {"float16": 4e-3, "bfloat16": 4e-2, "float64": 1e-12}[layer.compute_dtype]
    np.testing.assert_allclose(tf.cast(result["y"], tf.float64), expected, atol=tolerance)
    assert "ContinualTransformers>SessionStep" in ops_of(loaded)


# States.


@pytest.mark.parametrize("count", [1, 3, 70])
def test_states_go_along_unless_they_are_not_wanted(random, tmp_path, count):
    """Streams have different ages, some are clean, and 70 of them are saved in parts."""
    model = block_model()
    model.ensure_streams(count + 2)
    for t in range(N + 2):
        some = np.flatnonzero((np.arange(count) + t) % 3 < 2)
        x = random.normal(size=(len(some), E)).astype("float32")
        if len(some):
            model.call_step(x, streams=some)
    loaded = exported(model, tmp_path / "with")
    fresh = exported(model, tmp_path / "without", states=False)
    assert not (tmp_path / "without" / "assets" / "streams.states").exists()
    x = random.normal(size=(count + 2, E)).astype("float32")
    y, ready = step(loaded, x, range(count + 2))
    y_fresh, ready_fresh = step(fresh, x, range(count + 2))
    expected = model.call_step(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ready, model.ready)
    assert not ready_fresh.any()
    model.clean_state()
    np.testing.assert_allclose(y_fresh, model.call_step(x), rtol=1e-5, atol=1e-5)


def test_states_move_between_a_session_and_a_saved_model(random, tmp_path):
    model = block_model()
    loaded = exported(model, tmp_path / "saved", streams=3)
    session = ct.Session(model)
    ids = session.open(2)
    x = random.normal(size=(N + 3, 2, E)).astype("float32")
    for t in range(N):
        session.step(x[t], ids)
    position = loaded.set_state(numbers(2, 0), tf.constant(session.get_state(ids)))
    assert position.numpy().tolist() == [N, N]
    assert states(loaded, 2, 0) == session.get_state(ids)
    # A session accepts the copies that the SavedModel returns.
    again = session.open(2)
    for copies in (loaded.get_state(numbers(2, 0)), loaded.get_state(numbers(2, 0)).numpy()):
        session.clean_state(again)
        session.set_state(copies, again)
        assert session.get_state(again) == session.get_state(ids)
    np.testing.assert_array_equal(step(loaded, x[N], [2, 0])[0], session.step(x[N], ids))
    session.set_state(states(loaded, 0, 2), ids)
    np.testing.assert_array_equal(step(loaded, x[N + 1], [0, 2])[0], session.step(x[N + 1], ids))

    before = states(loaded, 0, 1, 2)
    other = ct.Session(block_model())
    refused = {
        "other weights": other.get_state(other.open(2)),
        "another model": [b"CTSTREAM", b"CTSTREAM"],
        "not a copy of a stream": [before[0], b"nothing"],
        "as many": [before[0]],
    }
    refused["another model"] = _states_of_another_model()
    for match, copies in refused.items():
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"(?i){match}|expected states"):
            loaded.set_state(numbers(0, 1), tf.constant(copies))
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected each stream once"):
        loaded.set_state(numbers(1, 1), tf.constant(before[:2]))
    assert states(loaded, 0, 1, 2) == before


def _states_of_another_model():
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    layer.build((None, N, E))
    session = ct.Session(layer)
    return session.get_state(session.open(2))


# Errors.


def test_errors_leave_every_stream_as_it_was(random, tmp_path):
    model = token_model()
    loaded = exported(model, tmp_path, streams=3)
    call = loaded.signatures["step"]

    def take(tokens=(1, 2), features=E, streams=(0, 1), rows=None):
        x = random.normal(size=(rows or len(tokens), features)).astype("float32")
        return call(tokens=tf.constant(tokens), x=tf.constant(x), streams=numbers(*streams))

    for _ in range(N + 1):
        take()
    before = states(loaded, 0, 1, 2)
    refused = {
        "expected streams in .0, 3., the streams that are held, but got 3 at index 1": dict(
            streams=(0, 3)
        ),
        "but got -1 at index 0": dict(streams=(-1, 0)),
        "expected each stream once in a call, but got 1 twice": dict(streams=(1, 1)),
        "10": dict(tokens=(1, 10)),
        "-1": dict(tokens=(-1, 2)),
        "expected x of shape .2,5., but got .3,5.": dict(rows=3),
        "expected tokens of shape .1., but got .2.": dict(streams=(2,)),
    }
    for match, arguments in refused.items():
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            take(**arguments)
        assert states(loaded, 0, 1, 2) == before
    for bad in ((0, 3), (1, 1), (-1, 0)):
        for name in ("clean", "get_state"):
            function = loaded.signatures.get(name) or loaded.get_state
            if name == "get_state" and bad == (1, 1):
                continue  # The same stream may be copied twice.
            with pytest.raises(tf.errors.InvalidArgumentError, match="expected"):
                function(streams=numbers(*bad))
        assert states(loaded, 0, 1, 2) == before
    ensure_streams = loaded.signatures["ensure_streams"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected count >= 0, but got -1"):
        ensure_streams(count=tf.constant(-1))
    assert ensure_streams(count=tf.constant(2))["count"].numpy() == 3
    take()
    assert states(loaded, 0, 1, 2) != before


def test_room_is_made_beside_what_is_held(random, tmp_path):
    loaded = exported(block_model(), tmp_path)
    x = random.normal(size=(4, E)).astype("float32")
    held = int(loaded.signatures["ensure_streams"](count=tf.constant(1))["count"])
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"in \[0, {held}\)"):
        step(loaded, x[:1], [held])
    step(loaded, x[:1], [0])
    before = states(loaded, 0)
    for count in (3, 100_000):
        assert loaded.signatures["ensure_streams"](count=tf.constant(count))["count"] == count
        assert states(loaded, 0) == before
        step(loaded, x[:1], [count - 1])


def ops_module():
    return fused_ops("CPU", "ContinualTransformers>SessionStep")


def initialize(handle, model_file, streams=2, states=""):
    ops_module().continual_transformers_initialize_session(
        handle, str(model_file), str(states), streams=streams
    )


def new_session(name):
    return ops_module().continual_transformers_session_handle(shared_name=name)


def raw_step(handle, x, streams, output_types=("float32",)):
    return ops_module().continual_transformers_session_step(
        handle,
        numbers(*streams),
        [tf.constant(v) for v in x],
        output_types=output_types,
        output_shapes=[None] * len(output_types),
    )


def test_files_that_do_not_fit_are_refused_with_a_sentence(random, tmp_path):
    model = block_model()
    model.call_step(random.normal(size=(2, E)).astype("float32"))
    ct.export(model, tmp_path / "saved")
    assets = tmp_path / "saved" / "assets"
    model_file, states_file = assets / "model.safetensors", assets / "streams.states"
    handle = new_session(str(tmp_path))
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no model yet: load"):
        raw_step(handle, [np.zeros((1, E), "float32")], [0])
    with pytest.raises(tf.errors.FailedPreconditionError, match="nowhere"):
        initialize(handle, tmp_path / "nowhere")
    (tmp_path / "short").write_bytes(model_file.read_bytes()[:-5])
    with pytest.raises(tf.errors.InvalidArgumentError, match="."):
        initialize(handle, tmp_path / "short")
    (tmp_path / "cut").write_bytes(states_file.read_bytes()[:-1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected '.*cut' to hold the states"):
        initialize(handle, model_file, states=tmp_path / "cut")
    with pytest.raises(tf.errors.InvalidArgumentError, match="at most 1 streams"):
        initialize(handle, model_file, streams=1, states=states_file)
    damaged = bytearray(states_file.read_bytes())
    damaged[0] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not a copy of a stream"):
        initialize(handle, model_file, states=tmp_path / "damaged")
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no model yet"):
        raw_step(handle, [np.zeros((1, E), "float32")], [0])

    initialize(handle, model_file, states=states_file)
    x = random.normal(size=(2, E)).astype("float32")
    (y,), _ = raw_step(handle, [x], [0, 1])
    np.testing.assert_allclose(y, model.call_step(x), rtol=1e-5, atol=1e-5)
    initialize(handle, tmp_path / "nowhere")  # The session has a model already, so nothing happens.
    for match, arguments in {
        "expected 1 inputs, as the model file has, but got 2": dict(x=[x, x]),
        "expected 1 outputs": dict(x=[x], output_types=("float32", "float32")),
        "expected y to be float32, but got double": dict(x=[x], output_types=("float64",)),
        "expected x to be float32, but got double": dict(x=[x.astype("float64")]),
        "expected x of shape": dict(x=[x[:, 1:]]),
    }.items():
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            raw_step(handle, streams=[0, 1], **arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected streams of rank 1"):
        ops_module().continual_transformers_session_clean(handle, numbers([0]))
    for _ in range(2):  # The second call does nothing.
        ops_module().continual_transformers_release_session(shared_name=str(tmp_path))
    raw_step(handle, [x], [0, 1])  # The handle keeps the session alive.
    with pytest.raises(tf.errors.FailedPreconditionError, match="has no model yet"):
        raw_step(new_session(str(tmp_path)), [x], [0, 1])


# Several SavedModels.


def test_two_loads_share_no_streams_and_are_given_back(random, tmp_path):
    model = block_model()
    ct.export(model, tmp_path, streams=2)
    first, second = load(tmp_path), load(tmp_path)
    x = random.normal(size=(2, E)).astype("float32")
    for _ in range(N):
        step(first, x, [0, 1])
    clean = states(second, 0, 1)
    y, ready = step(second, x, [0, 1])
    assert not ready.any()
    assert clean == states(load(tmp_path), 0, 1)
    ct.clean_state(model)
    np.testing.assert_allclose(y, model.call_step(x), rtol=1e-5, atol=1e-5)

    model_file = os.path.realpath(tmp_path / "assets" / "model.safetensors")

    def mapped():
        return Path("/proc/self/maps").read_text().count(model_file)

    gc.collect()
    assert mapped() == 2
    signature = first.signatures["step"]
    del first, second
    gc.collect()
    assert mapped() == 1
    assert signature(x=tf.constant(x), streams=numbers(0, 1))["ready"].numpy().all()
    del signature
    gc.collect()
    assert mapped() == 0


def test_an_export_over_one_that_is_loaded(random, tmp_path):
    """A loaded SavedModel keeps its weights. A later one has the new weights and no old states."""
    model = block_model()
    x = random.normal(size=(2, E)).astype("float32")
    model.call_step(x)
    loaded = exported(model, tmp_path)
    model.clean_state()
    loaded.signatures["clean"](streams=numbers(0, 1))
    expected = model.call_step(x)
    model.clean_state()
    model.set_weights([w + 1 for w in model.get_weights()])
    again = exported(model, tmp_path)
    np.testing.assert_allclose(step(loaded, x, [0, 1])[0], expected, rtol=1e-5, atol=1e-5)
    changed = model.call_step(x)
    np.testing.assert_allclose(step(again, x, [0, 1])[0], changed, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "assets" / "streams.states").exists()


def test_a_saved_model_inside_another(random, tmp_path):
    """A loaded SavedModel can be saved as a part of a module, which then has its own session."""
    model = block_model()
    x = random.normal(size=(2, E)).astype("float32")
    model.call_step(x)
    inner = exported(model, tmp_path / "inner")
    module = tf.Module()
    module.inner = inner

    @tf.function(input_signature=[tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)])
    def doubled(x, streams):
        return 2 * inner.signatures["step"](x=x, streams=streams)["y"]

    module.doubled = doubled
    signature = traced(lambda x, streams: {"y": doubled(x, streams)}).get_concrete_function(
        *doubled.input_signature
    )
    tf.saved_model.save(module, str(tmp_path / "outer"), signatures=signature)
    outer = load(tmp_path / "outer")
    expected = model.call_step(x)
    got = outer.doubled(tf.constant(x), numbers(0, 1))
    np.testing.assert_allclose(got, 2 * expected, rtol=1e-5, atol=1e-5)
    (y,) = in_a_session_of_tensorflow_1(tmp_path / "outer", "serving_default", x[None])
    np.testing.assert_allclose(y, 2 * expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(step(inner, x, [0, 1])[0], expected, rtol=1e-5, atol=1e-5)


def in_a_session_of_tensorflow_1(path, signature, steps):
    """Return outputs y of streams 0, 1, ..., loaded as by the C API and TensorFlow Serving."""
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(path))
        signature = meta.signature_def[signature]
        x, streams = signature.inputs["x"].name, signature.inputs["streams"].name
        y = signature.outputs["y"].name
        return [session.run(y, {x: step, streams: range(len(step))}) for step in steps]


def test_each_session_of_tensorflow_1_has_its_own_streams(random, tmp_path):
    model = block_model()
    x = random.normal(size=(3, 2, E)).astype("float32")
    model.call_step(x[0])
    ct.export(model, tmp_path)
    expected = [model.call_step(step) for step in x[1:]]
    for _ in range(2):
        got = in_a_session_of_tensorflow_1(tmp_path, "step", x[1:])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# Threads.


def test_threads_step_their_own_streams_as_one_thread_would(random, tmp_path):
    model = block_model()
    loaded = exported(model, tmp_path, streams=8)
    x = random.normal(size=(30, 8, E)).astype("float32")
    replay = ct.Session(model)
    ids = replay.open(8)
    expected = [
        np.stack([replay.step(x[t, pair], ids[pair]) for t in range(30)])
        for pair in ([0, 5], [2, 1], [7, 3], [6, 4])
    ]

    def run(pair):
        return np.stack([step(loaded, x[t, pair], pair)[0] for t in range(30)])

    def grow():
        for count in range(9, 200):
            loaded.signatures["ensure_streams"](count=tf.constant(count))

    grower = threading.Thread(target=grow)
    grower.start()
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(run, ([0, 5], [2, 1], [7, 3], [6, 4])))
    grower.join()
    np.testing.assert_array_equal(got, expected)


def test_threads_that_step_the_same_stream_take_turns(random, tmp_path):
    """Each step counts once: all steps are ready except those before a full window."""
    loaded = exported(block_model(), tmp_path, streams=1)
    x = random.normal(size=(1, E)).astype("float32")
    with ThreadPoolExecutor(4) as threads:
        ready = list(threads.map(lambda _: step(loaded, x, [0])[1][0], range(60)))
    assert sum(ready) == 60 - N + 1


def test_many_calls_of_a_data_pipeline(random, tmp_path):
    model = block_model()
    loaded = exported(model, tmp_path, streams=16)
    x = random.normal(size=(16, E)).astype("float32")
    call = loaded.signatures["step"]
    data = tf.data.Dataset.from_tensor_slices((x, np.arange(16, dtype="int32")))
    data = data.map(
        lambda x, stream: call(x=x[None], streams=stream[None])["y"][0], num_parallel_calls=4
    )
    session = ct.Session(model)
    got = np.stack([y.numpy() for y in data])
    expected = np.concatenate([session.step(x[i : i + 1], [session.open()]) for i in range(16)])
    np.testing.assert_array_equal(got, expected)


# Exports without a session.


def test_a_model_that_a_session_cannot_run_is_exported_as_a_graph(random, tmp_path):
    inputs = keras.Input((N, E))
    x = ct.CoSiMultiHeadAttention(N, H, D)(inputs, inputs)
    x = keras.layers.Dense(3, activation=tf.nn.crelu, name="tf_function")(x)
    model = ct.StreamingModel(keras.Model(inputs, x), warm_up="partial")
    x = random.normal(size=(3, 2, E)).astype("float32")
    model.call_step(x[0])
    with pytest.warns(RuntimeWarning, match="as a graph.*reason: .*tf_function") as record:
        loaded = exported(model, tmp_path / "with", streams=3)
    assert len([w for w in record if "as a graph" in str(w.message)]) == 1
    assert "\n" not in str(record[0].message)
    assert "ContinualTransformers>SessionStep" not in ops_of(loaded)
    with pytest.warns(RuntimeWarning, match="as a graph"):
        fresh = exported(model, tmp_path / "without", states=False)
    assert not step(fresh, x[1], [0, 1])[1].any()
    assert model.position.numpy().tolist() == [1, 1]
    expected = model.call_step(x[1])
    np.testing.assert_allclose(step(loaded, x[1], [0, 1])[0], expected, rtol=1e-5, atol=1e-5)


def test_without_the_library_the_graph_is_plain(monkeypatch, random, tmp_path):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loaded = exported(block_model(), tmp_path)
    assert not any("ContinualTransformers" in op for op in ops_of(loaded))


def test_an_export_of_0_1_0_still_runs(tmp_path):
    """The old graph calls the layers' own ops, which keep their names, inputs and state."""
    assert ct.ops.load_error() is None  # This loads the ops.
    with tarfile.open(OLD_EXPORT) as archive:
        archive.extractall(tmp_path, filter="data")
    loaded = load(tmp_path / "export_0.1.0")
    recorded = np.load(tmp_path / "export_0.1.0" / "steps.npz")
    assert any("ContinualTransformers" in op for op in ops_of(loaded))
    for x, y in zip(recorded["x"], recorded["y"], strict=True):
        got, _ = step(loaded, x, [0, 1])
        np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
