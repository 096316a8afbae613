"""Properties of every stream, for all sizes, masks and orders of calls, tested with Hypothesis."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import continual_transformers_tf as ct

pytestmark = pytest.mark.sampled(2, rest="slow")

# Every run has the same examples, so `make test-slow` takes more of them.
examples = pytest.mark.parametrize("examples", [3, pytest.param(40, marks=pytest.mark.slow)])


def check(holds, examples):
    """Check that a property holds for this many examples."""
    chosen = settings(deadline=None, max_examples=examples, derandomize=True, database=None)
    chosen(given(st.data())(holds))()


# The float32 bound for outputs computed in two ways. The same way gives equal outputs.
CLOSE = dict(rtol=2e-5, atol=2e-5)
# A product of several rows may differ from a product of one in a key's last bit, and so round
# it to another 16-bit number.
CLOSE_IN_HALVES = dict(rtol=2e-2, atol=2e-2)


def close(layer):
    return CLOSE if layer.get_config()["cache_dtype"] is None else CLOSE_IN_HALVES


@st.composite
def layers(draw):
    """Return a function that makes the same layer again and again, with clean streams."""
    seq_len = draw(st.integers(1, 9))
    options = dict(
        seq_len=seq_len,
        num_heads=draw(st.integers(1, 3)),
        key_dim=draw(st.sampled_from([1, 3, 8, 17])),
        value_dim=draw(st.sampled_from([None, 2, 16])),
        use_gate=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        query_index=draw(st.integers(-seq_len, seq_len - 1)),
        sliding_window=draw(st.sampled_from([None, 1, 4])),
        cache_dtype=draw(st.sampled_from([None, "bfloat16", "float16"])),
        warm_up="partial",
    )
    seed = draw(st.integers(0, 2**16))
    features = draw(st.integers(1, 5))

    def make():
        layer = ct.CoSiMultiHeadAttention(**options)
        layer.build((None, seq_len, features))
        random = np.random.default_rng(seed)
        layer.set_weights([random.normal(scale=0.5, size=w.shape) for w in layer.weights])
        layer.input_size = features
        return layer

    return make


@st.composite
def recordings(draw, layer, streams):
    """Draw x `[S, T, E]` and which steps have a key, `[S, T]`."""
    steps = draw(st.integers(1, 24))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    x = random.normal(size=(streams, steps, layer.input_size)).astype("float32")
    return x, random.random((streams, steps)) < draw(st.sampled_from([0.5, 1.0]))


def run(layer, x, has_key):
    """Return a call's outputs, `[M, T, E]`, with zeros before the first delayed query."""
    y = layer.call_steps(x, key_mask=has_key)
    outputs = np.zeros(x.shape, "float32")
    if y is not None:
        outputs[:, x.shape[1] - y.shape[1] :] = y
    return outputs


def portions(data, steps):
    """Draw lengths, each at least 1, that sum to `steps`."""
    lengths = []
    while sum(lengths) < steps:
        lengths.append(data.draw(st.integers(1, steps - sum(lengths))))
    return lengths


def equal_states(one, other):
    for name, array in one.get_state().items():
        np.testing.assert_array_equal(other.get_state()[name], array, err_msg=name)


@pytest.fixture(params=["fused", "tensorflow"], scope="module")
def backend(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", request.param)
        yield request.param


def steps_in_any_portions_are_one_call(data):
    make = data.draw(layers())
    one, other = make(), make()
    x, has_key = data.draw(recordings(one, 2))
    whole = run(one, x, has_key)
    parts, first = [], 0
    for length in portions(data, x.shape[1]):
        part = slice(first, first + length)
        parts.append(run(other, x[:, part], has_key[:, part]))
        first += length
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, **close(one))
    np.testing.assert_array_equal(one.position, other.position)


def streams_in_any_order_are_each_as_if_alone(data):
    make = data.draw(layers())
    together, count = make(), data.draw(st.integers(1, 4))
    x, has_key = data.draw(recordings(together, count))
    alone = [make() for _ in range(count)]
    together.ensure_streams(count)
    taken = [0] * count
    for _ in range(data.draw(st.integers(1, 12))):
        streams = data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))]
        streams = [s for s in streams if taken[s] < x.shape[1]]
        if not streams:
            continue
        rows = np.stack([x[s, taken[s]] for s in streams])[:, None]
        keys = np.stack([has_key[s, taken[s]] for s in streams])[:, None]
        got = together.call_steps(rows, key_mask=keys, streams=streams)
        for i, s in enumerate(streams):
            expected = alone[s].call_steps(rows[i : i + 1], key_mask=keys[i : i + 1])
            taken[s] += 1
            if expected is not None:
                np.testing.assert_allclose(got[i], expected[0], **close(together))
    np.testing.assert_array_equal(together.get_state()["position"], taken)


def saved_and_restored_at_any_step_is_no_interruption(data):
    make = data.draw(layers())
    layer, other = make(), make()
    x, has_key = data.draw(recordings(layer, 2))
    at = data.draw(st.integers(0, x.shape[1] - 1))
    if at:
        run(layer, x[:, :at], has_key[:, :at])
    else:
        layer.ensure_streams(2)
    other.ensure_streams(5)
    other.set_state(layer.get_state(streams=[1, 0]), streams=[4, 2])
    for t in range(at, x.shape[1]):
        step = slice(t, t + 1)
        expected = layer.call_steps(x[:, step], key_mask=has_key[:, step])
        got = other.call_steps(x[:, step], key_mask=has_key[:, step], streams=[2, 4])
        assert (got is None) == (expected is None)
        if got is not None:
            np.testing.assert_array_equal(got, expected)
    for name, array in other.get_state(streams=[2, 4]).items():
        np.testing.assert_array_equal(array, layer.get_state()[name])


def peeking_is_the_next_step(data):
    make = data.draw(layers())
    layer, untouched = make(), make()
    x, has_key = data.draw(recordings(layer, 2))
    for t in range(min(4, x.shape[1])):
        step = slice(t, t + 1)
        peek = layer.call_steps(x[:, step], key_mask=has_key[:, step], update_state=False)
        if t:
            equal_states(layer, untouched)
        real = layer.call_steps(x[:, step], key_mask=has_key[:, step])
        untouched.call_steps(x[:, step], key_mask=has_key[:, step])
        assert (peek is None) == (real is None)
        if real is not None:
            np.testing.assert_array_equal(peek, real)


def fused_is_plain(data):
    make = data.draw(layers())
    x, has_key = data.draw(recordings(make(), 2))
    lengths = portions(data, x.shape[1])
    results = []
    for backend in ("fused", "tensorflow"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
            layer, outputs, first = make(), [], 0
            for length in lengths:
                part = slice(first, first + length)
                outputs.append(layer.call_steps(x[:, part], key_mask=has_key[:, part]))
                first += length
            results.append((layer, [y for y in outputs if y is not None]))
    (fused, got), (plain, expected) = results
    for y, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(y, other, **CLOSE)
    for name, array in fused.get_state().items():
        written = tf.cast(array, "float32"), tf.cast(plain.get_state()[name], "float32")
        np.testing.assert_array_equal(*written)


@pytest.mark.usefixtures("backend")
@examples
def test_steps_in_any_portions_are_one_call(examples):
    check(steps_in_any_portions_are_one_call, examples)


@pytest.mark.usefixtures("backend")
@examples
def test_streams_in_any_order_are_each_as_if_alone(examples):
    check(streams_in_any_order_are_each_as_if_alone, examples)


@pytest.mark.usefixtures("backend")
@examples
def test_saved_and_restored_at_any_step_is_no_interruption(examples):
    check(saved_and_restored_at_any_step_is_no_interruption, examples)


@pytest.mark.usefixtures("backend")
@examples
def test_peeking_is_the_next_step(examples):
    check(peeking_is_the_next_step, examples)


@examples
def test_fused_is_plain(examples):
    check(fused_is_plain, examples)
