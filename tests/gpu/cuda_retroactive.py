"""Streams and steps of retroactive attention, for the kernel called through cuda/c_api.h."""

import ctypes

import numpy as np

import cuda_calls
import reference
from arena import Arena

RINGS = ("query_cache", "key_cache", "value_cache", "key_mask_cache")
SUMS = ("softmax", "weighted_sum", "made_with")


class RetroactiveStreams:
    """The arrays of a cache at given positions, without sums, and the reference of each stream.

    Rows that no step has written hold NaN, and so do all sums.
    """

    def __init__(self, random, positions, heads, window, key_dim, value_dim, dtype="float32"):
        count = len(positions)
        self.window, self.dtype = window, np.dtype(dtype)
        self.sizes = (heads, key_dim, value_dim)
        self.state = {
            "query_cache": np.full((count, window, heads, key_dim), np.nan, dtype),
            "key_cache": np.full((count, window, heads, key_dim), np.nan, dtype),
            "value_cache": np.full((count, window, heads, value_dim), np.nan, dtype),
            "key_mask_cache": random.random((count, window)) < 0.5,
            "softmax": np.full((count, heads, 4, window), np.nan),
            "weighted_sum": np.full((count, heads, window, value_dim), np.nan),
            "made_with": np.zeros((count, 2)),
            "position": np.array(positions, np.int64),
        }
        self.references = []
        for stream, position in enumerate(positions):
            taken = int(np.clip(position, 0, window))
            steps = [x[0] for x in self.steps(random, 1, taken)]
            self.references.append(reference.RetroactiveStream(window, *steps))
            self._write(stream, position - taken, steps, np.ones(taken, bool))

    def steps(self, random, m, t):
        """Return query [M, T, H, D], key [M, T, H, D] and value [M, T, H, Dv] of new steps."""
        heads, key_dim, value_dim = self.sizes
        dims = (key_dim, key_dim, value_dim)
        return [random.normal(size=(m, t, heads, dim)).astype(self.dtype) for dim in dims]

    def _write(self, stream, position, steps, has_key):
        rows = (position + np.arange(len(has_key))) % self.window
        kept = slice(max(0, len(has_key) - self.window), None)
        for name, x in zip(RINGS, (*steps, has_key), strict=True):
            self.state[name][stream, rows[kept]] = x[kept]

    def exists(self, stream):
        return 0 <= stream < len(self.references) and self.state["position"][stream] >= 0


class RetroactiveCall:
    """One call of the kernel, placed in memory."""

    def __init__(self, machine, streams, chosen, inputs, *, scale=None, key_mask=None,
                 update_state=True, advance_position=True, recompute=False,
                 misaligned=False, in_order=False):  # fmt: skip
        self.machine = machine
        heads, key_dim, value_dim = streams.sizes
        m, t = inputs[0].shape[:2]
        self.arena = arena = Arena(machine.memory, misaligned)
        for name, x in zip(("query", "key", "value"), inputs, strict=True):
            arena.add(name, x)
        arena.add("key_mask", key_mask)
        if not in_order:
            arena.add("streams", np.asarray(chosen, np.int32))
        for name, x in streams.state.items():
            written = update_state and (name != "position" or advance_position)
            arena.add(name, x, written=written)
        arena.output("output", (m, t, heads, streams.window, value_dim), streams.dtype)
        # Not filled with poison, which is -1 as an integer: that is the value for no such stream.
        arena.add("steps_taken", np.full(m, 77), written=True)
        self.struct = cuda_calls.Retroactive(
            compute_dtype=cuda_calls.DTYPES[streams.dtype.name],
            num_held=len(streams.references),
            num_streams=m,
            num_steps=t,
            num_heads=heads,
            window=streams.window,
            key_dim=key_dim,
            value_dim=value_dim,
            scale=1 / np.sqrt(key_dim) if scale is None else scale,
            update_state=update_state,
            advance_position=advance_position,
            recompute=recompute,
        )
        arena.place()
        for name in arena.places:
            setattr(self.struct, name, arena.address(name))

    def launch(self):
        self.machine.library.retroactive(ctypes.byref(self.struct), self.machine.memory.stream)


def check_call(machine, streams, chosen, inputs, bound=None, **options):
    """Take the steps on the machine. Compare what they wrote with the reference and the rings.

    `streams` then has what the kernel wrote, and goes on from there.
    """
    call = RetroactiveCall(machine, streams, chosen, inputs, **options)
    call.launch()
    results = call.arena.results()
    t = inputs[0].shape[1]
    bound = reference.BOUNDS[streams.dtype.name] if bound is None else bound
    key_mask = options.get("key_mask")
    for i, stream in enumerate(chosen):
        if not streams.exists(stream):
            assert np.isnan(results["output"][i]).all()
            assert results["steps_taken"][i] == -1
            continue
        steps = [x[i] for x in inputs]
        has_key = np.ones(t, bool) if key_mask is None else key_mask[i]
        one = streams.references[stream]
        known = len(one.steps)
        newest = t if streams.window < 64 else min(t, 3)  # The reference of long windows is slow.
        expected = one.take(*steps, options.get("scale"), has_key, newest)
        error = reference.relative_error(results["output"][i][t - newest :], expected)
        assert error < bound, (i, stream)
        position = streams.state["position"][stream]
        assert results["steps_taken"][i] == position + t
        if options.get("update_state", True):
            streams._write(stream, position, steps, has_key)
            if options.get("advance_position", True):
                streams.state["position"][stream] = position + t
        if "position" not in results:
            one.steps, one.has_key = one.steps[:known], one.has_key[:known]
    # The arena has checked that what the call must not write is unchanged.
    for name in (*RINGS, "position"):
        if name in results:
            got, wanted = (x.view(np.uint8) for x in (results[name], streams.state[name]))
            np.testing.assert_array_equal(got, wanted, name)
    taken = [stream for stream in chosen if streams.exists(stream)]
    for name in SUMS:
        if name in results:
            # Recomputing says in made_with that there are no sums, and leaves them.
            written = [] if options.get("recompute") and name != "made_with" else taken
            others = np.setdiff1d(np.arange(len(streams.references)), written)
            got, before = (x[others].view(np.uint8) for x in (results[name], streams.state[name]))
            np.testing.assert_array_equal(got, before, name)
            streams.state[name] = results[name]
    return results
