"""Single-output attention refuses what does not fit, and then changes nothing."""

import numpy as np
import pytest
import tensorflow as tf

from continual_transformers_tf.ops import AttentionCache, single_output_attention
from errors import BAD_INPUT
from single_output_cases import BAD, GOOD, cache_at
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_changes_nothing(backend, random, what):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    before = cache.get_state()
    with pytest.raises(BAD_INPUT) as error:
        single_output_attention(**{**GOOD, **BAD[what]}, cache=cache)
    message = str(error.value).lower()
    assert any(word in message for word in ("expected", "requested", "must be"))
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    single_output_attention(**GOOD, cache=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", tf.Variable(tf.zeros([3, 5, 3, 9]))),
        ("values", tf.Variable(tf.zeros([3, 6, 3, 6]))),
        ("values", tf.Variable(tf.zeros([3, 5, 3, 6], tf.float64))),
        ("keys", tf.Variable(tf.zeros([3, 3, 5, 8]))),
        ("values", tf.Variable(tf.zeros([3, 3, 5, 6]))),
        ("keys", tf.Variable(tf.zeros([3, 5, 8]))),
        ("position", tf.Variable(tf.zeros([2], tf.int64))),
    ],
)
def test_a_cache_of_another_shape_is_refused(monkeypatch, name, value):
    """The op itself refuses such a shape, which an `AttentionCache` cannot have."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache = AttentionCache(3, 3, 5, 8, 6)
    setattr(cache, name, value)
    with pytest.raises(BAD_INPUT, match="(?i)expected|shape"):
        single_output_attention(**GOOD, cache=cache)


@pytest.mark.cpu_only("positions are not looked at on a GPU")
def test_a_position_near_the_end_of_63_bits_is_refused(monkeypatch, random):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    state = cache.get_state()
    state["position"][1] = 2**63 - 1
    cache.set_state(state)
    with pytest.raises(tf.errors.InvalidArgumentError, match="63 bits"):
        single_output_attention(**GOOD, cache=cache)
    np.testing.assert_array_equal(cache.position, [3, 2**63 - 1, 2])


@pytest.mark.parametrize(
    "what", ["mask of other rows", "steps of key", "rows of value", "no steps", "streams too few"]
)
def test_a_graph_with_unknown_sizes_checks_them_when_it_runs(backend, random, what):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    before = cache.get_state()

    @traced(
        input_signature=[
            tf.TensorSpec([None, None, 3, 8]),
            tf.TensorSpec([None, None, 3, 8]),
            tf.TensorSpec([None, None, 3, 6]),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, 5], tf.bool),
        ]
    )
    def step(query, key, value, streams, mask):
        return single_output_attention(
            query, key, value, cache, streams=streams, attention_mask=mask
        )

    good = {**GOOD, "attention_mask": np.ones((2, 5), bool)}
    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
        step(*{**good, **BAD[what]}.values())
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert step(*good.values()).shape == (2, 1, 3, 6)


def test_shapes_are_checked_while_tracing(backend):
    cache = AttentionCache(2, 3, 5, 8, 6)

    @traced
    def step(query, key, value):
        return single_output_attention(query, key, value, cache, streams=[0, 1])

    good = [GOOD[name] for name in ("query", "key", "value")]
    assert step.get_concrete_function(*good).output_shapes == (2, 1, 3, 6)
    for i, shape in ((0, (2, 1, 4, 8)), (1, (2, 1, 3, 9)), (2, (2, 2, 3, 6)), (0, (2, 0, 3, 8))):
        bad = list(good)
        bad[i] = np.zeros(shape, np.float32)
        with pytest.raises(ValueError, match="(?i)expected|must be equal|compatible"):
            step.get_concrete_function(*bad)
