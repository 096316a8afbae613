"""The basic nodes of a plan, against NumPy, on random shapes and numbers."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plan_reference
from continual_transformers_tf.models.lowering import keras_ops
from continual_transformers_tf.models.lowering.activations import axis_of_step
from continual_transformers_tf.models.lowering.einsum import einsum
from continual_transformers_tf.models.lowering.logic_ops import select_rows
from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder

SETTINGS = settings(max_examples=60, deadline=None)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def computed(function, *arrays):
    """Return the results for arrays, and the plan, of a function of a builder and Symbols."""
    b = PlanBuilder("float64")
    inputs = b.add_inputs([(x.shape, "float64") for x in arrays])
    outputs = function(b, *inputs)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    _, place = b.finish(outputs)
    plan = {
        "values": b.values,
        "nodes": b.nodes,
        "inputs": [{"value": x.index} for x in inputs],
        "outputs": [{"value": place(y.index)} for y in outputs],
    }
    results = plan_reference.Stream(plan, b.weights).step(arrays)
    return results, plan


def array_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@st.composite
def einsums(draw):
    """Draw an equation with one axis of samples, and the sizes of its letters."""
    letters = draw(st.permutations("bcdef"))[: draw(st.integers(2, 5))]
    sizes = {a: draw(st.integers(1, 3)) for a in letters}
    roles = {
        a: draw(st.sampled_from(["free", "sum", "batch", "made", "dot", "alone"])) for a in letters
    }
    given_ = [a for a in letters if roles[a] in ("free", "sum", "batch", "dot")]
    kernel = [a for a in letters if roles[a] in ("batch", "made", "dot", "alone")]
    output = [a for a in letters if roles[a] in ("free", "batch", "made")]
    given_, kernel, output = (draw(st.permutations(part)) for part in (given_, kernel, output))
    return "".join(given_), "".join(kernel), "".join(output), sizes


@SETTINGS
@given(einsums())
def test_einsum(case):
    x, kernel, output, sizes = case
    x_array = array_of([sizes[a] for a in x])
    matrix = array_of([sizes[a] for a in kernel], 1)
    expected = np.einsum(f"{x},{kernel}->{output}", x_array, matrix)
    (got,), plan = computed(
        lambda b, y: einsum(b, f"a{x},{kernel}->a{output}", y, matrix, 1, "kernel"), x_array
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert {node["op"] for node in plan["nodes"]} <= {
        "dense", "strided", "reshape", "concat", "reduce"
    }  # fmt: skip


@pytest.mark.parametrize(
    "equation", ["ab,ac->bc", "ab,bc->ca", "ab,bc", "aab,bc->aac", "ab,cd->abe", "abc,c...->ab..."]
)
def test_einsums_that_mix_samples_or_say_too_little(equation):
    x = array_of((2,) * (equation.index(",") - 1))
    with pytest.raises(CannotLower, match="has the equation"):
        computed(lambda b, y: einsum(b, equation, y, np.ones((2, 2)), 1, "kernel"), x)


@st.composite
def keys(draw):
    shape = draw(SHAPES)
    named = draw(st.integers(0, len(shape)))
    first = draw(st.integers(0, named))  # This many before an ellipsis, the others after it.
    key = []
    for n in (*shape[:first], Ellipsis, *shape[len(shape) - (named - first) :]):
        key += [None] * draw(st.integers(0, 1))
        if n is Ellipsis:
            key += [n] if first < named or draw(st.booleans()) else []
        elif draw(st.booleans()):
            key.append(draw(st.integers(-n, n - 1)))
        else:
            bound = st.none() | st.integers(-n - 1, n + 1)
            key.append(slice(draw(bound), draw(bound), draw(st.sampled_from([None, 2, -1, -2]))))
    return shape, tuple(key)


@SETTINGS
@given(keys())
def test_indices(case):
    shape, key = case
    x = array_of((1, *shape))
    expected = x[(slice(None), *key)][0]
    if expected.size == 0:
        with pytest.raises(CannotLower, match="returns no elements"):
            computed(lambda b, y: keras_ops.get_item(b, y, (slice(None), *key), 1), x[0])
        return
    (got,), plan = computed(lambda b, y: keras_ops.get_item(b, y, (slice(None), *key), 1), x[0])
    np.testing.assert_array_equal(got, expected)
    assert len(plan["nodes"]) <= 1


@SETTINGS
@given(st.data())
def test_shapes(data):
    shape = data.draw(SHAPES)
    x = array_of(shape)
    axes = data.draw(st.permutations(range(len(shape))))
    (got,), _ = computed(lambda b, y: b.transpose(y, axes), x)
    np.testing.assert_array_equal(got, x.transpose(axes))
    width = [(data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for _ in shape]
    (got,), _ = computed(lambda b, y: keras_ops.pad(b, y, width, 2.5), x)
    np.testing.assert_array_equal(got, np.pad(x, width, constant_values=2.5))
    target = [n if n > 1 else data.draw(st.integers(1, 3)) for n in shape]
    target = [data.draw(st.integers(1, 2)), *target]
    (got,), _ = computed(lambda b, y: b.broadcast(y, target), x)
    np.testing.assert_array_equal(got, np.broadcast_to(x, target))
    some = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True))
    for function, keep in itertools.product(("sum", "mean", "max", "min"), (False, True)):
        (got,), _ = computed(lambda b, y, f=function, k=keep: b.reduce(y, f, some, k), x)
        expected = getattr(x, function)(axis=tuple(some), keepdims=keep)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@SETTINGS
@given(st.data())
def test_arithmetic_with_arrays(data):
    """The builder may fold chains of scaling and adding. The results stay the same."""
    shape = data.draw(SHAPES)
    x = y = array_of(shape)
    steps = []
    for seed in range(data.draw(st.integers(1, 4))):
        own = [data.draw(st.sampled_from([1, n])) for n in shape]
        own = own[data.draw(st.integers(0, len(shape))) :]
        function = data.draw(st.sampled_from(["add", "subtract", "multiply", "divide"]))
        swapped = data.draw(st.booleans())
        array = np.abs(array_of(own, seed + 5)) + 0.5
        if function == "divide" and data.draw(st.booleans()):
            array = np.full_like(array, 4.0)
        steps.append((function, array, swapped))
        apply = functools.partial(getattr(np, function))
        y = apply(array, y) if swapped else apply(y, array)

    def build(b, symbol):
        for function, array, swapped in steps:
            pair = (array, symbol) if swapped else (symbol, array)
            symbol = keras_ops.arithmetic(b, function, *pair)
        return symbol

    (got,), _ = computed(build, x)
    np.testing.assert_allclose(got, y, rtol=1e-12)


def test_scaling_and_moving_are_one_node():
    x = array_of((3, 4))
    row = np.arange(4.0)

    def build(b, y):
        return keras_ops.arithmetic(b, "add", keras_ops.arithmetic(b, "multiply", y, row), row)

    (got,), plan = computed(build, x)
    np.testing.assert_array_equal(got, x * row + row)
    assert [node["op"] for node in plan["nodes"]] == ["affine"]


def test_chains_of_reshapes_vanish():
    def build(b, y):
        return b.reshape(b.reshape(b.reshape(y, (12,)), (2, 6)), (3, 4))

    (got,), plan = computed(build, array_of((3, 4)))
    assert plan["nodes"] == []
    assert got.shape == (3, 4)


def test_masks():
    a, c = array_of((3,)), array_of((3,), 1)
    for first, second in itertools.product((0.0, 1.0), repeat=2):

        def build(b, x, y, first_mask, second_mask):
            m, n = b.not_equal(first_mask, 0.0), b.not_equal(second_mask, 0.0)
            both, either = b.mask_and(m, n), b.mask_or(m, n)
            return [select_rows(b, m, x, y), both, either, b.mask_not(m), b.mask_and(None, n)]

        arrays = (a, np.full_like(c, np.nan), np.array([first]), np.array([second]))
        got, _ = computed(build, *arrays)
        np.testing.assert_array_equal(got[0], a if first else np.full(3, np.nan))
        assert [bool(m[0]) for m in got[1:]] == [
            bool(first and second), bool(first or second), not first, bool(second)
        ]  # fmt: skip


def test_axes_of_samples_are_out_of_reach():
    b = PlanBuilder("float32")
    (x,) = b.add_inputs([((2, 3), "float32")])
    assert [axis_of_step(a, x, 1) for a in (1, 2, -1, -2)] == [0, 1, 1, 0]
    for axis, lead in ((0, 1), (1, 2), (-3, 1)):
        with pytest.raises(CannotLower, match="the axis of samples"):
            axis_of_step(axis, x, lead)
    with pytest.raises(CannotLower, match="axis 3, but its input has 3 axes"):
        axis_of_step(3, x, 1)
