"""A layer, its streams and the reference's results, for the tests of the whole layer's kernels."""

import ctypes
from typing import NamedTuple

import numpy as np

import cuda_calls
import reference
from arena import Arena
from cuda_single_output import (
    Sizes,
    Streams,
    bound_of,
    compute_dtype,
    same_bits,
    to_float64,
    to_stored,
)


class LayerSizes(NamedTuple):
    attention: Sizes
    query_features: int
    key_features: int
    value_features: int
    output_features: int
    weights_dtype: str = "float32"
    use_bias: bool = True
    use_gate: bool = False
    delay: int = 0


class Layer:
    """The weights of a layer: kernels as they are stored, and biases."""

    def __init__(self, random, sizes):
        self.sizes = sizes
        heads, _, d, dv, dtype = sizes.attention
        compute = compute_dtype(dtype)
        self.kernels, self.biases = {}, {}
        for name, inputs, outputs in (
            ("query", sizes.query_features, heads * d),
            ("key", sizes.key_features, heads * d),
            ("value", sizes.value_features, heads * dv),
            ("gate", sizes.query_features, heads * dv),
            ("output", heads * dv, sizes.output_features),
        ):
            if name == "gate" and not sizes.use_gate:
                continue
            kernel = random.normal(scale=inputs**-0.5, size=(inputs, outputs))
            self.kernels[name] = to_stored(kernel, sizes.weights_dtype)
            if sizes.use_bias:
                self.biases[name] = random.normal(scale=0.3, size=outputs).astype(compute)

    def project(self, name, x):
        """Project in float64: [M, inputs] -> [M, outputs]."""
        y = x.astype(np.float64) @ to_float64(self.kernels[name], self.sizes.weights_dtype)
        return y + self.biases[name] if name in self.biases else y


class LayerStreams(Streams):
    """The attention's streams and, in a layer with a delay, the queries that wait."""

    def __init__(self, random, positions, layer, gaps=0.0):
        sizes = layer.sizes
        super().__init__(random, positions, sizes.attention, gaps)
        heads, _, d, dv, dtype = sizes.attention
        compute, count, delay = compute_dtype(dtype), len(positions), sizes.delay
        self.delayed = {}
        if delay > 0:
            self.delayed["query_ring"] = random.normal(size=(count, delay, heads, d))
            self.delayed["query_mask_ring"] = random.random((count, delay)) < 0.7
            if sizes.use_gate:
                self.delayed["gate_ring"] = random.random((count, delay, heads, dv))
        for name, ring in self.delayed.items():
            ring = ring if ring.dtype == bool else ring.astype(compute)
            for s, position in enumerate(self.position):
                # No step has written these rows.
                ring[s, max(0, position) :] = True if ring.dtype == bool else np.nan
            self.delayed[name] = ring


class LayerCall:
    """One step, placed in memory: `launch` it, and check what it wrote."""

    def __init__(
        self,
        machine,
        layer,
        streams,
        chosen,
        inputs,
        *,
        mask=None,
        key_mask=None,
        query_mask=None,
        update_state=True,
        advance_position=True,
        scores=True,
        result=True,
        multiprocessors=None,
        misaligned=False,
        in_order=False,
    ):
        self.machine, self.layer = machine, layer
        sizes = layer.sizes
        heads, n, d, dv, dtype = sizes.attention
        compute = compute_dtype(dtype)
        m = len(chosen)
        self.scale = 1 / np.sqrt(d)
        self.arena = arena = Arena(machine.memory, misaligned)
        self.in_attention = dict(
            zip(("query", "key", "value"), inputs, strict=True),
            key_mask=key_mask,
            query_mask=query_mask,
            attention_mask=mask,
            streams=None if in_order else np.asarray(chosen, np.int32),
        )
        for name, x in self.in_attention.items():
            arena.add(name, x)
        self.state = dict(
            key_cache=streams.key,
            value_cache=streams.value,
            key_mask_cache=streams.key_mask,
            position=streams.position,
        )
        for name, x in (*self.state.items(), *streams.delayed.items()):
            written = update_state and (name != "position" or advance_position)
            arena.add(name, x, written=written)
        for name, x in layer.kernels.items():
            arena.add(f"{name}_kernel", x)
        for name, x in layer.biases.items():
            arena.add(f"{name}_bias", x)
        if result:
            arena.output("result", (m, sizes.output_features), compute)
        if scores:
            arena.output("scores", (m, heads, 1, n), compute)
        self.struct = call = cuda_calls.CoSiMhaStep(
            attention=cuda_calls.SingleOutput(
                compute_dtype=cuda_calls.DTYPES[np.dtype(compute).name],
                cache_dtype=cuda_calls.DTYPES[dtype],
                num_held=len(streams.position),
                num_streams=m,
                num_steps=1,
                overlap=1,
                num_heads=heads,
                window=n,
                key_dim=d,
                value_dim=dv,
                scale=self.scale,
                update_state=update_state,
                advance_position=advance_position,
                window_parts=1,
            ),
            weights_dtype=cuda_calls.DTYPES[sizes.weights_dtype],
            query_features=sizes.query_features,
            key_features=sizes.key_features,
            value_features=sizes.value_features,
            output_features=sizes.output_features,
            delay=sizes.delay,
            multiprocessors=multiprocessors or machine.memory.multiprocessors,
        )
        if mask is not None:
            call.attention.mask_rows, call.attention.mask_heads = mask.shape[:2]
            call.attention.mask_steps = mask.shape[2]
        library = machine.library
        # With a gate, the step needs buffers of other sizes.
        if sizes.use_gate:
            call.gate_kernel = 1
        scratch = library.co_si_mha_step_scratch_bytes(ctypes.byref(call))
        arrivals = library.co_si_mha_step_arrivals(ctypes.byref(call))
        arena.output("scratch", (scratch // 16 + 1, 16), np.dtype("V16"))
        arena.add("arrivals", np.zeros(arrivals, np.uint32), written=True)
        arena.place()
        for name in arena.places:
            inside = name in self.in_attention or name in self.state
            holder = call.attention if inside or name in ("scores", "arrivals") else call
            setattr(holder, name, arena.address(name))

    def launch(self):
        self.machine.library.co_si_mha_step(ctypes.byref(self.struct), self.machine.memory.stream)

    def results(self):
        results = self.arena.results()
        np.testing.assert_array_equal(results["arrivals"], 0, "arrivals")
        return results


def ring_bound(dtype):
    """Return the bounds of keys and values: relative to each one, and relative to the largest."""
    return reference.ROUNDING.get(dtype, 0), bound_of(dtype)


def check_layer_call(machine, layer, streams, chosen, inputs, **options):
    """Take the step on the machine, and compare all that it wrote with the reference."""
    call = LayerCall(machine, layer, streams, chosen, inputs, **options)
    call.launch()
    return check_layer_results(call, streams, chosen, inputs, **options)


def check_layer_results(call, streams, chosen, inputs, **options):
    """Compare what a launched call wrote with the reference, which takes the step too."""
    results, layer = call.results(), call.layer
    sizes = layer.sizes
    heads, n, d, dv, dtype = sizes.attention
    m, delay = len(chosen), sizes.delay
    update_state = options.get("update_state", True)
    there = np.array([streams.exists(stream) for stream in chosen], bool)
    query = layer.project("query", inputs[0]).reshape(m, 1, heads, d)
    key = layer.project("key", inputs[1]).reshape(m, 1, heads, d)
    value = layer.project("value", inputs[2]).reshape(m, 1, heads, dv)
    gate = np.ones((m, heads, dv))
    if sizes.use_gate:
        gate = 1 / (1 + np.exp(-layer.project("gate", inputs[0]).reshape(m, heads, dv)))
    asks = options.get("query_mask")
    asks = np.ones(m, bool) if asks is None else asks.copy()

    # A last bit of difference may round a key to another 16-bit number, so use the stored key.
    bound = bound_of(dtype)
    if not update_state and dtype in reference.ROUNDING:
        bound = max(bound, reference.ROUNDING[dtype])
    stored = []
    for name, exact in (("key_cache", key), ("value_cache", value)):
        kept = to_stored(exact, dtype)
        if update_state:
            for i in np.flatnonzero(there):
                row = streams.position[chosen[i]] % n
                kept[i, 0] = results[name][chosen[i]][row]
            rounding, of_largest = ring_bound(dtype)
            error = np.abs(to_float64(kept, dtype) - exact)
            largest = np.abs(exact).max(initial=0)
            assert (error <= rounding * np.abs(exact) + of_largest * largest).all(), name
        stored.append(kept)

    expected_delayed = {name: ring.copy() for name, ring in streams.delayed.items()}
    for i in np.flatnonzero(there) if delay > 0 else ():
        stream, position = chosen[i], streams.position[chosen[i]]
        row, due = position % delay, position >= delay
        for name, now in (("query_ring", query[:, 0]), ("gate_ring", gate)):
            if name not in expected_delayed:
                continue
            ring = expected_delayed[name]
            old = ring[stream, row].astype(np.float64)
            if update_state:
                left = results[name][stream, row]
                assert reference.relative_error(left, now[i]) < bound_of(dtype), name
                ring[stream, row] = left
            now[i] = old if due else 0
        ring = expected_delayed["query_mask_ring"]
        old = ring[stream, row]
        if update_state:
            ring[stream, row] = asks[i]
        asks[i] = due and old

    mask = options.get("mask")
    if mask is not None:
        mask = np.broadcast_to(mask, (m, heads, 1, n))
    key_mask = options.get("key_mask")
    key_mask = None if key_mask is None else key_mask[:, None]
    steps = (query, *stored)
    attended, scores = streams.expected(chosen, steps, call.scale, mask, key_mask, asks)
    gated = np.where(asks[:, None, None], attended[:, 0] * gate, 0)
    expected = layer.project("output", gated.reshape(m, heads * dv))
    if "result" in results:
        assert np.isnan(results["result"][~there]).all()
        assert reference.relative_error(results["result"][there], expected[there]) < bound
    if "scores" in results:
        assert np.isnan(results["scores"][~there]).all()
        assert reference.relative_error(results["scores"][there], scores[there]) < bound
    if update_state:
        position = streams.position.copy()
        streams.take(chosen, steps, key_mask)
        if "position" not in results:  # The arena has checked that they are unchanged.
            streams.position = position
        streams.delayed = expected_delayed
        for name, x in (
            ("key_cache", streams.key),
            ("value_cache", streams.value),
            ("key_mask_cache", streams.key_mask),
            *([("position", streams.position)] if "position" in results else []),
            *streams.delayed.items(),
        ):
            same_bits(results[name], x, name)
    return results


def inputs_of(random, layer, m):
    """Return the layer's inputs query, key and value of a step: [M, features] each."""
    sizes = layer.sizes
    features = (sizes.query_features, sizes.key_features, sizes.value_features)
    compute = compute_dtype(sizes.attention.dtype)
    return [random.normal(size=(m, size)).astype(compute) for size in features]
