"""Whole models as a session: against a float64 reference of the plan, and against Keras' steps."""

import json

import keras
import numpy as np
import pytest

import plan_reference
import reference
from continual_transformers_tf.models.lowering import lower
from continual_transformers_tf.session import Session
from model_cases import BOUNDS, CASES

# Streams' ages in steps when they step together for the first time.
AGES = (0, 2, 5)


def packed(structure, arrays):
    """Arrays in the structure that a session's plan has."""
    if isinstance(structure, list):
        return [packed(part, arrays) for part in structure]
    if isinstance(structure, dict):
        return {name: packed(part, arrays) for name, part in structure.items()}
    return arrays[structure]


class Streamed:
    """Takes steps of a session with flat lists of arrays."""

    def __init__(self, session):
        self.session = session
        self.structure = json.loads(session._plan_json)["input_structure"]

    def step(self, arrays, **options):
        return self._call(self.session.step, arrays, options)

    def steps(self, arrays, **options):
        return self._call(self.session.steps, arrays, options)

    def _call(self, call, arrays, options):
        specs = self.session.inputs
        arrays = [x.astype(spec.dtype) for x, spec in zip(arrays, specs, strict=True)]
        return keras.tree.flatten(call(packed(self.structure, arrays), **options))


def by_streams(streamed, inputs, ids):
    """All steps of `inputs` (M, T, ...) in a mix of calls: arrays (M, T, ...).

    Streams begin by themselves, take single steps together in changing order, and end with several
    at once.
    """
    m, t = inputs[0].shape[:2]
    rows = [[] for _ in range(m)]
    for i in range(m):
        for p in range(min(t, AGES[i])):
            y = streamed.step([x[i : i + 1, p] for x in inputs], streams=ids[i])
            rows[i].append([z[0] for z in y])
    taken = [len(row) for row in rows]
    while max(taken) < t - 3:
        order = np.roll(np.arange(m), max(taken))
        y = streamed.step(
            [np.stack([x[i, taken[i]] for i in order]) for x in inputs], streams=ids[order]
        )
        for row, i in enumerate(order):
            rows[i].append([z[row] for z in y])
            taken[i] += 1
    for i in range(m):
        y = streamed.steps([x[i : i + 1, taken[i] :] for x in inputs], streams=ids[i : i + 1])
        rows[i] += [[z[0, p] for z in y] for p in range(t - taken[i])]
    return [
        np.stack([np.stack([step[j] for step in row]) for row in rows])
        for j in range(len(rows[0][0]))
    ]


def referenced(plan, weights, inputs):
    """What the float64 reference gives: arrays (M, T, ...)."""
    outputs = []
    for i in range(len(inputs[0])):
        stream = plan_reference.Stream(plan, weights)
        steps = [stream.step([x[i, t] for x in inputs]) for t in range(inputs[0].shape[1])]
        outputs.append([np.stack(rows) for rows in zip(*steps, strict=True)])
    return [np.stack(rows) for rows in zip(*outputs, strict=True)]


def check(outputs, expected, bound):
    assert len(outputs) == len(expected)
    for y, x in zip(outputs, expected, strict=True):
        assert y.shape == x.shape
        if x.dtype.kind in "biu":
            np.testing.assert_array_equal(y, x)
        else:
            assert reference.relative_error(x, y) < bound


@pytest.mark.parametrize("name", CASES)
def test_a_session_gives_what_the_plan_says(random, tmp_path, name):
    case = CASES[name]
    model = case.build()
    session = Session(model, seq_len=case.seq_len)
    inputs = case.inputs(model, random, (3, 2 * case.window + 8))
    ids = session.open(5)[[3, 0, 4]]
    outputs = by_streams(Streamed(session), inputs, ids)
    lowered = lower(model, case.seq_len)
    expected = referenced(lowered.plan, lowered.weights, inputs)
    check(outputs, expected, BOUNDS[case.dtype])
    assert session.ready(ids).all()
    assert session.receptive_field == lowered.plan["receptive_field"]
    # The same as a loaded file, to the bit.
    session.save(tmp_path / "model.safetensors")
    loaded = Session.load(tmp_path / "model.safetensors")
    others = loaded.open(5)[[1, 2, 4]]
    for y, x in zip(by_streams(Streamed(loaded), inputs, others), outputs, strict=True):
        np.testing.assert_array_equal(y, x)
    # A copy of a stream in the middle goes on as the stream does.
    loaded.set_state(session.get_state(ids), others[::-1])
    step = [x[:, 0] for x in inputs]
    for y, x in zip(
        Streamed(loaded).step(step, streams=others[::-1]),
        Streamed(session).step(step, streams=ids),
        strict=True,
    ):
        np.testing.assert_array_equal(y, x)
