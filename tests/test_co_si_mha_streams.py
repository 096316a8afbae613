"""The streams of CoSiMultiHeadAttention: their ages and state, in eager mode and in graphs."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import E, N, newest_of_windows, pair
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")


def test_streams_of_different_ages_in_any_order(backend, random):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(5)
    history = [[] for _ in range(5)]
    for _ in range(25):
        streams = random.permutation(5)[: random.integers(1, 5)]
        x = random.normal(size=(len(streams), E)).astype("float32")
        output = layer.call_step(x, streams=streams)
        for row, stream in enumerate(streams):
            history[stream].append(x[row])
            window = np.stack(history[stream][-N:])[None]
            expected = regular(window, window)[0, -1].numpy()
            assert reference.relative_error(output[row], expected) < 1e-5
    np.testing.assert_array_equal(layer.ready, [len(h) >= N for h in history])
    layer.clean_state(streams=[3])
    history[3] = []
    np.testing.assert_array_equal(layer.ready, [len(h) >= N for h in history])


def test_warm_up_none_with_streams_of_different_ages(backend, random):
    """A step gives None while no stream of the call is ready. `ready` says which are."""
    layer, _ = pair(random=random)
    layer.ensure_streams(2)
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    layer.call_steps(x[:1, :N], streams=[0])
    assert layer.call_step(x[1:, 0], streams=[1]) is None
    assert layer.call_step(x[:, 1]).shape == (2, E)
    np.testing.assert_array_equal(layer.ready, [True, False])
    layer.clean_state(streams=[0])
    assert layer.call_step(x[:, 2]) is None
    # Stream 1 is the oldest: it takes its steps 4, ..., N + 2, and three of them end a full window.
    assert layer.call_steps(x[:, : N - 1]).shape == (2, 3, E)


def test_more_rows_are_more_streams(backend, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(3, N + 1, E)).astype("float32")
    layer.call_steps(x[:1, :-1])
    layer.ensure_streams(3)
    layer.call_steps(x[1:, :-1], streams=[1, 2])
    expected = newest_of_windows(regular, x, N)
    assert reference.relative_error(layer.call_step(x[:, -1]), expected[:, -1]) < 5e-6


def test_peeking_with_and_without_prior_state(backend, random):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, 3, E)).astype("float32")
    peek = layer.call_step(x[:, 0], update_state=False)
    np.testing.assert_array_equal(layer.get_state()["position"], [0, 0])
    np.testing.assert_array_equal(layer.call_step(x[:, 0]), peek)
    peek = layer.call_steps(x[:, 1:], update_state=False)
    np.testing.assert_array_equal(layer.call_steps(x[:, 1:]), peek)
    strict, _ = pair(random=random)
    for t in range(N - 1):
        assert strict.call_step(x[:, 0]) is None
        assert (strict.call_step(x[:, 0], update_state=False) is None) == (t + 1 < N - 1)


def test_state_goes_on_in_another_layer_bit_for_bit(backend, random):
    layer, _ = pair(random=random)
    x = random.normal(size=(2, N + 4, E)).astype("float32")
    layer.call_steps(x[:, : N + 1])
    other, _ = pair(random=random)
    other.set_weights(layer.get_weights())
    other.set_state(layer.get_state())
    for t in range(N + 1, N + 4):
        np.testing.assert_array_equal(other.call_step(x[:, t]), layer.call_step(x[:, t]))
    with pytest.raises(ValueError, match="Expected"):
        other.set_state({"position": 3})


def test_partial_warm_up_equals_regular_attention_on_the_shorter_sequence(backend, random):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, N + 2, E)).astype("float32")
    for t in range(N + 2):
        window = x[:, max(0, t - N + 1) : t + 1]
        expected = regular(window, window)[:, -1].numpy()
        assert reference.relative_error(layer.call_step(x[:, t]), expected) < 5e-6
        np.testing.assert_array_equal(layer.ready, [t >= N - 1] * 2)
    layer.clean_state()
    together = layer.call_steps(x)
    assert together.shape == (2, N + 2, E)
    assert reference.relative_error(together[:, -1], expected) < 5e-6


@pytest.mark.slow
def test_100_000_steps_show_no_drift_and_no_growth_of_memory(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial", query_index=-2))
    x = random.normal(size=(2, 1000, E)).astype("float32")
    steps = traced(layer.call_steps)
    resident = []
    for i in range(100):
        for t in range(0, 1000, 50):
            outputs = steps(tf.constant(x[:, t : t + 50]))
        for t in range(5):
            layer.call_step(x[:, t], update_state=False)  # Eager calls must not leak memory either.
        if i in (9, 99):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    np.testing.assert_array_equal(layer.position, [100_000] * 2)
    windows = [x[:, 1000 - N - i : 1000 - i] for i in range(20)]
    expected = np.stack([regular(w, w)[:, -2] for w in windows[::-1]], 1)
    assert reference.relative_error(outputs[:, -20:], expected) < 5e-6
    assert resident[1] - resident[0] < 4e6, resident


@pytest.mark.parametrize("of_all", [ct.clean_state, ct.convert_weights])
def test_what_is_no_model_is_named(of_all):
    with pytest.raises(ValueError, match="Expected a Keras model or layer, but got None"):
        of_all(None)
    with pytest.raises(ValueError, match="Expected a Keras model or layer, but got None"):
        ct.ensure_streams(None, 3)
