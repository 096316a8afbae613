"""Which path a step takes depending on its state's device, and what the library has for it.

These tests need no GPU. `pytest --device GPU:0` checks the numbers of the GPU's kernels.
"""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels as kernel_registry

import continual_transformers_tf as ct
from co_si_mha_cases import E, pair
from continual_transformers_tf.layers import fused_step
from continual_transformers_tf.ops import delay, library, scatter
from traced import traced

PREFIX = "ContinualTransformers>"
built_with_cuda = pytest.mark.skipif(
    not library.has_kernel(library.SINGLE_OUTPUT, "GPU"), reason="the library has no CUDA in it"
)


def gpu_kernels(op):
    registered = kernel_registry.get_registered_kernels_for_op(PREFIX + op).kernel
    return [kernel for kernel in registered if kernel.device_type == "GPU"]


@built_with_cuda
def test_types_of_single_output_attention_on_a_gpu():
    types = {
        tuple(
            tf.as_dtype(constraint.allowed_values.list.type[0]).name
            for constraint in sorted(kernel.constraint, key=lambda c: c.name, reverse=True)
        )
        for kernel in gpu_kernels("SingleOutputAttention")
    }
    halves = {("float32", "bfloat16"), ("float32", "float16")}
    assert types == {("float32", "float32"), ("float64", "float64"), *halves}


@built_with_cuda
@pytest.mark.parametrize(("op", "on_the_host"), [
    ("SingleOutputAttention",
     {"key_cache", "value_cache", "key_mask_cache", "position", "streams", "scale"}),
    ("RetroactiveAttention",
     {"key_cache", "value_cache", "key_mask_cache", "position", "query_cache", "softmax",
      "weighted_sum", "made_with", "streams", "scale"}),
    ("CoSiMultiHeadAttentionStep", {"variables", "streams"}),
    ("CoSiTransformerEncoderStep", {"variables", "streams"}),
])  # fmt: skip
def test_what_an_op_on_a_gpu_wants_on_the_host(op, on_the_host):
    for kernel in gpu_kernels(op):
        assert set(kernel.host_memory_arg) == on_the_host
    assert gpu_kernels(op)


@pytest.mark.parametrize(("shape", "few"), [
    ((fused_step.MOST_ROWS_ON_GPU, E), True), ((fused_step.MOST_ROWS_ON_GPU + 1, E), False),
    ((0, E), True), ((), False),
])  # fmt: skip
def test_few_rows(shape, few):
    assert fused_step.has_few_rows(np.zeros(shape, "float32")) == few
    assert fused_step.has_few_rows(tf.zeros(shape)) == few
    assert fused_step.has_few_rows(np.zeros(shape).tolist()) == few


def test_rows_that_are_not_known_are_many():
    seen = []

    @traced(input_signature=[tf.TensorSpec([None, E])])
    def graph(x):
        seen.append(fused_step.has_few_rows(x))
        return x

    graph(np.zeros((1, E), "float32"))
    assert seen == [False]


@pytest.mark.cpu_only("the state is only said to be elsewhere")
def test_many_rows_on_a_gpu_are_taken_by_several_ops(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    few, many = (np.zeros((m, E), "float32") for m in (1, fused_step.MOST_ROWS_ON_GPU + 1))
    for x in (few, many):
        assert layer._step_as_one_op(False, x) is not None
    monkeypatch.setattr(layer._stream_state, "device_type", "GPU")
    assert layer._step_as_one_op(False, few) is not None
    assert layer._step_as_one_op(False, many) is None


@pytest.mark.parametrize("op", [library.SINGLE_OUTPUT, f"{PREFIX}RetroactiveAttention"])
def test_a_device_that_nothing_was_built_for(monkeypatch, op):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    name = op.removeprefix(PREFIX)
    with pytest.raises(ValueError, match=rf"=fused, but .* on a TPU, and {name} has kernels for"):
        library.fused_ops("TPU", op)
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    assert library.fused_ops("TPU", op) is None
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "auto")
    library._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"on a TPU, and {name}") as warned:
        assert [library.fused_ops("TPU", op) for _ in range(3)] == [None] * 3
    assert len(warned) == 1


def test_a_library_without_cuda_says_how_to_build_one_with_it(monkeypatch):
    monkeypatch.setattr(library, "has_kernel", lambda op, device_type: device_type == "CPU")
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    with pytest.raises(ValueError, match="without CUDA.*CONTINUAL_TRANSFORMERS_CUDA=1 pip install"):
        library.fused_ops("GPU")
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "auto")
    library._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="in plain TensorFlow.*without CUDA"):
        assert library.fused_ops("GPU") is None


# TensorFlow has no GPU kernels of these for bool, but the state's variables may be on a GPU.
NOT_FOR_BOOL = ("ResourceScatterNdUpdate", "ResourceGatherNd")


@pytest.mark.parametrize("query_index", [-1, -3])
def test_state_asks_for_nothing_that_a_gpu_lacks(backend, random, query_index):
    from tensorflow.python.framework import op_callbacks

    missing = []

    def record(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        op_type = op_type.decode() if isinstance(op_type, bytes) else op_type
        if op_type in NOT_FOR_BOOL and any(x.dtype == tf.bool for x in (*inputs, *outputs)):
            missing.append(op_type)

    layer = ct.CoSiMultiHeadAttention(4, 2, 3, query_index=query_index, warm_up="partial")
    x = random.normal(size=(2, 3, 5)).astype("float32")
    op_callbacks.add_op_callback(record)
    try:
        layer.call_steps(x, key_mask=x[..., 0] > 0, query_mask=x[..., 1] > 0)
        layer.call_step(x[:, 0], streams=[1, 0], training=True)
        layer.set_state(layer.get_state())
        layer.clean_state([1])
    finally:
        op_callbacks.remove_op_callback(record)
    assert missing == []


@pytest.mark.parametrize("dtype", ["bool", "float32", "int64"])
def test_rows_are_put_and_taken_whatever_they_are_of(random, dtype):
    before = random.integers(0, 2, (5, 7)).astype(dtype)
    ring = tf.Variable(before)
    streams = np.array([3, 0], np.int32)
    rows = np.array([[6, 0, 1], [2, 3, 4]], np.int32)
    indices = tf.stack([np.broadcast_to(streams[:, None], rows.shape), rows], -1)
    values = random.integers(0, 2, rows.shape).astype(dtype)
    scatter.scatter_nd_update(ring, indices, tf.constant(values))
    expected = before.copy()
    expected[streams[:, None], rows] = values
    np.testing.assert_array_equal(ring, expected)
    np.testing.assert_array_equal(scatter.gather_nd(ring, indices), values)
    scatter.scatter_nd_update(ring, tf.constant([[4], [2]]), tf.constant(before[:2]))
    expected[[4, 2]] = before[:2]
    np.testing.assert_array_equal(ring, expected)
    position = tf.constant([4, 9], tf.int64)
    delay.put_steps(ring, tf.constant(values[:, :2]), tf.constant(streams), position)
    np.testing.assert_array_equal(
        delay.steps_before(ring, tf.constant(streams), position + 2, 2), values[:, :2]
    )
