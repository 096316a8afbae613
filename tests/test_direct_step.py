"""The eager step without TensorFlow's runtime: the op's own bits, and what it leaves to the op."""

import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context, executor

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import E, H, N, pair
from continual_transformers_tf.ops import direct_step

pytestmark = pytest.mark.cpu_only("a step is called directly where its state is on the CPU")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")


@pytest.fixture
def taken(monkeypatch):
    """A list to which True is appended for every direct step that is taken, False if declined."""
    calls = []
    call = direct_step.DirectStep.__call__

    def counted(self, *arguments):
        output = call(self, *arguments)
        calls.append(output is not NotImplemented)
        return output

    monkeypatch.setattr(direct_step.DirectStep, "__call__", counted)
    return calls


def by_the_op(layer):
    """The same layer, with the same state, whose steps are all taken by the op."""
    other = ct.CoSiMultiHeadAttention.from_config(layer.get_config())
    other.build(*((None, size) for size in layer._features))
    other.set_weights(layer.get_weights())
    other.set_state(layer.get_state())
    other.call_step(*(np.zeros((0, size), layer.compute_dtype) for size in layer._features))
    other._one_op_step._direct = None
    return other


LAYERS = [
    {},
    dict(use_bias=False),
    dict(use_gate=True, warm_up="partial"),
    dict(value_dim=3, output_shape=(2, 4)),
    dict(dtype="float64"),
    dict(query_index=-3, use_gate=True, value_dim=2),
    dict(query_index=0, warm_up="partial"),
    dict(cache_dtype="bfloat16", weights_dtype="bfloat16"),
    dict(cache_dtype="float16"),
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_the_bits_are_the_ops(random, taken, options):
    layer = ct.CoSiMultiHeadAttention(N, H, 5, **options)
    layer.build((None, E), (None, E + 1), (None, E + 2))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    layer.ensure_streams(4)
    op = by_the_op(layer)
    del taken[:]
    dtype = layer.compute_dtype
    for step in range(3 * N):
        m = random.integers(0, 5)
        x = [random.normal(size=(m, size)).astype(dtype) for size in (E, E + 1, E + 2)]
        as_tensors = [tf.constant(array) for array in x]
        arguments = dict(
            streams=[None, random.permutation(4)[:m]][step % 2], update_state=step % 4 != 3
        )
        output = layer.call_step(*(as_tensors if step % 3 else x), **arguments)
        expected = op.call_step(*as_tensors, **arguments)
        assert (output is None) == (expected is None)
        if output is not None:
            assert output.dtype == expected.dtype
            assert output.device == expected.device
            np.testing.assert_array_equal(output, expected)
    assert taken.count(True) == 3 * N
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, op.get_state()[name])


@pytest.mark.parametrize(
    "convert",
    [
        list, tuple, np.array, np.int32, np.int64, np.uint8, tf.constant,
        lambda s: tf.constant(s, tf.int64), lambda s: np.repeat(s, 2)[::2],
    ],
    ids=["list", "tuple", "array", "i4", "i8", "u1", "tensor", "i8 tensor", "strided"],
)  # fmt: skip
def test_streams_of_any_kind(random, convert):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(9)
    layer.call_step(np.zeros((9, E), "float32"))
    op = by_the_op(layer)
    x = random.normal(size=(3, E)).astype("float32")
    streams = [7, 0, 3]
    output = layer.call_step(x, streams=convert(streams))
    np.testing.assert_array_equal(output, op.call_step(x, streams=streams))
    np.testing.assert_array_equal(layer.position, op.position)


@pytest.mark.parametrize("convert", [
    lambda x: x.astype("float64"), lambda x: x.astype("float16"), lambda x: x.tolist(),
    lambda x: np.repeat(x, 2, 1)[:, ::2], np.asfortranarray, tf.Variable,
    lambda x: tf.constant(x, tf.float64), lambda x: x.astype(">f4"),
], ids=["float64", "float16", "list", "strided", "fortran", "variable", "float64 tensor",
        "big-endian"])  # fmt: skip
def test_inputs_of_any_kind(random, convert):
    """What the direct step does not know, the op's way converts."""
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(2)
    x = random.normal(size=(2, E)).astype("float16").astype("float32")
    layer.call_step(x)
    op = by_the_op(layer)
    np.testing.assert_array_equal(layer.call_step(convert(x)), op.call_step(x))


def test_the_result_is_a_tensor_as_any_other(random, taken):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = tf.constant(random.normal(size=(2, E)).astype("float32"))
    layer.call_step(x)
    y = layer.call_step(x)
    assert taken[-1]
    assert tf.is_tensor(y)
    assert y.shape == (2, E)
    np.testing.assert_allclose((y + 1) @ tf.transpose(y), (y.numpy() + 1) @ y.numpy().T, rtol=1e-5)
    with tf.device("CPU:0"):
        np.testing.assert_array_equal(tf.identity(y), y)
    kept = y.numpy().copy()
    layer.call_step(2 * x)
    np.testing.assert_array_equal(y, kept)  # No later step writes into it.
    np.testing.assert_array_equal(tf.function(lambda y: y * 2)(y), 2 * kept)


def test_what_is_left_to_the_op(random, taken):
    """More rows than there are streams, masks, scores, tapes, graphs; and nothing happens twice."""
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, E)).astype("float32")
    for _ in range(2):
        layer.call_step(x)
    layer.call_step(random.normal(size=(5, E)).astype("float32"))
    assert taken[-1] is False
    np.testing.assert_array_equal(layer.position, [3, 3, 1, 1, 1])
    del taken[:]
    layer.call_step(x, key_mask=[True, False])
    layer.call_step(x, attention_mask=np.ones(N, bool))
    layer.call_step(x, return_attention_scores=True)
    with tf.GradientTape():
        layer.call_step(x)
    tf.function(layer.call_step)(x)
    assert not any(taken)
    np.testing.assert_array_equal(layer.position, [8, 8, 1, 1, 1])


def test_operations_under_way_come_first(random, taken):
    """In asynchronous execution the op is queued behind them; the direct step could not be."""
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = tf.constant(random.normal(size=(1, E)).astype("float32"))
    layer.call_step(x)
    layer.call_step(x)
    assert taken[-1]
    with context.executor_scope(executor.new_executor(enable_async=True)):
        layer.call_step(x)
    assert taken[-1] is False
    assert layer.position.numpy().tolist() == [3]


@pytest.mark.parametrize("options", [{}, dict(norm_first=True), dict(activation="relu")], ids=str)
def test_the_bits_of_an_encoder_are_the_ops(random, taken, options):
    layers = [ct.CoSiTransformerEncoder(N, E, H, 11, **options) for _ in range(2)]
    for layer in layers:
        layer.build((None, E))
        layer.set_weights(layers[0].get_weights())
        layer.ensure_streams(2)
        layer.call_step(np.zeros((0, E), "float32"))
    layers[1]._one_op_step._direct = None
    del taken[:]
    for step in range(2 * N):
        x = random.normal(size=(2, E)).astype("float32")
        streams = [None, [1, 0]][step % 2]
        output, expected = (layer.call_step(x, streams=streams) for layer in layers)
        assert (output is None) == (expected is None) == (step < N - 1)
        if output is not None:
            np.testing.assert_array_equal(output, expected)
    assert taken == [True] * 2 * N


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("options", [dict(norm_first=True), dict(use_bias=False)], ids=str)
def test_an_encoder_in_float64_with_small_variances(random, scale, options):
    """Where a rounded epsilon would be seen: by the direct step, the op and plain TensorFlow."""
    layer = ct.CoSiTransformerEncoder(N, E, H, 11, dtype="float64", warm_up="partial", **options)
    layer.build((None, E))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    x = scale * random.normal(size=(2, E))
    layer.call_step(x, update_state=False)
    direct = layer.call_step(x, update_state=False).numpy()
    layer._one_op_step._direct = None
    np.testing.assert_array_equal(layer.call_step(x, update_state=False), direct)
    with tf.GradientTape():  # By several ops.
        plain = layer.call_step(x, update_state=False)
    assert reference.relative_error(direct, plain.numpy()) < 1e-12


def test_a_tensor_still_under_way_is_waited_for_without_pythons_lock(random):
    """Who makes it may want the lock: this was a deadlock."""
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = tf.constant(random.normal(size=(1, E)).astype("float32"))
    for _ in range(2):
        layer.call_step(x)

    def slow(x):
        time.sleep(0.2)
        return x

    with context.executor_scope(executor.new_executor(enable_async=True)):
        under_way = tf.py_function(slow, [x], tf.float32)
    assert layer.call_step(under_way).shape == (1, E)


def test_what_a_layer_becomes_later_is_heeded(random):
    """Quantized to float8 it keeps its kernels; an activation may be another."""
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(1, E)).astype("float32")
    for _ in range(2):
        layer.call_step(x)
    assert layer._one_op_step is not None
    layer.value_dense.quantize("float8")
    layer.call_step(x)
    assert layer._one_op_step is None
    encoder = ct.CoSiTransformerEncoder(N, E, H, 11, warm_up="partial")
    for _ in range(2):
        encoder.call_step(x)
    gelu = encoder.call_step(x, update_state=False).numpy()
    encoder.feed_forward.activation = tf.keras.activations.relu
    relu = encoder.call_step(x, update_state=False).numpy()
    assert reference.relative_error(relu, gelu) > 1e-3


def test_errors_are_the_ops(random):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, E)).astype("float32")
    for _ in range(2):
        layer.call_step(x)
    op = by_the_op(layer)
    before = layer.get_state()
    for arguments in (
        dict(query=x[:, 1:]),
        dict(query=x[0]),
        dict(query=x, value=x[:1]),
        dict(query=x, streams=[0, 2]),
        dict(query=x, streams=[1, 1]),
        dict(query=x, streams=[2**40, 0]),
        dict(query=x, streams=[-1, 0]),
        dict(query=x, streams=[0]),
        dict(query=x, streams=[[0, 1]]),
        dict(query=x, streams=[0.5, 1.0]),
        dict(query=x.astype(int)),
        dict(query=None),
    ):
        messages = []
        for each in (layer, op):
            with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as error:
                each.call_step(**arguments)
            messages.append((type(error.value), str(error.value)))
        assert messages[0] == messages[1], arguments
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])


def test_other_threads_run_meanwhile(random):
    """The lock of Python's is given up while a long step is computed."""
    layer = ct.CoSiMultiHeadAttention(100_000, 1, 64, warm_up="partial")
    x = random.normal(size=(1, 64)).astype("float32")
    layer.call_step(x)
    state = layer.get_state()
    state["position"][:] = 100_000
    state["key_mask"][:] = True
    layer.set_state(state)
    layer.call_step(x)

    def share_of_the_step_in_which_nothing_else_ran():
        times = {}

        def step():
            times["start"] = time.perf_counter()
            layer.call_step(x)
            times["end"] = time.perf_counter()

        thread = threading.Thread(target=step)
        ticks = [time.perf_counter()]
        thread.start()
        while "end" not in times:
            ticks.append(time.perf_counter())
        thread.join()
        ticks.append(time.perf_counter())
        return np.diff(ticks).max() / (times["end"] - times["start"])

    # Were the lock held, it would be all of it, every time.
    assert min(share_of_the_step_in_which_nothing_else_ran() for _ in range(20)) < 0.5


def test_many_threads_and_streams(random):
    """Threads that step streams of their own: as if each had been alone."""
    streams, steps = 8, 60
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(streams)
    x = random.normal(size=(streams, steps, E)).astype("float32")
    layer.call_step(x[:, 0], update_state=False)
    alone = by_the_op(layer)
    expected = [[alone.call_step(x[s, t][None], streams=[s]) for t in range(steps)]
                for s in range(streams)]  # fmt: skip
    got = [[] for _ in range(streams)]

    def run(s):
        for t in range(steps):
            got[s].append(layer.call_step(x[s, t][None], streams=[s]))

    threads = [threading.Thread(target=run, args=(s,)) for s in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.array(got), np.array(expected))


def test_without_the_runtime_steps_are_taken_by_the_op(random, monkeypatch, executed_ops):
    """Where TensorFlow lacks something that is called directly."""
    monkeypatch.setattr(direct_step._pywrap_tensorflow_internal, "__file__", "/nowhere.so")
    direct_step._function.cache_clear()
    try:
        layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
        for _ in range(2):
            assert layer.call_step(np.zeros((1, E), "float32")).shape == (1, E)
        assert layer._one_op_step._direct is None
        assert "ContinualTransformers>CoSiMultiHeadAttentionStep" in executed_ops
    finally:
        direct_step._function.cache_clear()
