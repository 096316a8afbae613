"""Retroactive attention refuses what does not fit, and then changes nothing."""

import numpy as np
import pytest
import tensorflow as tf

from continual_transformers_tf.ops import RetroactiveCache, retroactive_attention
from errors import BAD_INPUT
from retroactive_cases import BAD, GOOD, cache_at
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_changes_nothing(backend, random, what):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    retroactive_attention(**GOOD, cache=cache)
    before = cache.get_state()
    with pytest.raises(BAD_INPUT) as error:
        retroactive_attention(**{**GOOD, **BAD[what]}, cache=cache)
    message = str(error.value).lower()
    assert any(word in message for word in ("expected", "requested", "must be"))
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    retroactive_attention(**GOOD, cache=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", tf.Variable(tf.zeros([3, 5, 3, 9]))),
        ("queries", tf.Variable(tf.zeros([3, 5, 3, 9]))),
        ("queries", tf.Variable(tf.zeros([2, 5, 3, 8]))),
        ("queries", tf.Variable(tf.zeros([3, 5, 3, 8], tf.float64))),
        ("queries", tf.Variable(tf.zeros([3, 3, 5, 8]))),
        ("values", tf.Variable(tf.zeros([3, 6, 3, 6]))),
        ("softmax", tf.Variable(tf.zeros([3, 3, 3, 5], tf.float64))),
        ("softmax", tf.Variable(tf.zeros([3, 3, 4, 5]))),
        ("weighted_sum", tf.Variable(tf.zeros([3, 3, 5, 7], tf.float64))),
        ("made_with", tf.Variable(tf.zeros([3], tf.float64))),
        ("made_with", tf.Variable(tf.zeros([2, 2], tf.float64))),
        ("position", tf.Variable(tf.zeros([2], tf.int64))),
    ],
)
def test_a_cache_of_another_shape_is_refused(monkeypatch, name, value):
    """The op itself refuses such a shape, which a `RetroactiveCache` cannot have."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    cache = RetroactiveCache(3, 3, 5, 8, 6)
    setattr(cache, name, value)
    with pytest.raises(BAD_INPUT, match="(?i)expected|shape"):
        retroactive_attention(**GOOD, cache=cache)
    step = traced(lambda: retroactive_attention(**GOOD, cache=cache))
    with pytest.raises(BAD_INPUT, match="(?i)expected|shape|dim"):
        step()


@pytest.mark.parametrize("what", ["steps of key", "rows of value", "no steps", "streams too few"])
def test_a_graph_with_unknown_sizes_checks_them_when_it_runs(backend, random, what):
    cache, _ = cache_at([3, 9, 2], 3, 5, 8, 6, "float32", random)
    before = cache.get_state()

    @traced(
        input_signature=[
            tf.TensorSpec([None, None, 3, 8]),
            tf.TensorSpec([None, None, 3, 8]),
            tf.TensorSpec([None, None, 3, 6]),
            tf.TensorSpec([None], tf.int32),
        ]
    )
    def step(query, key, value, streams):
        return retroactive_attention(query, key, value, cache, streams=streams)

    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)expected"):
        step(*{**GOOD, **BAD[what]}.values())
    for name, array in cache.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert step(*GOOD.values()).shape == (2, 1, 3, 5, 6)


def test_shapes_are_checked_while_tracing(backend):
    cache = RetroactiveCache(2, 3, 5, 8, 6)

    @traced
    def step(query, key, value):
        return retroactive_attention(query, key, value, cache, streams=[0, 1])

    good = [GOOD[name] for name in ("query", "key", "value")]
    assert step.get_concrete_function(*good).output_shapes == (2, 1, 3, 5, 6)
    for i, shape in ((0, (2, 1, 4, 8)), (1, (2, 1, 3, 9)), (2, (2, 2, 3, 6)), (0, (2, 0, 3, 8))):
        bad = list(good)
        bad[i] = np.zeros(shape, np.float32)
        with pytest.raises(ValueError, match="(?i)expected|must be equal|compatible"):
            step.get_concrete_function(*bad)


@pytest.mark.parametrize(
    "options",
    [dict(seq_len=0), dict(key_dim=2.5), dict(dtype="bfloat16"), dict(dtype="int32")],
    ids=str,
)
def test_bad_caches(options):
    with pytest.raises(ValueError, match="Expected"):
        RetroactiveCache(**{**dict(streams=1, num_heads=1, seq_len=2, key_dim=3), **options})
