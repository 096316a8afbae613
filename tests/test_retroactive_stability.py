"""Retroactive attention where the published update fails: large logits, departing peaks, time."""

import numpy as np
import pytest
import tensorflow as tf

import reference
from continual_transformers_tf.ops import RetroactiveCache, retroactive_attention
from published_retroactive import PublishedUpdate, naive_attention
from retroactive_cases import expected_of, steps_of
from traced import traced

pytestmark = pytest.mark.sampled(4, rest="slow")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")


def streamed(inputs, n, algorithm="update", dtype="float32", steps_per_call=100):
    """Return the outputs [T, N, Dv] of one head and one stream; inputs [T, D], [T, D], [T, Dv]."""
    cache = RetroactiveCache(1, 1, n, inputs[0].shape[-1], inputs[2].shape[-1], dtype)
    inputs = [x[None, :, None].astype(dtype) for x in inputs]
    outputs = [
        retroactive_attention(
            *(x[:, t : t + steps_per_call] for x in inputs), cache, algorithm=algorithm
        )
        for t in range(0, inputs[0].shape[1], steps_per_call)
    ]
    return np.concatenate(outputs, 1)[0, :, 0]


def errors_at(steps, inputs, outputs, n):
    """Return the largest error of these steps, and that of a naive implementation in their type."""
    errors = []
    for t in steps:
        window = [x[t - n + 1 : t + 1] for x in inputs]
        expected = naive_attention(*(x.astype("float64") for x in window))
        of = [outputs[t], naive_attention(*window)]
        errors.append([reference.relative_error(output, expected) for output in of])
    return np.max(errors, 0)  # NaN if there is a NaN.


def logits_of(std, steps, key_dim, random):
    """Return float32 queries, keys and values whose logits have this standard deviation."""
    query, key = random.normal(scale=std**0.5, size=(2, steps, key_dim)).astype("float32")
    return query, key, random.normal(size=(steps, key_dim)).astype("float32")


@pytest.mark.parametrize("algorithm", ["update", "recompute"])
@pytest.mark.parametrize("std", [1, 4, 9, 16, 36])
@pytest.mark.parametrize("n", [16, 64])
def test_logits_of_any_size(random, n, std, algorithm):
    """Outputs are as exact as recomputed ones. The published update is not, from 9 on."""
    inputs = logits_of(std, 1000, 64, random)
    outputs = streamed(inputs, n, algorithm)
    error, naive_error = errors_at(range(n - 1, 1000, 7), inputs, outputs, n)
    assert error <= max(2 * naive_error, 5e-6)

    published = PublishedUpdate(*(x[:n] for x in inputs))
    steps = [published.step(*(x[t] for x in inputs)) for t in range(n, 200)]
    with np.errstate(all="ignore"):
        published_error, _ = errors_at(
            range(n, 200), inputs, {t: steps[t - n] for t in range(n, 200)}, n
        )
    assert std < 9 or not published_error < 0.01


@pytest.mark.parametrize("std", [1, 4, 16, 36])
def test_logits_of_any_size_in_double(random, std):
    inputs = [x.astype("float64") for x in logits_of(std, 600, 16, random)]
    n = 64
    outputs = streamed(inputs, n, dtype="float64")
    error, naive_error = errors_at(range(n - 1, 600, 7), inputs, outputs, n)
    assert error <= max(2 * naive_error, 1e-12)


@pytest.mark.parametrize("largest", [1e2, 1e4])
def test_logits_of_ten_thousand(random, largest):
    n, d = 33, 16
    query, key, value = logits_of(1, 300, d, random)
    query *= largest / np.abs(query).max()
    key *= d**0.5 / np.abs(key).max()
    inputs = (query, key, value)
    outputs = streamed(inputs, n)
    assert np.isfinite(outputs).all()
    error, naive_error = errors_at(range(n - 1, 300), inputs, outputs, n)
    assert error <= max(2 * naive_error, 5e-6)


@pytest.mark.parametrize("factor", [1, 0])
@pytest.mark.parametrize("height", [5.0, 15.0, 30.0, 55.0, 70.0, 300.0])
def test_a_key_that_all_rows_attend_to_comes_and_leaves(random, height, factor):
    """The worst case of a subtraction: it leaves almost nothing, in every row at once.

    If the value is 0, the error is only in the denominator.
    """
    n, d = 32, 8
    query, key, value = logits_of(0.25, 400, d, random)
    query[:, 0] = d**0.5  # Every query looks for this feature, and every 50th key has it.
    key[:, 0] = 0
    key[::50, 0] = height
    value[::50] *= factor
    inputs = (query, key, value)
    outputs = streamed(inputs, n)
    error, naive_error = errors_at(range(n - 1, 400), inputs, outputs, n)
    assert error <= max(2 * naive_error, 5e-6)


@pytest.mark.parametrize("slope", [0.1, 1.0, 10.0, -0.1, -1.0, -10.0])
def test_logits_that_rise_and_fall_without_end(random, slope):
    n, d = 17, 8
    query, key, value = logits_of(0.25, 200, d, random)
    query[:, 0] = d**0.5
    key[:, 0] = slope * np.arange(200)
    inputs = (query, key, value)
    outputs = streamed(inputs, n)
    error, naive_error = errors_at(range(n - 1, 200), inputs, outputs, n)
    assert error <= max(2 * naive_error, 5e-6)


@pytest.mark.parametrize("ratio", [1e3, 1e10, 1e30])
def test_large_values_leave_nothing_behind(random, ratio):
    """Large values come alone, in a row, or each smaller than the one before."""
    n, d = 16, 8
    query, key, value = logits_of(1, 300, d, random)
    value[50] *= ratio
    value[100:110] *= ratio
    value[200:230] *= ratio ** np.linspace(1, 0, 30, dtype="float32")[:, None]
    inputs = (query, key, value)
    outputs = streamed(inputs, n)
    error, naive_error = errors_at(range(n - 1, 300), inputs, outputs, n)
    assert error <= max(2 * naive_error, 5e-6)


@pytest.mark.parametrize(("std", "dtype"), [(1, "float32"), (9, "float32"), (1, "float64")])
def test_100_000_steps(random, std, dtype):
    """There is no drift: the last windows are as exact as the first."""
    n, h, d = 16, 1, 8
    cache = RetroactiveCache(1, h, n, d, dtype=dtype)
    step = traced(lambda *inputs: retroactive_attention(*inputs, cache, algorithm="update"))
    for _ in range(100):
        query, key, value = steps_of(1, 1000, h, d, d, dtype=dtype, random=random)
        inputs = (query * std**0.5, key * std**0.5, value)
        output = step(*map(tf.constant, inputs))
    known = [x[0, 1000 - 50 - n : 950] for x in inputs]
    expected = expected_of([reference.RetroactiveStream(n, *known)], *(x[:, 950:] for x in inputs))
    bound = reference.BOUNDS[dtype] * (1 if std == 1 else 4)
    assert reference.relative_error(output[:, 950:], expected) < bound
    assert int(cache.position[0]) == 100_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_100_000_steps_of_a_large_window(random, dtype):
    n, d = 120, 32
    cache = RetroactiveCache(1, 1, n, d, dtype=dtype)
    for _ in range(1000):
        inputs = steps_of(1, 100, 1, d, d, dtype=dtype, random=random)
        output = retroactive_attention(*inputs, cache, algorithm="update")
    history = steps_of(0, 1, d, d, dtype=dtype, random=random)
    stream = reference.RetroactiveStream(n, *history)
    for _ in range(2):
        inputs = steps_of(1, 100, 1, d, d, dtype=dtype, random=random)
        output = retroactive_attention(*inputs, cache, algorithm="update")
        expected = expected_of([stream], *inputs, newest=1)
    assert reference.relative_error(output[:, -1:], expected) < reference.BOUNDS[dtype]
