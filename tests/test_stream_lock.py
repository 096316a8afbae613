"""Tests of the lock by which graphs take turns, and of what waits for it."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation

import continual_transformers_tf as ct
from continual_transformers_tf.ops.library import fused_ops
from continual_transformers_tf.ops.turn import FusedLock, PlainLock, new_graph_lock
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")

N, E = 5, 6
SECONDS = 60  # More than any of this takes.
ACQUIRE = ("MutexLock", "ContinualTransformers>AcquireStreamLock")
RELEASE = ("ConsumeMutexLock", "ContinualTransformers>ReleaseStreamLock")


@pytest.fixture
def lock(backend):
    lock = new_graph_lock()
    assert type(lock) is {"fused": FusedLock, "tensorflow": PlainLock}[backend]
    return lock


@pytest.fixture
def fused_lock(monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    return new_graph_lock()


def attention():
    return ct.CoSiMultiHeadAttention(N, 2, 3, warm_up="partial")


def test_a_second_holder_waits_for_the_first(lock):
    held = [lock.acquire(lock.resource_handle)]
    taken = threading.Event()

    def take():
        lock.release(lock.acquire(lock.resource_handle))
        taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not taken.wait(0.2)
    lock.release(held.pop())  # TensorFlow's mutex is free when its last tensor is gone.
    assert taken.wait(SECONDS)
    thread.join()


def test_steps_that_wait_come_in_their_order(fused_lock):
    held = fused_lock.acquire(fused_lock.resource_handle)
    order, threads = [], []
    for i in range(4):

        def take(i=i):
            mine = fused_lock.acquire(fused_lock.resource_handle)
            order.append(i)
            fused_lock.release(mine)

        threads.append(threading.Thread(target=take))
        threads[-1].start()
        threads[-1].join(0.2)  # It waits by then.
    fused_lock.release(held)
    for thread in threads:
        thread.join(SECONDS)
    assert order == [0, 1, 2, 3]


def test_a_step_that_fails_frees_the_lock(lock):
    @traced
    def step(x):
        held = lock.acquire(lock.resource_handle)
        with tf.control_dependencies([held]):
            checked = tf.debugging.assert_positive(x)
        with tf.control_dependencies([checked]):
            lock.release(held)
        return x

    step(tf.constant(1))
    for _ in range(3):
        with pytest.raises(tf.errors.InvalidArgumentError):
            step(tf.constant(-1))
    step(tf.constant(1))


def test_a_step_that_is_cancelled_waits_no_longer(fused_lock):
    @traced
    def step(x):
        held = fused_lock.acquire(fused_lock.resource_handle)
        with tf.control_dependencies([held]):
            y = tf.identity(x)
        with tf.control_dependencies([y]):
            fused_lock.release(held)
        return y

    x, outcome = tf.constant(1), []
    manager = cancellation.CancellationManager()
    cancelable = manager.get_cancelable_function(step.get_concrete_function(x))
    held = fused_lock.acquire(fused_lock.resource_handle)

    def wait():
        try:
            outcome.append(cancelable(x))
        except tf.errors.CancelledError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.2)
    assert not outcome
    manager.start_cancel()
    thread.join(SECONDS)
    assert isinstance(outcome[0], tf.errors.CancelledError)
    fused_lock.release(held)
    assert step(x).numpy() == 1


def test_a_lock_can_be_released_twice(fused_lock):
    first = fused_lock.acquire(fused_lock.resource_handle)
    fused_lock.release(first)
    second = fused_lock.acquire(fused_lock.resource_handle)
    fused_lock.release(first)  # Not the second's.
    taken = threading.Event()

    def take():
        fused_lock.release(fused_lock.acquire(fused_lock.resource_handle))
        taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not taken.wait(0.2)
    fused_lock.release(second)
    assert taken.wait(SECONDS)
    thread.join()


def test_only_what_holds_a_lock_is_released(fused_lock):
    with pytest.raises(tf.errors.InvalidArgumentError, match="output of AcquireStreamLock"):
        fused_lock.release(tf.raw_ops.EmptyTensorList(
            element_shape=tf.constant(-1), max_num_elements=1, element_dtype=tf.float32
        ))  # fmt: skip


def waiting(graph, op):
    """Return the ops that wait for an op."""
    found, new = set(), [op]
    while new:
        op = new.pop()
        after = {x for y in op.outputs for x in y.consumers()} | set(op._control_outputs)
        new += after - found
        found |= after
    return found


def test_ops_on_the_state_wait_and_reads_of_weights_do_not(backend, random):
    x = keras.Input((N, E))
    y = keras.layers.Dense(E)(x)
    y = ct.CircularPositionalEncoding(2 * N - 1, E)(y)
    model = ct.StreamingModel(keras.Model(x, attention()(y)[:, -1]), warm_up="partial")
    data = tf.constant(random.normal(size=(2, E)), tf.float32)
    model.call_step(data)
    graph = traced(lambda x: model.call_step(x)).get_concrete_function(data).graph
    ops = graph.get_operations()
    (acquire,) = (op for op in ops if op.type in ACQUIRE)
    (release,) = (op for op in ops if op.type in RELEASE)
    after = waiting(graph, acquire)
    handles = {id(inner): outer for outer, inner in graph.captures}
    state = {id(v.handle) for s in model._streams.members for v in s.variables_by_name.values()}
    weights = {id(v.value.handle) for v in model.weights}
    counted = {"state": 0, "weights": 0}
    for op in ops:
        origins = {id(handles.get(id(x))) for x in op.inputs if x.dtype == tf.resource}
        if origins & state:
            counted["state"] += 1
            assert op in after, op
            assert release in waiting(graph, op), op
        elif op.type == "ReadVariableOp" and origins <= weights:
            counted["weights"] += 1
            assert op not in after, op
    assert min(counted.values()) >= 2, counted
    matmuls = [op for op in ops if op.type == "MatMul"]
    assert matmuls[0] not in after  # That of the Dense before the attention.


def test_the_position_changes_after_all_else(backend, random):
    x = keras.Input((N, E))
    y = ct.CoSiMultiHeadAttention(N, 2, 3, single_output=False)(x, use_causal_mask=True)
    model = ct.StreamingModel(keras.Model(x, attention()(y)[:, -1]), warm_up="partial")
    data = tf.constant(random.normal(size=(2, 3, E)), tf.float32)
    model.call_steps(data)
    graph = traced(lambda x: model.call_steps(x)).get_concrete_function(data).graph
    handles = {id(inner): outer for outer, inner in graph.captures}
    position = model.position.handle
    writes = [op for op in graph.get_operations() if op.type.startswith("ResourceScatter")]
    (last,) = (op for op in writes if handles[id(op.inputs[0])] is position)
    assert len(writes) == 1 + 2 * 3
    for op in writes:
        assert op is last or last in waiting(graph, op)


def test_functions_of_two_models_in_either_order_do_not_wait_for_each_other(backend, random):
    a, b = attention(), attention()
    x = tf.constant(random.normal(size=(2, E)), tf.float32)
    for layer in (a, b):
        layer.call_step(x)
    functions = [
        traced(lambda x: b.call_step(a.call_step(x))),
        traced(lambda x: a.call_step(b.call_step(x))),
    ]
    for function in functions:
        function(x)
    threads = [
        threading.Thread(target=lambda f=f: [f(x) for _ in range(100)], daemon=True)
        for f in functions
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert a.position.numpy().tolist() == b.position.numpy().tolist() == [403, 403]


@pytest.mark.slow
def test_an_export_in_plain_tensorflow_has_no_lock_of_the_library(monkeypatch, random, tmp_path):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = attention()
    x = tf.constant(random.normal(size=(2, E)), tf.float32)
    traced(layer.call_steps)(x[:, tf.newaxis])
    assert isinstance(layer._streams.graph_lock, FusedLock)
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    ct.export(layer, tmp_path / "plain")
    assert b"ContinualTransformers>" not in (tmp_path / "plain" / "saved_model.pb").read_bytes()
    step = tf.saved_model.load(str(tmp_path / "plain")).signatures["step"]
    expected = layer.call_step(x).numpy()
    np.testing.assert_allclose(step(x=x, streams=tf.range(2))["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_a_model_is_one_op_for_each_block(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    if fused_ops("CPU", "ContinualTransformers>CoSiTransformerEncoderStep") is None:
        pytest.skip("the op library has no encoder step")
    x = keras.Input((N, E))
    stack = ct.TransformerEncoder(3, N, E, num_heads=2, ff_dim=8, warm_up="partial")
    model = ct.StreamingModel(keras.Model(x, stack(x)[:, -1]), warm_up="partial")
    data = tf.constant(random.normal(size=(2, E)), tf.float32)
    model.call_step(data)
    graph = traced(lambda x: model.call_step(x)).get_concrete_function(data).graph
    types = [op.type for op in graph.get_operations()]
    assert types.count("ContinualTransformers>CoSiTransformerEncoderStep") == 3
    assert "ContinualTransformers>SingleOutputAttention" not in types
