"""Operations and layers that work row by row stream below attention, and others are refused."""

import functools

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.models import row_wise
from continual_transformers_tf.models.step_graph import StepGraph
from row_wise_cases import CASES, ONLY_IN_KERAS, PRODUCTS, TIME, E, N, model_of

BOUND = 1e-5


def check_equal(got, expected):
    for y, x in zip(got, expected, strict=True):
        finite = np.isfinite(x)
        np.testing.assert_array_equal(np.isfinite(y), finite)
        np.testing.assert_array_equal(y[~finite], x[~finite])
        if finite.any():
            assert reference.relative_error(np.where(finite, y, 0), np.where(finite, x, 0)) < BOUND


def steps_and_windows(model, random):
    """Return the input of 2 streams, and the model's outputs on the window of each full step."""
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    return x, {
        t: [np.asarray(y) for y in model(x[:, t + 1 - N : t + 1])] for t in range(N - 1, N + 3)
    }


@pytest.mark.sampled(8, rest="slow")
@pytest.mark.parametrize("name", [*CASES, *ONLY_IN_KERAS])
def test_steps_equal_windows(random, name):
    model = model_of({**CASES, **ONLY_IN_KERAS}[name])
    x, windows = steps_and_windows(model, random)
    streaming = ct.convert(model, N, warm_up="partial")
    parts = [streaming.call_steps(part) for part in (x[:, :2], x[:, 2:])]
    outputs = [np.concatenate(pair, 1) for pair in zip(*parts, strict=True)]
    for t, expected in windows.items():
        check_equal([y[:, t] for y in outputs], expected)
    if name in ONLY_IN_KERAS:
        with pytest.raises(ValueError, match="cannot be run by a session") as error:
            ct.Session(model)
        assert "several steps" not in str(error.value)
        return
    session = ct.Session(model)
    for t in range(N + 3):
        y = session.step(x[:, t])
        if t in windows:
            check_equal(y, windows[t])


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_float64(random, name):
    x = keras.Input((N, E), dtype="float64")
    y = PRODUCTS[name](x)
    model = keras.Model(x, [z[:, -1] for z in (y if isinstance(y, list) else [y])])
    window = random.normal(size=(2, N, E))
    outputs = keras.tree.flatten(ct.Session(model).steps(window))
    for y, z in zip(outputs, keras.tree.flatten(model(window)), strict=True):
        assert y.dtype == np.float64
        assert reference.relative_error(np.asarray(z), y[:, -1]) < 1e-12


def on_samples(x, y):
    """Return products of the newest rows of two windows, and of whole windows."""
    first, second = x[:, -1], y[:, -1]
    matrix = keras.layers.Reshape((2, 4))(first)
    whole = ct.CoWindow(N)(x)
    return [
        keras.layers.Dot(1)([first, second]),
        keras.layers.Dot(-1, normalize=True)([first, second]),
        keras.layers.Dot((1, 1))([matrix, keras.layers.Reshape((2, 4))(second)]),
        keras.layers.Dot((2, 1))([matrix, second[:, :4]]),
        keras.layers.Dot((1, 2))([second[:, :4], matrix]),
        keras.layers.Dot(2)([keras.layers.Reshape((2, 2, 2))(first), matrix[:, :2, 1:3]]),
        keras.layers.Dot(2)([whole, whole]),
        keras.ops.matmul(keras.ops.transpose(whole, (0, 2, 1)), whole),
        keras.ops.matmul(matrix, matrix[:, 0][..., None]),
        keras.ops.einsum("bti,bi->bt", whole, second),
        keras.ops.einsum("...i,...i", first, second),
    ]


def test_products_of_samples(random):
    inputs = [keras.Input((N, E)), keras.Input((N, E))]
    given = random.normal(size=(2, 2, N, E)).astype("float32")
    *outputs, implicit = on_samples(*inputs)
    model = keras.Model(inputs, outputs)
    session = ct.Session(model)
    assert ct.explain(model).equals_windows
    expected = model(list(given))
    for y, z in zip(session.steps(list(given)), expected, strict=True):
        assert y[:, -1].shape == z.shape
        assert reference.relative_error(np.asarray(z), y[:, -1]) < BOUND
    with pytest.raises(ValueError, match="expected 2 operands and an output"):
        ct.Session(keras.Model(inputs, implicit))


MIXED = {
    "rows as samples": (lambda x: keras.ops.matmul(x, keras.ops.transpose(x)), "samples, or steps"),
    "dot": (lambda x: keras.ops.dot(x, keras.ops.transpose(x)), "use matmul or einsum"),
    "einsum": (lambda x: keras.ops.einsum("bi,ci->bc", x, x), "mixes samples, or steps"),
    "integers": (
        lambda x: keras.ops.einsum("bi,bi->b", *[keras.ops.cast(x, "int32")] * 2), "in int32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_products_that_mix_samples_are_refused(name):
    function, reason = MIXED[name]
    x = keras.Input((N, E))
    with pytest.raises(ValueError, match=reason):
        ct.Session(keras.Model(x, function(x[:, -1])))


def time_model(function):
    x = keras.Input((N, E))
    y = function(x)
    return keras.Model(x, [y, keras.layers.MultiHeadAttention(2, 4)(x, x)])


@pytest.mark.sampled(8, rest="slow")
@pytest.mark.parametrize("name", TIME)
def test_what_looks_along_time_is_refused(name):
    model = time_model(TIME[name])
    with pytest.raises(ValueError, match=r"several steps|cannot be run on the steps"):
        ct.convert(model, N)
    with pytest.raises(ValueError, match="cannot be run by a session"):
        ct.Session(model)


@pytest.mark.parametrize(
    ("name", "options", "streams"),
    [
        ("celu", {"alpha": 0.5}, True),
        ("celu", {"alpha": np.ones((N, 1))}, False),
        ("softmax", {"axis": 2}, True),
        ("softmax", {"axis": 1}, False),
        ("glu", {"axis": -2}, False),
    ],
)
def test_activations_with_options(name, options, streams):
    """Keras makes no copy of a partial function from a config, so these are never converted."""
    function = functools.partial(getattr(keras.activations, name), **options)
    x = keras.Input((N, E))
    graph = StepGraph(keras.Model(x, keras.layers.Activation(function)(x)))
    assert (not graph.problems) == streams


def names_of_ops(functions):
    names = set()
    for function in functions:
        x = keras.Input((N, E))
        for node in keras.Function(x, function(x)).operations:
            names.add(row_wise.name_of_op(node))
    return names


def test_every_op_of_the_table_has_a_case():
    told = names_of_ops([*CASES.values(), *ONLY_IN_KERAS.values()])
    # Names that Keras' functions do not make: the class of an alias, or of eager tensors only.
    unused = {"Abs", "Conj", "ConvertToTensor", "Mish", "ReLU", "StopGradient"}
    assert set(row_wise.OPS) - told <= unused
