"""Streams, steps and the reference's results, for kernels that are called through cuda/c_api.h.

Arrays in bfloat16 or float16 are held as their bits, in uint16.
"""

import ctypes
from typing import NamedTuple

import numpy as np

import cuda_calls
import reference
from arena import Arena

STORED = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.uint16,
}


def compute_dtype(dtype):
    """Return the dtype of the computation if keys and values are stored in `dtype`."""
    return np.float64 if dtype == "float64" else np.float32


def bound_of(dtype):
    return reference.BOUNDS[np.dtype(compute_dtype(dtype)).name]


def to_stored(x, dtype):
    """Return numbers in their stored form, rounded to nearest (ties to even)."""
    if dtype == "bfloat16":
        bits = np.asarray(x, np.float32).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
    if dtype == "float16":
        return np.asarray(x).astype(np.float16).view(np.uint16)
    return np.asarray(x).astype(dtype)


def to_float64(stored, dtype):
    """Return stored numbers in float64."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float16":
        return stored.view(np.float16).astype(np.float64)
    return stored.astype(np.float64)


class Sizes(NamedTuple):
    heads: int
    window: int
    key_dim: int
    value_dim: int
    dtype: str = "float32"


class Streams:
    """Streams at given positions: the arrays of a cache, and every stream's whole history.

    Rows that no step has written hold NaN, and random flags of whether they have a key.

    Args:
        gaps: The share of earlier steps without a key.
    """

    def __init__(self, random, positions, sizes, gaps=0.0):
        self.sizes = sizes
        heads, n, d, dv, dtype = sizes
        count = len(positions)
        self.position = np.array(positions, np.int64)
        nan = to_stored(np.array(np.nan), dtype)
        self.key = np.full((count, n, heads, d), nan, STORED[dtype])
        self.value = np.full((count, n, heads, dv), nan, STORED[dtype])
        self.key_mask = random.random((count, n)) < 0.5
        # [steps, heads, size] and [steps], oldest first.
        self.history = []
        for s, position in enumerate(self.position):
            taken = int(np.clip(position, 0, n))
            keys = to_stored(random.normal(size=(taken, heads, d)), dtype)
            values = to_stored(random.normal(size=(taken, heads, dv)), dtype)
            has_key = random.random(taken) >= gaps
            keys[~has_key], values[~has_key] = nan, nan
            rows = np.arange(position - taken, position) % n
            self.key[s, rows] = keys
            self.value[s, rows] = values
            self.key_mask[s, rows] = has_key
            self.history.append((keys, values, has_key))

    def exists(self, stream):
        return 0 <= stream < len(self.position) and self.position[stream] >= 0

    def steps(self, random, m, t):
        """Return query [M, T, H, D], key [M, T, H, D] and value [M, T, H, Dv] of new steps."""
        heads, _, d, dv, dtype = self.sizes
        query = random.normal(size=(m, t, heads, d)).astype(compute_dtype(dtype))
        key = to_stored(random.normal(size=(m, t, heads, d)), dtype)
        return query, key, to_stored(random.normal(size=(m, t, heads, dv)), dtype)

    def expected(self, chosen, inputs, scale, mask=None, key_mask=None, query_mask=None):
        """Return these steps' results in float64: output [M, T, H, Dv], scores [M, H, T, N]."""
        heads, n, _, dv, _ = self.sizes
        m, t = inputs[0].shape[:2]
        output = np.full((m, t, heads, dv), np.nan)
        scores = np.full((m, heads, t, n), np.nan)
        for i, stream in enumerate(chosen):
            if not self.exists(stream):
                continue
            allowed = np.ones((heads, t, n), bool) if mask is None else mask[i]
            if query_mask is not None and not query_mask[i]:
                allowed = np.zeros_like(allowed)
            output[i], scores[i] = self._expected_of_one(
                stream,
                [x[i] for x in inputs],
                scale,
                allowed,
                np.ones(t, bool) if key_mask is None else key_mask[i],
            )
        return output, scores

    def _expected_of_one(self, stream, inputs, scale, allowed, key_mask):
        n, dtype = self.sizes.window, self.sizes.dtype
        query, key, value = inputs
        query, t = query.astype(np.float64).swapaxes(0, 1), len(query)
        old_keys, old_values, old_has_key = self.history[stream]
        keys = to_float64(np.concatenate([old_keys, key]), dtype).swapaxes(0, 1)  # [H, n, D]
        values = to_float64(np.concatenate([old_values, value]), dtype).swapaxes(0, 1)
        has_key = np.concatenate([old_has_key, key_mask])
        # A key and value that no query attends to may be NaN.
        keys, values = (np.where(has_key[:, None], x, 0) for x in (keys, values))
        logits = scale * (query @ keys.swapaxes(1, 2))  # [H, T, steps known]
        # Column c of query q's window is step first + c.
        first = np.arange(t) + len(old_keys) - (n - 1)
        steps = first[:, None] + np.arange(n)  # [T, N]
        known = steps >= 0
        steps = np.where(known, steps, 0)
        columns = np.take_along_axis(logits, np.broadcast_to(steps, (len(query), t, n)), 2)
        columns = np.where(allowed & known & has_key[steps], columns, -np.inf)
        scores = reference.softmax(columns)
        output = np.zeros((t, len(query), values.shape[-1]))
        for q in range(t):
            weights = scores[:, q : q + 1, known[q]]
            output[q] = (weights @ values[:, steps[q][known[q]]])[:, 0]
        return output, scores

    def take(self, chosen, inputs, key_mask=None):
        """Take the steps, in the arrays and in the history."""
        n = self.sizes.window
        _, key, value = inputs
        t = key.shape[1]
        for i, stream in enumerate(chosen):
            if not self.exists(stream):
                continue
            has_key = np.ones(t, bool) if key_mask is None else key_mask[i]
            kept = min(t, n)
            rows = np.arange(self.position[stream] + t - kept, self.position[stream] + t) % n
            self.key[stream, rows] = key[i, t - kept :]
            self.value[stream, rows] = value[i, t - kept :]
            self.key_mask[stream, rows] = has_key[t - kept :]
            self.history[stream] = tuple(
                np.concatenate(both)[-n:]
                for both in zip(self.history[stream], (key[i], value[i], has_key), strict=True)
            )
            self.position[stream] += t

    def windows(self, chosen):
        """Return the N - 1 last steps, oldest first: keys, values, and which steps have a key."""
        heads, n, d, dv, dtype = self.sizes
        keys = np.zeros((len(chosen), heads, n - 1, d), STORED[dtype])
        values = np.zeros((len(chosen), heads, n - 1, dv), STORED[dtype])
        has_key = np.zeros((len(chosen), n - 1), bool)
        for i, stream in enumerate(chosen):
            known = min(n - 1, len(self.history[stream][0])) if self.exists(stream) else 0
            if known > 0:
                old = [x[-known:] for x in self.history[stream]]
                keys[i][:, -known:], values[i][:, -known:] = (x.swapaxes(0, 1) for x in old[:2])
                has_key[i, -known:] = old[2]
        return keys, values, has_key


class Call:
    """One call of the kernel, placed in memory: `launch` it, and check what it wrote."""

    def __init__(
        self,
        machine,
        streams,
        chosen,
        inputs,
        *,
        scale=None,
        mask=None,
        key_mask=None,
        query_mask=None,
        update_state=True,
        advance_position=True,
        window_parts=1,
        scores=True,
        windows=False,
        overlap=False,
        misaligned=False,
        in_order=False,
    ):
        self.machine, self.sizes = machine, streams.sizes
        heads, n, d, dv, dtype = streams.sizes
        compute = compute_dtype(dtype)
        m, t = inputs[0].shape[:2]
        self.scale = 1 / np.sqrt(d) if scale is None else scale
        self.arena = arena = Arena(machine.memory, misaligned)
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            arena.add(name, x)
        arena.add("key_mask", key_mask)
        arena.add("query_mask", query_mask)
        arena.add("attention_mask", mask)
        if not in_order:
            arena.add("streams", np.asarray(chosen, np.int32))
        state = dict(
            key_cache=streams.key,
            value_cache=streams.value,
            key_mask_cache=streams.key_mask,
            position=streams.position,
        )
        for name, x in state.items():
            written = update_state and (name != "position" or advance_position)
            arena.add(name, x, written=written)
        arena.output("output", (m, t, heads, dv), compute)
        # Not filled with poison, which is -1 as an integer: that is the value for no such stream.
        arena.add("steps_taken", np.full(m, 77), written=True)
        if scores:
            arena.output("scores", (m, heads, t, n), compute)
        if windows:
            arena.output("window_key", (m, heads, n - 1, d), STORED[dtype])
            arena.output("window_value", (m, heads, n - 1, dv), STORED[dtype])
            arena.output("window_key_mask", (m, n - 1), bool)
        self.struct = call = cuda_calls.SingleOutput(
            compute_dtype=cuda_calls.DTYPES[np.dtype(compute).name],
            cache_dtype=cuda_calls.DTYPES[dtype],
            num_held=len(streams.position),
            num_streams=m,
            num_steps=t,
            num_heads=heads,
            window=n,
            key_dim=d,
            value_dim=dv,
            scale=self.scale,
            update_state=update_state,
            advance_position=advance_position,
            overlap=overlap,
            window_parts=window_parts,
        )
        if mask is not None:
            call.mask_rows, call.mask_heads, call.mask_steps = mask.shape[:3]
        library = machine.library
        parts = library.single_output_parts(ctypes.byref(call))
        if parts:
            arena.output("parts", (parts,), compute)
        arrivals = library.single_output_arrivals(ctypes.byref(call))
        arena.add("arrivals", np.zeros(arrivals, np.uint32), written=True)
        arena.place()
        for name in arena.places:
            setattr(call, name, arena.address(name))

    def launch(self):
        self.machine.library.single_output(ctypes.byref(self.struct), self.machine.memory.stream)

    def results(self, check=True):
        results = self.arena.results(check)
        np.testing.assert_array_equal(results["arrivals"], 0, "arrivals")
        return results


def same_bits(got, expected, what):
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8), what)


def check_call(machine, streams, chosen, inputs, bound=None, **options):
    """Take the steps on the machine, and compare all that they wrote with the reference."""
    call = Call(machine, streams, chosen, inputs, **options)
    call.launch()
    return check_results(call, streams, chosen, inputs, bound, **options)


def check_results(call, streams, chosen, inputs, bound=None, **options):
    """Compare what a launched call wrote with the reference, which takes the steps too."""
    results = call.results()
    bound = bound_of(streams.sizes.dtype) if bound is None else bound
    m, t = inputs[0].shape[:2]
    heads, n = streams.sizes[:2]
    masks = {name: options.get(name) for name in ("mask", "key_mask", "query_mask")}
    if masks["mask"] is not None:
        masks["mask"] = np.broadcast_to(masks["mask"], (m, heads, t, n))
    expected, expected_scores = streams.expected(chosen, inputs, call.scale, **masks)
    there = np.array([streams.exists(stream) for stream in chosen], bool)
    assert np.isnan(results["output"][~there]).all()
    assert reference.relative_error(results["output"][there], expected[there]) < bound
    if "scores" in results:
        assert np.isnan(results["scores"][~there]).all()
        assert reference.relative_error(results["scores"][there], expected_scores[there]) < bound
    if "window_key" in results:
        for name, x in zip(
            ("window_key", "window_value", "window_key_mask"), streams.windows(chosen), strict=True
        ):
            same_bits(results[name], x, name)
    taken = [streams.position[stream] + t if streams.exists(stream) else -1 for stream in chosen]
    np.testing.assert_array_equal(results["steps_taken"], taken)
    if options.get("update_state", True):
        position = streams.position.copy()
        streams.take(chosen, inputs, masks["key_mask"])
        if "position" not in results:  # The arena has checked that they are unchanged.
            streams.position = position
        for name, x in (
            ("key_cache", streams.key),
            ("value_cache", streams.value),
            ("key_mask_cache", streams.key_mask),
            *([("position", streams.position)] if "position" in results else []),
        ):
            same_bits(results[name], x, name)
    return results
