"""Lowering: a plan gives the same outputs as the Keras model, step by step."""

import json

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import plan_reference
import reference
from continual_transformers_tf.layers import CircularPositionalEncoding
from continual_transformers_tf.models.lowering import lower
from model_case import BOUNDS
from model_cases import CASES

AGES = (0, 2)  # The streams' ages, in steps.


def lowered(case):
    model = case.build()
    return model, lower(model, case.seq_len)


def streamed(plan, weights, inputs):
    """Return the reference's outputs of a plan for T steps of M streams: arrays (M, T, ...)."""
    outputs = []
    for i in range(len(inputs[0])):
        stream = plan_reference.Stream(plan, weights)
        steps = [stream.step([x[i, t] for x in inputs]) for t in range(inputs[0].shape[1])]
        outputs.append([np.stack(rows) for rows in zip(*steps, strict=True)])
    return [np.stack(rows) for rows in zip(*outputs, strict=True)]


@pytest.mark.sampled(6, rest="slow")
@pytest.mark.parametrize("name", CASES)
def test_a_plan_gives_what_keras_gives(random, name):
    case = CASES[name]
    model, result = lowered(case)
    check_well_formed(result)
    steps = 2 * case.window + 3
    inputs = case.inputs(model, random, (2, steps))
    # (test_session.py compares plans with steps in graphs.)
    expected = case.steps(model, inputs, AGES, traced=False)
    got = streamed(result.plan, result.weights, inputs)
    assert len(got) == len(expected)
    for y, x in zip(got, expected, strict=True):
        assert y.shape == x.shape
        y, x = y[:, case.first :], x[:, case.first :]
        if case.taken_only:
            y, x = (rows_taken(array, case.window) for array in (y, x))
        if x.dtype == bool or x.dtype.kind in "iu":
            np.testing.assert_array_equal(y, x)
        else:
            assert reference.relative_error(x, y) < BOUNDS[case.dtype]


def rows_taken(y, n):
    """Return outputs in which rows of a window that were never taken are zeros."""
    if y.ndim < 4 or y.shape[2] != n:
        return y
    y = np.array(y)
    for t in range(min(n, y.shape[1])):
        y[:, t, : n - 1 - t] = 0
    return y


def check_well_formed(result):
    """Check docs/model_file.md's rules for a plan's form, and that the file contains the plan."""
    plan = result.plan
    values, known = plan["values"], {port["value"] for port in plan["inputs"]}
    names = [node["name"] for node in plan["nodes"]]
    assert len(set(names)) == len(names)
    for node in plan["nodes"]:
        assert {*node["inputs"], *node.get("masks", {}).values()} <= known
        assert not known & set(node["outputs"])
        known |= set(node["outputs"])
        assert all(
            values[i] == {"shape": [1], "dtype": "bool"} for i in node.get("masks", {}).values()
        )
    assert known == set(range(len(values)))
    assert {port["value"] for port in plan["outputs"]} <= known
    used = {w for node in plan["nodes"] for w in node["weights"].values()}
    assert used == set(result.weights)
    places = keras.tree.flatten(plan["output_structure"])
    assert sorted(places) == list(range(len(plan["outputs"])))
    data = result.to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "continual-transformers"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["plan"]) == plan
    for tensor, entry in header.items():
        start, end = entry["data_offsets"]
        array = result.weights[tensor]
        assert entry["shape"] == list(array.shape)
        assert data[8 + length + start : 8 + length + end] == array.tobytes()


def test_normalization_of_numbers_far_from_zero():
    """An air pressure, for example: x * scale - mean * scale would lose it to rounding."""
    layer = keras.layers.Normalization(mean=101325.0, variance=1.0)
    x = keras.Input((4, 1))
    y = CircularPositionalEncoding(7, 1, encoding="sinusoidal")(layer(x))
    lowered = lower(keras.Model(x, y))
    nodes = [node for node in lowered.plan["nodes"] if node["op"] in ("affine", "batch_norm")]
    assert [node["op"] for node in nodes] == ["affine", "affine"]
    scale, offset = (lowered.weights[nodes[0]["weights"][name]] for name in ("scale", "offset"))
    assert (scale == 1).all()
    assert (offset == -101325).all()


def test_masking_of_several_rows_a_step_keeps_a_nan_where_it_is():
    x = keras.Input((4, 6))
    y = keras.layers.Masking()(keras.layers.Reshape((3, 2))(x[:, -1]))
    model = keras.Model(x, y)
    result = lower(model)
    rows = [[np.nan, 1, 0, 0, 2, np.nan], [0, 0, 0, np.nan, -0.0, 3], [0, -0.0, np.inf, 0, 5, 6]]
    inputs = np.array(rows, "float32")[:, np.newaxis]
    expected = model(np.repeat(inputs, 4, axis=1)).numpy()
    (got,) = streamed(result.plan, result.weights, [inputs])
    np.testing.assert_array_equal(got[:, 0], expected)
    np.testing.assert_array_equal(ct.Session(model).step(inputs[:, 0]), expected)
