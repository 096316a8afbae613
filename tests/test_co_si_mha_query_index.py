"""CoSiMultiHeadAttention with the output of an older step's query."""

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import E, H, N, pair
from errors import BAD_INPUT
from traced import traced

pytestmark = pytest.mark.sampled(9)


def expected_rows(regular, x, index, **kwargs):
    """Return the regular layer's row at `index` of each full window of x [B, T, E].

    The result is [B, T - N + 1, E].
    """
    windows = reference.sliding_windows(x.swapaxes(0, 1), N).transpose(2, 0, 1, 3)  # [B, T', N, E]
    flat = windows.reshape(-1, N, E)  # One call for all windows is faster.
    return regular(flat, flat, **kwargs)[:, index].numpy().reshape(len(x), -1, E)


MIXED = [3, 1, 7, 9]
# Single steps fill the window and replace it once; the other calls go on for longer. N - 1 means
# the same as -1, and -N the same as 0 (test_delay_and_receptive_field), so `make test` takes only
# one kind of call with them.
LENGTHS = ([1] * (2 * N + 1), MIXED, [20])
CALLS = [(i, lengths) for i in (0, 2, -1, -2) for lengths in LENGTHS]
CALLS += [
    pytest.param(i, lengths, marks=() if lengths is MIXED else pytest.mark.slow)
    for i in (N - 1, -N)
    for lengths in LENGTHS
]


@pytest.mark.parametrize(("index", "lengths"), CALLS, ids=str)
@pytest.mark.parametrize("options", [{}, dict(use_gate=True), dict(sliding_window=2)], ids=str)
def test_equals_the_regular_layers_row(backend, random, index, options, lengths):
    layer, regular = pair(random=random, layer_options=dict(query_index=index), **options)
    x = random.normal(size=(2, sum(lengths), E)).astype("float32")
    expected = expected_rows(regular, x, index)
    assert reference.relative_error(layer(x[:, :N])[:, 0], expected[:, 0]) < 5e-6
    outputs, first = [], 0
    for length in lengths:
        steps = x[:, first : first + length]
        first += length
        peek = layer.call_steps(steps, update_state=False)
        output = layer.call_steps(steps)
        if output is None:
            assert peek is None
        else:
            np.testing.assert_array_equal(peek, output)
            outputs.append(output)
    assert reference.relative_error(np.concatenate(outputs, 1), expected) < 5e-6


def test_delay_and_receptive_field():
    for index, delay in ((-1, 0), (-2, 1), (-N, N - 1), (0, N - 1), (2, N - 3), (N - 1, 0)):
        layer = ct.CoSiMultiHeadAttention(N, H, 4, query_index=index)
        assert (layer.delay, layer.receptive_field) == (delay, N)
        assert layer.get_config()["query_index"] == index


@pytest.mark.parametrize("in_graph", [False, True])
def test_partial_warm_up_begins_with_the_first_query(backend, random, in_graph):
    """Once that query has come, a step gives its row in the shorter sequence."""
    layer, regular = pair(random=random, layer_options=dict(query_index=-3, warm_up="partial"))
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    # Without AutoGraph, it is traced in half the time.
    step = tf.function(layer.call_step, autograph=False) if in_graph else layer.call_step
    for t in range(N + 3):
        output = step(tf.constant(x[:, t]))
        if t < 2:
            if in_graph:  # The query attends to nothing: the output is the projection's bias.
                bias = np.tile(regular.get_weights()[-1], (2, 1))
                np.testing.assert_allclose(output, bias, rtol=1e-6)
            else:
                assert output is None
            continue
        window = x[:, max(0, t - N + 1) : t + 1]
        assert reference.relative_error(output, regular(window, window)[:, -3].numpy()) < 5e-6
    layer.clean_state()
    assert layer.call_steps(x).shape == (2, N + 1, E)


def test_masks(backend, random):
    """The causal mask hides the steps after the query. A query mask stays with its query."""
    layer, regular = pair(random=random, layer_options=dict(query_index=-3))
    x = random.normal(size=(2, N + 4, E)).astype("float32")
    expected = expected_rows(regular, x, -3, use_causal_mask=True)
    assert reference.relative_error(layer.call_steps(x, use_causal_mask=True), expected) < 5e-6
    causal = layer(x[:, :N], use_causal_mask=True)
    assert reference.relative_error(causal[:, 0], expected[:, 0]) < 5e-6

    layer.clean_state()
    query_mask = np.ones((2, N + 4), bool)
    query_mask[1, N] = False
    outputs = layer.call_steps(x, query_mask=query_mask).numpy()
    expected = expected_rows(regular, x, -3)
    # Step N's query has its output two steps later.
    expected[1, N - (N - 3)] = regular.get_weights()[-1]
    assert reference.relative_error(outputs, expected) < 5e-6


def test_streams_of_different_ages_and_state_that_moves(backend, random):
    layer, regular = pair(random=random, layer_options=dict(query_index=1, use_gate=False))
    other, _ = pair(random=random, layer_options=dict(query_index=1))
    other.set_weights(layer.get_weights())
    layer.ensure_streams(3)
    history = [[] for _ in range(3)]
    for i in range(40):
        streams = random.permutation(3)[: random.integers(1, 4)]
        x = random.normal(size=(len(streams), E)).astype("float32")
        output = layer.call_step(x, streams=streams)
        for row, stream in enumerate(streams):
            history[stream].append(x[row])
            if len(history[stream]) >= N:
                window = np.stack(history[stream][-N:])[None]
                expected = regular(window, window)[0, 1].numpy()
                assert reference.relative_error(output[row], expected) < 1e-5
        if i == 25:
            other.set_state(layer.get_state())
            layer = other
    layer.clean_state(streams=[1])
    assert layer.call_step(x[:1], streams=[1]) is None


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_gate_that_waited_is_forgotten_with_its_stream(backend, random, in_graph):
    """Even a NaN is forgotten: before the first query's turn, no gate multiplies the output."""
    layer_options = dict(query_index=0, warm_up="partial")
    layer, regular = pair(random=random, use_gate=True, layer_options=layer_options)
    layer.call_steps(np.full((1, 2 * N, E), np.nan, np.float32))
    layer.clean_state()
    # Without AutoGraph, it is traced in half the time.
    step = tf.function(layer.call_step, autograph=False) if in_graph else layer.call_step
    x = random.normal(size=(1, N, E)).astype("float32")
    outputs = [step(tf.constant(x[:, t])) for t in range(N)]
    assert all(np.isfinite(output).all() for output in outputs if output is not None)
    assert reference.relative_error(outputs[-1], regular(x, x)[:, 0].numpy()) < 5e-6


def test_too_few_streams_are_named(backend, random):
    layer, _ = pair(random=random, layer_options=dict(query_index=0, warm_up="partial"))
    layer.ensure_streams(3)
    x = random.normal(size=(3, E)).astype("float32")
    for streams in ([0], [0, 1]):
        with pytest.raises(BAD_INPUT, match="Expected 3 streams|expected streams of shape"):
            layer.call_step(x, streams=streams)
        step = traced(
            lambda x, streams: layer.call_step(x, streams=streams),
            input_signature=[tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)],
        )
        with pytest.raises(BAD_INPUT, match="Expected as many streams|expected streams of shape"):
            step(x, tf.constant(streams))
    np.testing.assert_array_equal(layer.position, [0, 0, 0])


@pytest.mark.parametrize("what", [dict(streams=[0, 5]), dict(attention_mask=np.ones(N + 1, bool))])
def test_a_failing_call_leaves_the_waiting_queries(backend, random, what):
    layer, _ = pair(random=random, layer_options=dict(query_index=0, warm_up="partial"))
    x = random.normal(size=(2, E)).astype("float32")
    layer.call_step(x)
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(x, **what)
    graph = traced(lambda x: layer.call_step(x, **what))
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        graph(tf.constant(x))
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("index", [N, -N - 1, 1.5, None])
def test_an_index_outside_the_window_is_refused(index):
    with pytest.raises(ValueError, match="query_index"):
        ct.CoSiMultiHeadAttention(N, H, 4, query_index=index)


@pytest.mark.parametrize("index", [4, -5])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_without_such_a_query_is_refused(random, index, causal):
    layer, _ = pair(random=random, layer_options=dict(query_index=index))
    with pytest.raises(ValueError, match=f"step {index}, query_index, but got 3 steps"):
        layer(np.zeros((1, 3, E), np.float32), use_causal_mask=causal)
    x = random.normal(size=(1, N, E)).astype("float32")
    graph = traced(
        lambda x: layer(x, use_causal_mask=causal),
        input_signature=[tf.TensorSpec([None, None, E])],
    )
    np.testing.assert_allclose(graph(x), layer(x, use_causal_mask=causal), rtol=1e-5, atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"step {index}, query_index"):
        graph(x[:, :3])
