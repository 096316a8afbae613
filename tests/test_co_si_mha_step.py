"""The whole layer's step as one op equals the same step as several ops."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import E, H, N, pair
from continual_transformers_tf.ops.layer_step import MHA_STEP, handles, layer_step
from errors import BAD_INPUT
from traced import traced

pytestmark = pytest.mark.sampled(6)

# Few cases that cover the options of the layer; the steps cover inputs, masks and scores.
LAYERS = [
    {},
    dict(use_bias=False),
    dict(use_gate=True),
    dict(value_dim=3, output_shape=(2, 4)),
    dict(dtype="float64", use_gate=True),
    dict(query_index=0),
    dict(query_index=-3, use_gate=True, value_dim=2),
    dict(sliding_window=3, query_index=2),
    dict(cache_dtype="bfloat16"),
    dict(cache_dtype="float16", use_bias=False),
    dict(warm_up="none", query_index=1),
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_one_op_is_the_several_ops(monkeypatch, random, options):
    """With equal weights, steps, streams and masks, all results equal those of plain ops."""
    options = {"warm_up": "partial", **options}
    layers = {}
    for backend in ("fused", "tensorflow"):
        layers[backend] = layer = ct.CoSiMultiHeadAttention(N, H, 5, **options)
        layer.build((None, 1, E), (None, 1, E + 1), (None, 1, E + 2))
        keras.utils.set_random_seed(1)
        layer.set_weights([np.random.normal(scale=0.4, size=w.shape) for w in layer.weights])
        layer.ensure_streams(4)
    exact = 1e-12 if options.get("dtype") == "float64" else 5e-6
    # A difference in a float's last bit may round a key to another 16-bit number.
    bound = {"bfloat16": 2e-2, "float16": 2e-3}.get(options.get("cache_dtype"), exact)
    for step in range(3 * N):
        m = random.integers(1, 5)
        x = [random.normal(size=(m, size)) for size in (E, E + 1, E + 2)]
        arguments = dict(
            streams=random.permutation(4)[:m] if step % 2 or m < 4 else None,
            attention_mask=random.random((m, H, N)) < 0.8 if step % 3 == 0 else None,
            query_mask=random.random(m) < 0.8 if step % 4 == 0 else None,
            key_mask=random.random(m) < 0.8 if step % 5 == 0 else None,
            value_mask=random.random(m) < 0.8 if step % 3 == 1 else None,
            use_causal_mask=step % 7 == 0,
            update_state=step % 6 != 5,
            return_attention_scores=True,
        )
        results = {}
        for backend, layer in layers.items():
            monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
            results[backend] = layer.call_step(*x, **arguments)
        (output, scores), (expected, expected_scores) = results.values()
        assert (output is None) == (expected is None)
        if output is not None:
            assert output.shape == expected.shape
            assert output.dtype == expected.dtype
            assert reference.relative_error(output, expected.numpy()) < bound
            np.testing.assert_allclose(scores, expected_scores, atol=bound)
    assert layers["fused"]._fused_step is not None
    assert layers["tensorflow"]._fused_step is None
    states = [layer.get_state() for layer in layers.values()]
    for name, array in states[0].items():
        if name == "key_mask" or array.dtype.kind in "ib":
            np.testing.assert_array_equal(array, states[1][name])


@pytest.mark.parametrize("options", [{}, dict(query_index=0, use_gate=True)], ids=str)
def test_a_step_that_leaves_the_position(monkeypatch, random, options):
    """The step writes the rings as usual. The caller only has to advance the position."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = ct.CoSiMultiHeadAttention(N, H, 5, warm_up="partial", **options)
    layer.build((None, 1, E))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    fused = ct.ops.library.fused_ops("CPU")
    step, cache = layer._make_fused_step(), layer._stream_state
    for t in range(2 * N):
        x = tf.constant(random.normal(size=(1, E)).astype("float32"))
        layer.ensure_streams(1)
        state = layer.get_state()
        expected = layer.call_step(x)
        after = layer.get_state()
        layer.set_state(state)
        attributes = dict(
            use_bias=True, use_gate=layer._use_gate, use_delay=layer.delay > 0,
            advance_position=False, sequence_first=True,
        )  # fmt: skip
        inputs = (x, [], [], handles(step._variables), [], [], [], [])
        # A layer with a delay overwrites a waiting query, so its step cannot be repeated.
        for _ in range(1 if layer.delay else 2):
            result, _ = layer_step(fused, MHA_STEP, *inputs, **attributes)
            if expected is not None:  # While the first queries wait, the op gives zeros.
                np.testing.assert_array_equal(result, expected)
        assert cache.position.numpy() == t
        cache.position.assign_add([1])
        for name, array in layer.get_state().items():
            np.testing.assert_array_equal(array, after[name], name)


def plain_step(layer, x):
    """Take the step as several ops: under a tape, the layer must be differentiable."""
    with tf.GradientTape():
        return layer.call_step(x)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 31])
@pytest.mark.parametrize(("features", "heads", "size"), [(24, 3, 8), (33, 1, 33), (130, 5, 12)])
def test_rows_and_sizes(monkeypatch, random, rows, features, heads, size):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(17, heads, size, features, random=random, layer_options=dict(warm_up="partial"))
    for _ in range(3):
        x = random.normal(size=(rows, features)).astype("float32")
        state = layer.get_state()
        expected = plain_step(layer, x).numpy()
        layer.set_state(state)
        assert reference.relative_error(layer.call_step(x), expected) < 5e-6


def test_weights_that_change_are_heeded(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(1, E)).astype("float32")
    layer.call_step(x)
    layer.output_dense.kernel.assign(2 * layer.output_dense.kernel)
    state = layer.get_state()
    expected = plain_step(layer, x).numpy()
    layer.set_state(state)
    assert reference.relative_error(layer.call_step(x), expected) < 5e-6


def test_a_low_rank_addition_ends_the_one_op(monkeypatch, executed_ops, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = tf.constant(random.normal(size=(1, E)).astype("float32"))
    layer.call_step(x)
    layer.value_dense.enable_lora(2)
    executed_ops.clear()
    layer.call_step(x)
    assert "ContinualTransformers>SingleOutputAttention" in executed_ops


def test_a_step_is_differentiated_by_several_ops(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = tf.Variable(random.normal(size=(1, E)).astype("float32"))
    layer.call_step(x)
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(layer.call_step(x) ** 2)
    assert all(g is not None for g in tape.gradient(y, layer.trainable_weights))
    graph = traced(layer.call_step)
    graph(x)  # The graph is traced as for serving: without a tape around it.
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(graph(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match="training=True"):
        tape.gradient(y, x)


def test_a_deep_copy_steps_by_itself(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(1, E)).astype("float32")
    layer.call_step(x)
    step = layer._fused_step
    assert copy.deepcopy(step) is None  # A copy would be bound to the old variables.


def test_what_a_layer_becomes_later_is_heeded(monkeypatch, random):
    """float8 quantization keeps the kernels, and an encoder's activation can be replaced."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(1, E)).astype("float32")
    layer.call_step(x)
    assert layer._fused_step is not None
    layer.value_dense.quantize("float8")
    layer.call_step(x)
    assert layer._fused_step is None
    encoder = ct.CoSiTransformerEncoder(N, E, H, 11, warm_up="partial")
    encoder.call_step(x)
    gelu = encoder.call_step(x, update_state=False).numpy()
    encoder.feed_forward.activation = keras.activations.relu
    relu = encoder.call_step(x, update_state=False).numpy()
    assert reference.relative_error(relu, gelu) > 1e-3


@pytest.mark.parametrize(
    "convert",
    [
        tuple, np.array, np.int32, np.int64, np.uint8, tf.constant,
        lambda s: tf.constant(s, tf.int64), lambda s: np.repeat(s, 2)[::2],
    ],
    ids=["tuple", "array", "i4", "i8", "u1", "tensor", "i8 tensor", "strided"],
)  # fmt: skip
def test_streams_of_any_kind(backend, random, convert):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(9)
    x = random.normal(size=(3, E)).astype("float32")
    streams = [7, 0, 3]
    expected = layer.call_step(x, streams=streams, update_state=False)
    np.testing.assert_array_equal(layer.call_step(x, streams=convert(streams)), expected)
    np.testing.assert_array_equal(layer.position, np.isin(range(9), streams))


@pytest.mark.parametrize("convert", [
    lambda x: x.astype("float64"), lambda x: x.astype("float16"), lambda x: x.tolist(),
    lambda x: np.repeat(x, 2, 1)[:, ::2], np.asfortranarray, tf.Variable,
    lambda x: tf.constant(x, tf.float64), lambda x: x.astype(">f4"),
], ids=["float64", "float16", "list", "strided", "fortran", "variable", "float64 tensor",
        "big-endian"])  # fmt: skip
def test_inputs_of_any_kind(backend, random, convert):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, E)).astype("float16").astype("float32")
    layer.call_step(x)
    expected = layer.call_step(x, update_state=False)
    np.testing.assert_array_equal(layer.call_step(convert(x)), expected)


def test_no_later_step_writes_into_a_result(backend, random):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, E)).astype("float32")
    output = layer.call_step(x)
    kept = output.numpy().copy()
    layer.call_step(2 * x)
    np.testing.assert_array_equal(output, kept)


@pytest.mark.parametrize("what", [
    dict(streams=[0, 7]), dict(streams=[1, 1]), dict(streams=[0]), dict(streams=[2**40, 0]),
    dict(streams=[-1, 0]), dict(streams=[[0, 1]]), dict(streams=[0.5, 1.0]), dict(key_mask=[True]),
    dict(query_mask=[True, False, True]), dict(attention_mask=np.ones((2, N + 1), bool)),
    dict(attention_mask=np.ones((2, H, N), np.float32)),
], ids=str)  # fmt: skip
def test_what_does_not_fit_changes_nothing(monkeypatch, random, what):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, E)).astype("float32")
    layer.call_step(x)
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(x, **what)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])


# Kernels in bfloat16.


@pytest.mark.parametrize(("features", "heads"), [(32, 4), (192, 16)])
def test_weights_in_half_the_bytes(monkeypatch, random, features, heads):
    """Steps change by less than bfloat16's unit, 2^-8. Other calls use exact weights."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    exact, regular = pair(40, heads, features // heads, features, random=random)
    weights = regular.get_weights()
    exact.set_weights(weights)
    config = {**exact.get_config(), "weights_dtype": "bfloat16"}
    layer = ct.CoSiMultiHeadAttention.from_config(config)
    layer.build((None, 40, features))
    layer.set_weights(weights)
    for x in random.normal(size=(45, 2, features)).astype("float32"):
        expected, got = exact.call_step(x), layer.call_step(x)
        if expected is not None:
            assert 1e-5 < reference.relative_error(got, expected.numpy()) < 2**-8
    assert layer.weights[0].dtype == "float32"
    windows = random.normal(size=(2, 40, features)).astype("float32")
    np.testing.assert_array_equal(layer(windows), exact(windows))


def test_converted_weights_follow_when_told(monkeypatch, random, tmp_path):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial", weights_dtype="bfloat16"))
    x = random.normal(size=(1, E)).astype("float32")

    def peek():
        return layer.call_step(x, update_state=False).numpy()

    first = peek()
    doubled = [2 * w for w in layer.get_weights()]
    for weight, value in zip(layer.weights, doubled, strict=True):
        weight.assign(value)
    stale = peek()
    layer.convert_weights()
    fresh = peek()
    assert reference.relative_error(fresh, first) > 0.1
    # Biases are not converted, so the stale output has changed a little.
    assert reference.relative_error(stale, fresh) > 0.1
    layer.set_weights([w / 2 for w in doubled])
    np.testing.assert_array_equal(peek(), first)
    model = keras.Sequential([keras.Input((N, E)), layer])
    model.save_weights(tmp_path / "w.weights.h5")
    layer.set_weights(doubled)
    model.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(peek(), first)


def test_a_models_converted_weights_follow_when_told(monkeypatch, random):
    """A model's set_weights does not call its layers' set_weights, so the user converts."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layers = [
        ct.CoSiMultiHeadAttention(N, H, 4, warm_up="partial", weights_dtype="bfloat16"),
        ct.CoSiTransformerEncoder(N, E, H, 9, warm_up="partial", weights_dtype="bfloat16"),
        ct.TransformerEncoder(2, N, E, H, 9, warm_up="partial", weights_dtype="bfloat16"),
    ]
    x = random.normal(size=(1, E)).astype("float32")
    for layer in layers:
        inputs = keras.Input((N, E))
        model = keras.Model(inputs, layer(inputs))
        for _ in range(2):
            layer.call_step(x)
        model.set_weights([2 * random.normal(size=w.shape) for w in model.weights])
        ct.convert_weights(model)
        converted = layer.call_step(x, update_state=False).numpy()
        # Under a tape the step is several ops, which read the layer's own weights.
        with tf.GradientTape():
            expected = layer.call_step(x, update_state=False).numpy()
        assert reference.relative_error(converted, expected) < 0.1
        layer.set_weights([w / 2 for w in layer.get_weights()])
        halved = layer.call_step(x, update_state=False).numpy()
        with tf.GradientTape():
            expected = layer.call_step(x, update_state=False).numpy()
        assert reference.relative_error(halved, expected) < 0.1


@pytest.mark.parametrize(
    ("dtype", "weights_dtype"),
    [("float32", "float16"), ("float64", "bfloat16"), ("float32", "int8")],
)
def test_which_weights_there_are(dtype, weights_dtype):
    with pytest.raises(ValueError, match="weights_dtype"):
        ct.CoSiMultiHeadAttention(N, H, 4, dtype=dtype, weights_dtype=weights_dtype)


# Vector instructions.


def test_the_targets_are_named():
    names, in_use = ct.ops.cpu_targets()
    assert in_use in names
    assert set(names) <= {"AVX3", "AVX2", "SSE2", "NEON"}


def run_with_target(target, *arguments):
    environment = {**os.environ, "CONTINUAL_TRANSFORMERS_TARGET": target}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.cpu_only("it is about the CPU's instructions")
@pytest.mark.slow
def test_a_target_that_there_is_not_is_refused():
    step = (
        "import numpy as np, continual_transformers_tf as ct;"
        "ct.CoSiMultiHeadAttention(4, 2, 4).call_step(np.zeros((1, 8), 'float32'))"
    )
    result = run_with_target("AVX1024", "-c", step)
    assert result.returncode != 0
    assert "CONTINUAL_TRANSFORMERS_TARGET: expected one of the targets" in result.stderr
    assert "but got AVX1024" in result.stderr
    assert all(name in result.stderr for name in ct.ops.cpu_targets()[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", ct.ops.cpu_targets()[0][1:] if ct.ops.kernels() else [])
def test_every_target_passes_the_tests(target):
    """Run the kernels' and the layer's tests on every target; `make test` runs on the fastest."""
    here = Path(__file__).parent
    tests = [here / f"test_{name}.py" for name in ("single_output", "co_si_mha", "co_si_mha_step")]
    command = ["-m", "pytest", "-q", "-m", "not slow", "-k", "not tensorflow", *map(str, tests)]
    result = run_with_target(target, *command)
    assert result.returncode == 0, result.stdout[-3000:]


def test_steps_allocate_nothing_that_grows_with_the_window(monkeypatch, random):
    """Over many steps of a window of 16 MB, the process grows by less than one more window."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, _ = pair(65_536, 1, 32, 32, random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(1, 32)).astype("float32")

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    for _ in range(20):
        layer.call_step(x)
    before = resident()
    for _ in itertools.repeat(None, 200):
        layer.call_step(x)
    assert resident() - before < 8e6
    ring = layer.get_state(streams=[0])
    assert sum(array.nbytes for array in ring.values()) <= 1.02 * 65_536 * 64 * 4
