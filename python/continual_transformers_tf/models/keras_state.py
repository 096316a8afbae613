"""The state of streams of a Keras model as stream blocks of its plan. NumPy only.

`docs/model_file.md` says what the plan's `keras_state` is, and what a stream block is.
"""

from typing import NamedTuple

import numpy as np

_ALIGNMENT = 64
# Which axis of these entries, counted from the last, is the window's rows; they are no rings.
_WINDOW_AXIS = {"softmax": -1, "weighted_sum": -2}


class Entry(NamedTuple):
    """One named part of a stream block, as the session reports it."""

    node: int
    name: str
    dtype: str
    shape: tuple
    offset: int
    ring_rows: int  # 0: not a ring.


def blocks_from_keras_state(plan, layout, state):
    """Turns what the `get_state` of a Keras model or layer gave into stream blocks.

    Args:
        plan: the plan, as a dict.
        layout: the parts of a stream block: tuples of what an `Entry` has.
        state: what `get_state` gave, of M streams.

    Returns:
        (a list of M blocks, bytes; a list of M positions, ints).

    Raises:
        ValueError: if the state is not one of the plan's model.
    """
    parts = list(_parts(plan["keras_state"], state, "the state"))
    positions = _positions(parts)
    entries = [Entry(*entry) for entry in layout]
    ends = [entry.offset + _bytes_of(entry) for entry in entries]
    size = max([_ALIGNMENT, *(-(-end // _ALIGNMENT) * _ALIGNMENT for end in ends)])
    blocks = np.zeros((len(positions), size), np.uint8)
    places = {(entry.node, entry.name): entry for entry in entries}
    for where, leaf, array in parts:
        if leaf is None or leaf == "position":
            continue
        array = _checked(where, array, len(positions))
        if leaf == "true":
            _check_true(where, array, positions)
            continue
        node, name, *how = leaf
        entry = places[node, name]
        if how[:1] == ["index"]:
            _, start, rows = how
            values = (array.astype(np.int64) - start - positions) % rows
        elif entry.ring_rows:
            if how == ["heads_first"]:
                array = np.swapaxes(array, 1, 2)
            values = _ring(where, array, positions, entry)
        else:
            values = _window_rows(where, array, positions, entry)
        data = _as_dtype(where, values, entry.dtype)
        rows = data.reshape(len(positions), -1).view(np.uint8).reshape(len(positions), -1)
        blocks[:, entry.offset : entry.offset + rows.shape[1]] = rows
    return [block.tobytes() for block in blocks], [int(p) for p in positions]


def _parts(described, state, where):
    """Pairs what the plan says of a state with what was given: (where, leaf, array)."""
    if not isinstance(described, dict):
        yield where, described, state
        return
    got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or set(map(str, state)) != set(described):
        raise ValueError(f"Expected {where} to have {sorted(described)}, but got {got}")
    state = {str(name): part for name, part in state.items()}
    for name, part in described.items():
        yield from _parts(part, state[name], f"{name!r} of {where}")


def _positions(parts):
    """The streams' positions, which all layers share."""
    taken = [(where, np.asarray(x)) for where, leaf, x in parts if leaf == "position"]
    if not taken:
        raise ValueError("Expected the state of a model with streams, but the plan keeps nothing")
    where, positions = taken[0]
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or (positions < 0).any():
        raise ValueError(f"Expected {where} to be integers [M] >= 0, but got {positions!r}")
    for other, x in taken:
        if not np.array_equal(x, positions):
            raise ValueError(
                "Expected a state in which all layers have taken the same steps, but got "
                f"{positions.tolist()} in {where} and {x.tolist()} in {other}"
            )
    return positions.astype(np.int64)


def _checked(where, array, streams):
    array = np.asarray(array)
    if array.shape[:1] != (streams,):
        raise ValueError(
            f"Expected {where} to have {streams} streams, as the positions, but got shape "
            f"{list(array.shape)}"
        )
    return array


def _check_true(where, ring, positions):
    """Raises ValueError where the model keeps False for a step, and the plan keeps nothing."""
    for array, position in zip(ring, positions, strict=True):
        if not array[_rows_taken(position, len(array))].all():
            raise ValueError(
                f"Expected {where} to be true for every step, but got a step that was masked: the "
                "plan was made of a model that masks none"
            )


def _rows_taken(position, rows):
    """The rows of a ring that steps have written, as indices."""
    return np.arange(max(0, position - rows), position) % rows


def _ring(where, array, positions, entry):
    """Rows [M, R, ...] of a ring, in the places that a ring of other rows has for their steps."""
    rows, size = entry.ring_rows, int(np.prod(entry.shape[1:]))
    if array.ndim < 2 or array.shape[1] < rows or array[:1, :1].size not in (0, size):
        raise ValueError(
            f"Expected {where} to be {list(entry.shape)} for each stream, in any layout, but got "
            f"{list(array.shape[1:])}"
        )
    ring = np.zeros((len(array), rows, size), array.dtype)
    given = array.reshape(*array.shape[:2], size)
    for i, position in enumerate(positions):
        steps = np.arange(max(0, position - rows), position)
        ring[i, steps % rows] = given[i, steps % array.shape[1]]
    return ring


def _window_rows(where, array, positions, entry):
    """What is kept of the rows of a window, without those that no step has written."""
    if array.shape[1:] != tuple(entry.shape):
        raise ValueError(
            f"Expected {where} to be {list(entry.shape)} for each stream, but got "
            f"{list(array.shape[1:])}"
        )
    values = np.zeros_like(array)
    axis = _WINDOW_AXIS.get(entry.name)
    for i, position in enumerate(positions):
        if axis is None:
            if position:
                values[i] = array[i]
            continue
        rows = _rows_taken(position, array.shape[axis])
        target, given = np.moveaxis(values[i], axis, 0), np.moveaxis(array[i], axis, 0)
        target[rows] = given[rows]
    return values


def _as_dtype(where, array, dtype):
    """An array in a dtype of the plan; bfloat16, which NumPy has not, as uint16."""
    array = _floats_of(array)
    if (array.dtype == bool) != (dtype == "bool") or array.dtype.kind not in "biuf":
        raise ValueError(f"Expected {where} of {dtype}, but got {array.dtype}")
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    # To the nearest, of two to the even one; NaN stays NaN.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(array), bits >> 16 | 0x40, rounded).astype("<u2")


def _floats_of(array):
    """bfloat16 as float32: what TensorFlow gives, and what NumPy reads from a file of it."""
    if array.dtype.name != "bfloat16" and array.dtype != np.dtype("V2"):
        return array
    bits = np.ascontiguousarray(array).view(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bytes_of(entry):
    size = 2 if entry.dtype == "bfloat16" else np.dtype(entry.dtype).itemsize
    return size * int(np.prod(entry.shape, dtype=np.int64))
