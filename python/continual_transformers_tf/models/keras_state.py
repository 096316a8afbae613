"""Conversion of a Keras model's stream states into stream blocks of its plan, with NumPy only.

`docs/model_file.md` defines the plan's `keras_state` and the stream block.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]

_ALIGNMENT = 64
# The axis of the window's rows in these entries, counted from the last. They are not rings.
_WINDOW_AXIS = {"softmax": -1, "weighted_sum": -2}
# Attention's rings are [N, H, D] in a state. In older states they are [H, N, D], with other names.
# A plan from that time has the older names, with "heads_first".
_OLD_NAMES = {"queries": "query", "keys": "key", "values": "value"}
_NEW_NAMES = {old: new for new, old in _OLD_NAMES.items()}


class Entry(NamedTuple):
    """One named part of a stream block, as the session reports it."""

    node: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    ring_rows: int  # 0: not a ring.
    rows_a_step: int = 1


def blocks_from_keras_state(
    plan: dict[str, Any], layout: Sequence[tuple[Any, ...]], state: Any
) -> tuple[list[bytes], list[int]]:
    """Turn the result of a Keras model's or layer's `get_state` into stream blocks.

    Args:
        plan: The plan, as a dict.
        layout: The parts of a stream block: tuples with the fields of an `Entry`.
        state: The result of `get_state`, for M streams.

    Returns:
        (a list of M blocks, bytes; a list of M positions, ints).

    Raises:
        ValueError: If the state does not belong to the plan's model.
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
        elif how[:1] == ["rows"]:
            values = _ring_of_blocks(where, array, positions, entry, how[1])
        elif entry.ring_rows:
            values = _ring(where, array, positions, entry)
        else:
            values = _window_rows(where, array, positions, entry)
        if entry.dtype == "int8":
            values, scales = _quantized(where, values)
            _put(blocks, places[node, f"{name}_scale"], scales)
        _put(blocks, entry, _as_dtype(where, values, entry.dtype))
    return [block.tobytes() for block in blocks], [int(p) for p in positions]


def _put(blocks: Array, entry: Entry, values: Array) -> None:
    """Write an entry's values [M, ...] into the blocks."""
    rows = values.reshape(len(blocks), -1).view(np.uint8).reshape(len(blocks), -1)
    blocks[:, entry.offset : entry.offset + rows.shape[1]] = rows


def _quantized(where: str, ring: Array) -> tuple[Array, Array]:
    """Return a ring [M, R, size] in int8, and the scale of each row, as a session's step does."""
    ring = _as_dtype(where, ring, "float32")
    largest = np.abs(ring).max(-1)
    finite = np.isfinite(largest)
    scales = np.where(finite, largest / 127, np.nan).astype("<f4")
    factor = np.where(finite & (largest > 1e-35), 127 / np.where(largest > 0, largest, 1), 0)
    quantized = np.rint(np.where(finite[..., None], ring, 0) * factor[..., None])
    return quantized.astype(np.int8), scales


def _parts(described: Any, state: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (where, leaf, array) for every leaf of `keras_state` and its array in the state."""
    if not isinstance(described, dict):
        yield where, described, state
        return
    described = _with_new_names(described)
    got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
    if isinstance(state, dict):
        state = _sequence_first({str(name): part for name, part in state.items()}, described)
    if not isinstance(state, dict) or set(state) != set(described):
        raise ValueError(f"Expected {where} to have {sorted(described)}, but got {got}")
    for name, part in described.items():
        yield from _parts(part, state[name], f"{name!r} of {where}")


def _with_new_names(described: dict[str, Any]) -> dict[str, Any]:
    """Return a part of `keras_state` with the names of this version, without "heads_first"."""
    renamed = {}
    for name, part in described.items():
        if isinstance(part, list) and part[2:] == ["heads_first"]:
            name, part = _NEW_NAMES[name], part[:2]
        renamed[name] = part
    return renamed


def _sequence_first(state: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the rings that `described` names. Rings of older states are converted.

    If not all rings have the older names, the state is returned as it is.
    """
    renamed = {_OLD_NAMES[name]: name for name in _OLD_NAMES if name in described}
    if not all(old in state and new not in state for old, new in renamed.items()):
        return state
    return {
        renamed.get(name, name): _swapped(part) if name in renamed else part
        for name, part in state.items()
    }


def _swapped(array: npt.ArrayLike) -> Array:
    """Return [M, H, N, D] as [M, N, H, D]. Later checks refuse arrays with other axes."""
    array = np.asarray(array)
    return np.swapaxes(array, 1, 2) if array.ndim == 4 else array


def _positions(parts: Iterable[tuple[str, Any, Any]]) -> Positions:
    """Return the streams' positions, which all layers must share."""
    taken = [(where, np.asarray(x)) for where, leaf, x in parts if leaf == "position"]
    if not taken:
        raise ValueError(
            "Expected the state of a model that remembers steps, but this one remembers nothing"
        )
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


def _checked(where: str, array: npt.ArrayLike, streams: int) -> Array:
    array = np.asarray(array)
    if array.shape[:1] != (streams,):
        raise ValueError(
            f"Expected {where} to have {streams} streams, as the positions have, but got shape "
            f"{list(array.shape)}"
        )
    return array


def _check_true(where: str, ring: Array, positions: Positions) -> None:
    """Raise ValueError if the model masked a step. The plan has no room for a mask there."""
    for array, position in zip(ring, positions, strict=True):
        if not array[_rows_taken(position, len(array))].all():
            raise ValueError(
                f"Expected {where} to be true for every step, but got a step that was masked. The "
                "plan comes from a model that masks no step"
            )


def _rows_taken(position: int, rows: int) -> Array:
    """Return the indices of the rows of a ring that steps have written."""
    return np.arange(max(0, position - rows), position) % rows


def _ring(where: str, array: Array, positions: Positions, entry: Entry) -> Array:
    """Move rows [M, R, ...] of a ring to their places in the entry's ring of another length."""
    rows, size = entry.ring_rows, int(np.prod(entry.shape[1:]))
    if array.ndim < 2 or array.shape[1] < rows or array[:1, :1].size not in (0, size):
        raise ValueError(
            f"Expected {where} to be {list(entry.shape)} for each stream, in any layout, but got "
            f"{list(array.shape[1:])}"
        )
    ring = np.zeros((len(array), rows, size), array.dtype)
    given = array.reshape(*array.shape[:2], size)
    # Far into a stream a product could overflow. A common multiple of both rings earlier, the rows
    # are the same.
    rounds = rows * array.shape[1]
    near = np.where(positions < rounds, positions, rounds + positions % rounds)
    for i, taken in enumerate(near * entry.rows_a_step):
        number = np.arange(max(0, taken - rows), taken)
        ring[i, number % rows] = given[i, number % array.shape[1]]
    return ring


def _ring_of_blocks(
    where: str, array: Array, positions: Positions, entry: Entry, rows: int
) -> Array:
    """Move rows [M, R, ...] of a ring to an entry whose steps have several rows each."""
    blocks, size = entry.ring_rows, int(np.prod(entry.shape[2:]))
    if array.ndim < 2 or array[:1, :1].size not in (0, size):
        raise ValueError(
            f"Expected {where} to be rows of {size} numbers for each stream, but got "
            f"{list(array.shape[1:])}"
        )
    ring = np.zeros((len(array), blocks * rows, size), array.dtype)
    given = array.reshape(*array.shape[:2], size)
    for i, position in enumerate(positions):
        first = max(0, (position - blocks) * rows, position * rows - array.shape[1])
        number = np.arange(first, position * rows)
        ring[i, number % (blocks * rows)] = given[i, number % array.shape[1]]
    return ring


def _window_rows(where: str, array: Array, positions: Positions, entry: Entry) -> Array:
    """Return an entry that is not a ring. Its rows that no step has written are zeros."""
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


def _as_dtype(where: str, array: Array, dtype: str) -> Array:
    """Return an array in a dtype of the plan. bfloat16 becomes uint16, because NumPy has none."""
    array = _floats_of(array)
    if (array.dtype == bool) != (dtype == "bool") or array.dtype.kind not in "biuf":
        raise ValueError(f"Expected {where} of {dtype}, but got {array.dtype}")
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    # Round to nearest, ties to even; NaN stays NaN.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(array), bits >> 16 | 0x40, rounded).astype("<u2")


def _floats_of(array: Array) -> Array:
    """Return bfloat16 as float32: TensorFlow's bfloat16, or the V2 that NumPy reads from a file."""
    if array.dtype.name != "bfloat16" and array.dtype != np.dtype("V2"):
        return array
    bits = np.ascontiguousarray(array).view(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bytes_of(entry: Entry) -> int:
    size = 2 if entry.dtype == "bfloat16" else np.dtype(entry.dtype).itemsize
    return size * int(np.prod(entry.shape, dtype=np.int64))
