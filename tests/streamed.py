"""Sessions that are stepped with flat lists of arrays, in any order of streams. No Keras here."""

import json

import numpy as np

import reference

# The streams' ages, in steps, when they step together for the first time.
AGES = (0, 2, 5)


def packed(structure, arrays):
    """Return arrays in the structure of a session's plan."""
    if isinstance(structure, list):
        return [packed(part, arrays) for part in structure]
    if isinstance(structure, dict):
        return {name: packed(part, arrays) for name, part in structure.items()}
    return arrays[structure]


def flat(structure):
    """Return the arrays of a structure in a list, in Keras' order: dicts by sorted names."""
    if isinstance(structure, dict):
        structure = [structure[name] for name in sorted(structure)]
    if isinstance(structure, (list, tuple)):
        return [array for part in structure for array in flat(part)]
    return [structure]


class Streamed:
    """A session that is stepped with flat lists of arrays."""

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
        return flat(call(packed(self.structure, arrays), **options))


def by_streams(streamed, inputs, ids):
    """Take all steps of `inputs` (M, T, ...) in a mix of calls, and return arrays (M, T, ...).

    Streams begin alone, take single steps together in changing order, and end with several steps
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


def check(outputs, expected, bound):
    assert len(outputs) == len(expected)
    for y, x in zip(outputs, expected, strict=True):
        assert y.shape == x.shape
        if x.dtype.kind in "biu":
            np.testing.assert_array_equal(y, x)
        else:
            assert reference.relative_error(x, y) < bound
