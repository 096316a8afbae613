"""Masks in steps of CoSiMultiHeadAttention, over the window and for the steps themselves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, pair
from traced import traced

pytestmark = pytest.mark.sampled(4, rest="slow")


@pytest.mark.parametrize("mask_rank", [1, 2, 3])
def test_attention_mask_in_a_step(backend, random, mask_rank):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    mask = random.random({1: (N,), 2: (2, N), 3: (2, H, N)}[mask_rank]) < 0.6
    layer.call_steps(x[:, :-1])
    output = layer.call_step(x[:, -1], attention_mask=mask)
    full = {1: (None, None, None), 2: (slice(None), None, None), 3: (..., None, slice(None))}
    full = np.broadcast_to(mask[full[mask_rank]], (2, H, N, N))
    expected = regular(x, x, attention_mask=full)[:, -1].numpy()
    assert reference.relative_error(output, expected) < 5e-6


def test_attention_mask_of_several_steps(backend, random):
    """A `[M, H, T, N]` mask has a row for each step. A narrower sliding window still applies."""
    layer, regular = pair(random=random, sliding_window=4)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    mask = random.random((2, H, N + 3, N)) < 0.7
    outputs = layer.call_steps(x, attention_mask=mask)
    for i in range(4):
        full = np.broadcast_to(mask[:, :, N - 1 + i, None], (2, H, N, N))
        window = x[:, i : i + N]
        expected = regular(window, window, attention_mask=full)[:, -1].numpy()
        assert reference.relative_error(outputs[:, i], expected) < 5e-6


def run_with_gaps(layer, x, has_key, name, lengths):
    outputs, first = [], 0
    for length in lengths:
        steps = slice(first, first + length)
        first += length
        if length == 1:
            output = layer.call_step(x[:, steps.start], **{name: has_key[:, steps.start]})
            outputs.append(None if output is None else output[:, None])
        else:
            outputs.append(layer.call_steps(x[:, steps], **{name: has_key[:, steps]}))
    return np.concatenate([output for output in outputs if output is not None], 1)


@pytest.mark.parametrize("lengths", [[1] * 25, [4, 1, 9, 11], [25]], ids=str)
@pytest.mark.parametrize("name", ["key_mask", "value_mask"])
def test_a_gap_in_a_recording_does_no_harm(backend, random, name, lengths):
    """A step without a key acts like a step that Keras' layer masks, in every window."""
    layer, regular = pair(random=random)
    x = random.normal(size=(3, 25, E)).astype("float32")
    has_key = random.random((3, 25)) < 0.7
    got = run_with_gaps(layer, x, has_key, name, lengths)
    for i in range(25 - N + 1):
        window, mask = x[:, i : i + N], has_key[:, i : i + N]
        expected = regular(window, window, key_mask=tf.constant(mask))[:, -1].numpy()
        some = mask.any(1)  # Where everything is masked, Keras attends evenly.
        assert reference.relative_error(got[some, i], expected[some]) < 5e-6
        bias = np.broadcast_to(layer.get_weights()[-1], expected[~some].shape)
        np.testing.assert_allclose(got[~some, i], bias, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gap_may_hold_anything_and_stays_in_no_window(backend, random, bad):
    """The gap's values affect only the gap's own output, through its query."""
    clean, _ = pair(random=random)
    x = random.normal(size=(2, 3 * N, E)).astype("float32")
    has_key = np.ones((2, 3 * N), bool)
    has_key[0, N + 1] = False
    expected = run_with_gaps(clean, x, has_key, "key_mask", [1] * 3 * N)
    clean.clean_state()
    spoilt = x.copy()
    spoilt[0, N + 1] = bad
    got = run_with_gaps(clean, spoilt, has_key, "key_mask", [1] * 3 * N)
    assert np.isnan(got[0, 2]).all()
    got[0, 2] = expected[0, 2]
    np.testing.assert_array_equal(got, expected)


def test_a_query_mask_attends_to_nothing(backend, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    layer.call_steps(x[:, :-1])
    query_mask = np.array([True, False])
    output, scores = layer.call_step(x[:, -1], query_mask=query_mask, return_attention_scores=True)
    expected = regular(x, x)[:, -1].numpy()
    assert reference.relative_error(output[0], expected[0]) < 5e-6
    np.testing.assert_allclose(output[1], layer.get_weights()[-1], rtol=1e-6)
    np.testing.assert_array_equal(scores[1], np.zeros((H, N)))
    # A query mask hides only the query: the step still has a key.
    layer.call_step(x[:, 0])
    whole = np.concatenate([x[:, 1:], x[:, :1]], 1)
    peek = layer.call_step(x[:, 1], update_state=False)
    whole = np.concatenate([whole[:, 1:], x[:, 1:2]], 1)
    assert reference.relative_error(peek, regular(whole, whole)[:, -1].numpy()) < 5e-6


def test_a_causal_mask_hides_nothing_from_the_newest(backend, random):
    layer, regular = pair(random=random)
    x = random.normal(size=(2, N + 2, E)).astype("float32")
    steps = layer.call_steps(x, use_causal_mask=True)
    expected = regular(x[:, 2:], x[:, 2:], use_causal_mask=True)[:, -1].numpy()
    assert reference.relative_error(steps[:, -1], expected) < 5e-6


@pytest.mark.parametrize("mode", ["regular", "steps"])
def test_the_masks_of_keras_are_heeded(backend, random, mode):
    """A Masking layer before the attention makes gaps, in windows and in steps."""
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, N, E)).astype("float32")
    x[:, :2] = x[1, 3] = 0
    masked = keras.layers.Masking()(x)
    expected = regular(masked, masked)[:, -1].numpy()
    with ct.call_mode(mode):
        output = layer(keras.layers.Masking()(x))
    assert reference.relative_error(output[:, -1], expected) < 5e-6


def test_a_mask_of_the_query_is_that_of_the_newest_row(random):
    x = random.normal(size=(2, N, E)).astype("float32")
    x[0, :2] = 0
    layer, _ = pair(random=random)
    output = layer(keras.layers.Masking()(x))
    assert keras.src.backend.get_keras_mask(output).shape == (2, 1)
    assert keras.layers.LSTM(3)(output).shape == (2, 3)


@pytest.mark.parametrize("mode", ["step", "steps"])
def test_a_masked_step_that_warms_up_is_none_and_harms_no_other_call(backend, random, mode):
    layer, _ = pair(random=random, layer_options=dict(call_mode=mode))
    x = random.normal(size=(2, E) if mode == "step" else (2, 2, E)).astype("float32")
    assert layer(keras.layers.Masking()(x)) is None
    output, scores = layer(keras.layers.Masking()(x), return_attention_scores=True)
    assert output is scores is None
    assert keras.src.backend.get_keras_mask(None) is None
    taken = 2 if mode == "step" else 4
    np.testing.assert_array_equal(layer.position, [taken, taken])


def test_the_mask_of_steps_is_that_of_the_steps_that_are_given(backend, random):
    """Masks pass through several layers. Each has one entry for each step with an output."""
    options = dict(single_output=False, call_mode="steps")
    first, second = (pair(random=random, layer_options=options)[0] for _ in range(2))
    x = random.normal(size=(2, 3 * N, E)).astype("float32")
    x[:, N + 2] = x[1, 2 * N] = 0
    mask = (x != 0).any(-1)

    output = second(first(keras.layers.Masking()(x)))
    np.testing.assert_array_equal(output._keras_mask, mask[:, 2 * (N - 1) :])
    first.clean_state()
    second.clean_state()
    expected = first.call_steps(x, key_mask=mask)
    expected = second.call_steps(expected, key_mask=mask[:, N - 1 :]).numpy()
    assert reference.relative_error(output, expected) < 5e-6

    @traced(input_signature=[tf.TensorSpec([None, None, E])])
    def graph(x):
        return first(keras.layers.Masking()(x))._keras_mask

    np.testing.assert_array_equal(graph(x), mask)
    with ct.call_mode("step"):
        step = first(keras.layers.Masking()(x[:, N + 2]))
    np.testing.assert_array_equal(step._keras_mask, [False, False])


def test_the_methods_of_steps_heed_the_masks_that_they_are_given(random):
    layer, _ = pair(random=random)
    x = random.normal(size=(2, N, E)).astype("float32")
    x[:, :2] = 0
    output = layer.call_steps(keras.layers.Masking()(x))
    layer.clean_state()
    np.testing.assert_array_equal(output, layer.call_steps(x))


def test_with_a_delay_steps_carry_no_mask(random):
    """The outputs belong to older steps, so the newest steps' mask would not fit them."""
    options = dict(query_index=-3, warm_up="partial", call_mode="steps")
    layer, _ = pair(random=random, layer_options=options)
    x = random.normal(size=(2, N, E)).astype("float32")
    assert keras.src.backend.get_keras_mask(layer(keras.layers.Masking()(x))) is None


def test_masks_in_a_graph_of_unknown_sizes(backend, random):
    layer, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    other, _ = pair(random=random, layer_options=dict(warm_up="partial"))
    other.set_weights(layer.get_weights())
    x = random.normal(size=(2, 9, E)).astype("float32")
    mask, has_key = random.random((2, N)) < 0.7, random.random((2, 9)) < 0.7

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, E]),
            tf.TensorSpec([None, N], tf.bool),
            tf.TensorSpec([None, None], tf.bool),
        ]
    )
    def steps(x, mask, has_key):
        return layer.call_steps(x, attention_mask=mask, key_mask=has_key)

    expected = other.call_steps(x, attention_mask=mask, key_mask=has_key).numpy()
    assert reference.relative_error(steps(x, mask, has_key), expected) < 5e-6
    before = layer.get_state()
    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
        steps(x, mask, has_key[:, :4])
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])


def test_memory_of_masks_is_part_of_the_state(random):
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    layer.call_steps(np.ones((1, 3, E), np.float32), key_mask=np.array([[True, False, True]]))
    np.testing.assert_array_equal(layer.get_state()["key_mask"][0, :3], [True, False, True])
