"""Operations and layers that work row by row stream below attention, and others are refused."""

import functools

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.models import row_wise
from continual_transformers_tf.models.step_graph import StepGraph
from row_wise_cases import CASES, ONLY_IN_KERAS, TIME, E, N, model_of

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


def time_model(function):
    x = keras.Input((N, E))
    y = function(x)
    return keras.Model(x, [y, keras.layers.MultiHeadAttention(2, 4)(x, x)])


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
