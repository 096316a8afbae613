"""Time the kernels on this machine's GPU: `python benchmarks/gpu/gpu_benchmark.py --json FILE`.

It times only kernels, by replaying CUDA graphs between events. First it uses several sets of rings
in turn, so many that none is in L2 when its turn comes. Then it uses one set again and again. In
the same run it times a large copy on the device, a kernel that does nothing, and PyTorch's
scaled_dot_product_attention on the same rings, with and without a graph. It needs PyTorch. For
tables and pictures it uses rich and matplotlib if they are installed.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gpu_report
import gpu_sizes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "gpu"))

import cuda_build  # noqa: E402
import cuda_calls  # noqa: E402

EPSILON = 1e-6  # The epsilon of the encoder block's norms.
# The largest difference from PyTorch's outputs, which are computed in the ring's type.
AGREEMENT = {"float64": 1e-10, "float32": 5e-3, "bfloat16": 4e-2, "float16": 1e-2}


class Gpu:
    """The first GPU, used through PyTorch."""

    device = "cuda"

    def __init__(self):
        import torch

        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count
        self.l2_bytes = getattr(properties, "L2_cache_size", 64 << 20)
        self.facts = dict(
            gpu=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            memory_bytes=properties.total_memory,
            driver=_driver(),
            cuda=torch.version.cuda,
        )

    def free_bytes(self):
        import torch

        return torch.cuda.mem_get_info()[0]

    def stream(self):
        import torch

        return torch.cuda.current_stream().cuda_stream

    def synchronize(self):
        import torch

        torch.cuda.synchronize()

    def capture(self, work):
        """Return a function that repeats `work` from a graph."""
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, work):
        """Return the device's time, from `work`'s first kernel to the end of its last one."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def _driver():
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.split("\n")[0].strip()
    return "unknown"


class Bench:
    """The pool of memory and the timing that all measurements share.

    Args:
        gpu: A Gpu.
        memory_bytes: How much memory the rings may take.
        target: The seconds that a timed piece should take.
    """

    def __init__(self, gpu, library, memory_bytes, target=1e-3, repeats=7):
        import torch

        self.torch, self.gpu, self.library = torch, gpu, library
        self.target, self.repeats = target, repeats
        # The pool is split again for each size, and filled once for each type.
        self.pool = torch.empty(memory_bytes, dtype=torch.uint8, device=gpu.device)
        self.filled = None

    def numbers(self, dtype, count, sets=1):
        """Return `sets` tensors of `count` numbers each, one after another in the pool."""
        kind = getattr(self.torch, dtype)
        pool = self.pool.view(kind)
        if self.filled != dtype:
            # Piece by piece, because a generator may need as much memory again.
            for piece in pool.split(1 << 28):
                piece.normal_()
            self.filled = dtype
        return [pool[i * count : (i + 1) * count] for i in range(sets)]

    def dirty(self):
        """Record that the pool no longer holds what it was filled with."""
        self.filled = None

    def time(self, work, times=1):
        """Return the microseconds of one piece of `work`, which consists of `times` pieces."""
        work()
        self.gpu.synchronize()
        once = self.gpu.seconds(work)
        laps = max(1, min(1000, round(self.target / max(once, 1e-7))))

        def all_laps():
            for _ in range(laps):
                work()

        taken = [self.gpu.seconds(all_laps) * 1e6 / (laps * times) for _ in range(self.repeats)]
        return dict(median=statistics.median(taken), least=min(taken), most=max(taken))

    def time_graph(self, work, times):
        """Time a graph of `times` pieces; `work(i)` does the i-th."""
        work(0)  # What happens only in a first call happens here, outside the graph.
        self.gpu.synchronize()

        def pieces():
            for i in range(times):
                work(i)

        return self.time(self.gpu.capture(pieces), times)

    def pieces(self, sets, size_bytes):
        """Return how many steps go into one graph: all sets in turn, for some milliseconds."""
        estimate = 2e-6 + size_bytes / 2e12
        wanted = max(1, min(200, round(self.target / estimate)))
        return -(-wanted // sets) * sets

    def copy(self):
        """Time a large copy on the device, in bytes per second, read plus written."""
        half = min(len(self.pool) // 2, 4 << 30)
        source, target = self.pool[:half], self.pool[half : 2 * half]
        self.dirty()
        figures = self.time(lambda: target.copy_(source))
        moved = 2 * half
        rate = moved / (figures["median"] * 1e-6)
        return dict(bytes=moved, bytes_per_second=rate, microseconds=figures)

    def empty_kernel(self):
        return self.time_graph(lambda _: self.library.nothing(self.gpu.stream()), 200)


class AttentionRings:
    """Several sets of full rings of one size, with a call for each.

    Args:
        window_parts: Into how many parts windows are cut; None: as `PlanWindowParts` says.
    """

    def __init__(self, bench, size, sets, window_parts=None):
        torch = bench.torch
        self.bench, self.size = bench, size
        kind = getattr(torch, size.dtype)
        compute = torch.float64 if size.dtype == "float64" else torch.float32
        s, h, n, d = size.streams, size.heads, size.window, size.dim
        make = dict(device=bench.gpu.device)
        both = bench.numbers(size.dtype, 2 * s * h * n * d, sets)
        self.rings = [x.view(2, s, n, h, d) for x in both]
        self.query = torch.randn(s, 1, h, d, dtype=compute, **make)
        self.key, self.value = torch.randn(2, s, 1, h, d, dtype=torch.float32, **make).to(kind)
        self.output = torch.full((s, 1, h, d), float("nan"), dtype=compute, **make)
        self.has_key = torch.ones(sets, s, n, dtype=torch.bool, **make)
        self.position = torch.full((sets, s), 2 * n + 1, dtype=torch.int64, **make)
        call = cuda_calls.SingleOutput(
            compute_dtype=cuda_calls.DTYPES[str(compute).removeprefix("torch.")],
            cache_dtype=cuda_calls.DTYPES[size.dtype],
            query=self.query.data_ptr(), key=self.key.data_ptr(), value=self.value.data_ptr(),
            output=self.output.data_ptr(),
            num_held=s, num_streams=s, num_steps=1, num_heads=h, window=n, key_dim=d, value_dim=d,
            scale=d**-0.5, update_state=1, advance_position=1,
            window_parts=window_parts
            or bench.library.plan_window_parts(s * h, n, bench.gpu.multiprocessors),
        )  # fmt: skip
        self.window_parts = call.window_parts
        parts = bench.library.single_output_parts(ctypes.byref(call))
        arrivals = bench.library.single_output_arrivals(ctypes.byref(call))
        self.parts = torch.empty(max(1, parts), dtype=compute, **make)
        self.arrivals = torch.zeros(arrivals, dtype=torch.int32, **make)
        call.parts, call.arrivals = self.parts.data_ptr(), self.arrivals.data_ptr()
        self.calls = []
        for i, (key, value) in enumerate(self.rings):
            mine = cuda_calls.SingleOutput.from_buffer_copy(call)
            mine.key_cache, mine.value_cache = key.data_ptr(), value.data_ptr()
            mine.key_mask_cache = self.has_key[i].data_ptr()
            mine.position = self.position[i].data_ptr()
            self.calls.append(mine)
        self.asked = self.query.view(s, h, 1, d).to(kind)

    def step(self, i):
        call = self.calls[i % len(self.calls)]
        self.bench.library.single_output(ctypes.byref(call), self.bench.gpu.stream())

    def sdpa(self, i):
        key, value = self.rings[i % len(self.rings)].transpose(2, 3)
        return self.bench.torch.nn.functional.scaled_dot_product_attention(self.asked, key, value)

    def flashinfer(self):
        """Return a function like `sdpa` that calls FlashInfer: each stream's ring is one page.

        Raises:
            ImportError: FlashInfer is not installed.
        """
        import flashinfer

        torch, size = self.bench.torch, self.size
        make = dict(dtype=torch.int32, device=self.bench.gpu.device)
        pages = torch.arange(size.streams + 1, **make)
        rows = torch.full((size.streams,), size.window, **make)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=self.bench.gpu.device)
        decoder = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_cuda_graph=True, paged_kv_indptr_buffer=pages,
            paged_kv_indices_buffer=pages[:-1].clone(), paged_kv_last_page_len_buffer=rows,
        )  # fmt: skip
        kind = getattr(torch, size.dtype)
        decoder.plan(
            pages.clone(), pages[:-1].clone(), rows.clone(), size.heads, size.heads, size.dim,
            size.window, q_data_type=kind, kv_data_type=kind,
        )  # fmt: skip
        query = self.asked.view(size.streams, size.heads, size.dim)

        def step(i):
            key, value = self.rings[i % len(self.rings)]
            return decoder.run(query, (key, value))

        return step

    def check(self):
        """Check that PyTorch's output is the same, within the precision of the ring's type."""
        self.step(0)
        return _agreement(self.output.flatten(), self.sdpa(0).flatten(), self.size.dtype)


def _agreement(found, expected, dtype):
    """Return the largest difference of two tensors, relative to the largest expected number.

    Raises:
        RuntimeError: If it is too large for the type.
    """
    found, expected = found.double(), expected.double()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < AGREEMENT[dtype]:  # True for NaN, too.
        raise RuntimeError(f"PyTorch's output differs by {error:g}, expected <{AGREEMENT[dtype]:g}")
    return error


def measure_attention(bench, size):
    """Return an entry of the JSON's `attention`."""
    skipped = gpu_sizes.why_skipped(size, len(bench.pool))
    if skipped:
        return dict(size=size._asdict(), skipped=skipped)
    sets = _ring_sets(bench, size)
    rings = AttentionRings(bench, size, sets)
    error = rings.check()
    times = bench.pieces(sets, size.bytes)
    few = bench.pieces(1, size.bytes)
    ours = dict(out_of_l2=bench.time_graph(rings.step, times))
    ours["in_l2"] = (
        ours["out_of_l2"] if sets == 1 else bench.time_graph(lambda _: rings.step(0), few)
    )
    for call in rings.calls:
        call.overlap = 1
    ours["overlapping"] = bench.time_graph(rings.step, times)
    sdpa = dict(graph=bench.time_graph(rings.sdpa, times))
    turns = min(times, 200)
    sdpa["eager"] = bench.time(lambda: [rings.sdpa(i) for i in range(turns)] and None, turns)
    entry = dict(
        size=size._asdict(),
        bytes=size.bytes,
        operations=size.operations,
        window_parts=rings.window_parts,
        sets=sets,
        error_against_sdpa=error,
        ours=ours,
        sdpa=sdpa,
    )
    if size in gpu_sizes.GOAL_SIZES:
        entry.update(measure_flashinfer(bench, rings, times))
    return entry


def measure_flashinfer(bench, rings, times):
    """Return what of an entry is FlashInfer's: its time, why there is none, or nothing.

    It is timed for few sizes, because it first compiles a kernel for each type and head size.
    """
    try:
        step = rings.flashinfer()
        _agreement(step(0).flatten(), rings.sdpa(0).flatten(), rings.size.dtype)
        return dict(flashinfer=bench.time_graph(step, times))
    except ImportError:
        return {}
    except Exception as error:  # If a rival fails, our own figures stay.
        return dict(flashinfer_failed=f"{type(error).__name__}: {error}")


def _ring_sets(bench, size):
    """Return how many sets of rings to use in turn, as far as they fit."""
    sets = gpu_sizes.copies_beyond(bench.gpu.l2_bytes, size.ring_bytes)
    return max(1, min(sets, len(bench.pool) // size.ring_bytes))


def measure_window_parts(bench, size):
    """Return an entry of the JSON's `window_parts`: a size with each number of parts."""
    skipped = gpu_sizes.why_skipped(size, len(bench.pool))
    if skipped:
        return dict(size=size._asdict(), skipped=skipped)
    sets = _ring_sets(bench, size)
    tried = []
    for parts in gpu_sizes.window_parts(size.window):
        rings = AttentionRings(bench, size, sets, parts)
        rings.check()
        figures = bench.time_graph(rings.step, bench.pieces(sets, size.bytes))
        tried.append(dict(parts=parts, out_of_l2=figures))
    planned = AttentionRings(bench, size, 1).window_parts
    return dict(size=size._asdict(), planned=planned, tried=tried)


class RetroactiveStream:
    """Streams with full windows, and a call that takes a step of them."""

    def __init__(self, bench, size):
        torch = bench.torch
        self.bench, self.size = bench, size
        s, h, n, d = size
        make = dict(device=bench.gpu.device)
        self.rings = torch.randn(3, s, n, h, d, **make)
        self.query, self.key, self.value = torch.randn(3, s, 1, h, d, **make)
        self.output = torch.full((s, h, n, d), float("nan"), **make)
        self.has_key = torch.ones(s, n, dtype=torch.bool, **make)
        self.position = torch.full((s,), 2 * n + 1, dtype=torch.int64, **make)
        double = dict(dtype=torch.float64, **make)
        self.softmax = torch.zeros(s, h, 4, n, **double)
        self.weighted_sum = torch.zeros(s, h, n, d, **double)
        self.made_with = torch.zeros(s, 2, **double)
        query, key, value = self.rings
        self.call = cuda_calls.Retroactive(
            compute_dtype=cuda_calls.FLOAT32,
            query=self.query.data_ptr(), key=self.key.data_ptr(), value=self.value.data_ptr(),
            query_cache=query.data_ptr(), key_cache=key.data_ptr(), value_cache=value.data_ptr(),
            key_mask_cache=self.has_key.data_ptr(), softmax=self.softmax.data_ptr(),
            weighted_sum=self.weighted_sum.data_ptr(), made_with=self.made_with.data_ptr(),
            position=self.position.data_ptr(), output=self.output.data_ptr(),
            num_held=s, num_streams=s, num_steps=1, num_heads=h, window=n, key_dim=d, value_dim=d,
            scale=d**-0.5, update_state=1, advance_position=1,
        )  # fmt: skip

    def step(self, recompute):
        self.call.recompute = int(recompute)
        self.bench.library.retroactive(ctypes.byref(self.call), self.bench.gpu.stream())

    def sdpa(self):
        """Compute the whole window again in PyTorch. The rows are in the order of the ring."""
        query, key, value = self.rings.transpose(2, 3)
        return self.bench.torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def check(self, recompute):
        """Check that PyTorch's outputs are the same, after a step that updates sums of its own."""
        self.step(recompute)
        self.step(recompute)
        oldest = self.position[0].item() % self.size.window
        return _agreement(self.output, self.sdpa().roll(-oldest, 2), "float32")


def measure_retroactive(bench, size):
    """Return an entry of the JSON's `retroactive`."""
    stream = RetroactiveStream(bench, size)
    times = bench.pieces(1, size.bytes)
    entry = dict(size=size._asdict(), bytes=size.bytes, error_against_sdpa={})
    for name, recompute in (("update", False), ("recompute", True)):
        entry["error_against_sdpa"][name] = stream.check(recompute)
        stream.step(recompute)  # Not timed: it computes all sums, if there are none yet.
        entry[name] = bench.time_graph(lambda _, how=recompute: stream.step(how), times)
    entry["sdpa"] = bench.time_graph(lambda _: stream.sdpa(), times)
    return entry


class LayerWeights:
    """Several layers' weights and rings, with a step for each."""

    def __init__(self, bench, size, sets):
        torch = bench.torch
        self.bench, self.size, self.sets = bench, size, sets
        kind, compute = getattr(torch, size.dtype), torch.float32
        attention = size.attention
        m, e, h, n, d = size.streams, size.features, size.heads, size.window, attention.dim
        make = dict(device=bench.gpu.device)
        # The kernels [E, E] of query, key, value and output, the feed-forward kernels, the rings.
        shapes = [(4, e, e), (e, size.hidden), (size.hidden, e), (2, m, n, h, d)]
        counts = [math.prod(shape) for shape in shapes]
        all_numbers = [
            [x.view(shape) for x, shape in zip(numbers.split(counts), shapes, strict=True)]
            for numbers in bench.numbers(size.dtype, sum(counts), sets)
        ]
        bench.dirty()
        for kernels, up, down, _ in all_numbers:
            kernels *= e**-0.5
            up *= e**-0.5
            down *= max(1, size.hidden) ** -0.5
        self.kernels = [x[0] for x in all_numbers]
        self.feed_forward = [x[1:3] for x in all_numbers]
        self.rings = [x[3] for x in all_numbers]
        self.x = torch.randn(m, e, dtype=compute, **make)
        self.biases = torch.randn(4, e, dtype=compute, **make) * 0.1
        self.result = torch.full((m, e), float("nan"), dtype=compute, **make)
        self.has_key = torch.ones(sets, m, n, dtype=torch.bool, **make)
        self.position = torch.full((sets, m), 2 * n + 1, dtype=torch.int64, **make)
        x = self.x.data_ptr()
        step = cuda_calls.CoSiMhaStep(
            attention=cuda_calls.SingleOutput(
                compute_dtype=cuda_calls.FLOAT32, cache_dtype=cuda_calls.DTYPES[size.dtype],
                query=x, key=x, value=x,
                num_held=m, num_streams=m, num_steps=1, num_heads=h, window=n, key_dim=d,
                value_dim=d, scale=d**-0.5, update_state=1, advance_position=1, window_parts=1,
                overlap=1,
            ),
            weights_dtype=cuda_calls.DTYPES[size.dtype],
            query_features=e, key_features=e, value_features=e, output_features=e,
            result=self.result.data_ptr(), multiprocessors=bench.gpu.multiprocessors,
        )  # fmt: skip
        library = bench.library
        scratch = library.co_si_mha_step_scratch_bytes(ctypes.byref(step))
        arrivals = library.co_si_mha_step_arrivals(ctypes.byref(step))
        self.scratch = torch.empty(scratch, dtype=torch.uint8, **make)
        self.arrivals = torch.zeros(arrivals, dtype=torch.int32, **make)
        step.scratch, step.attention.arrivals = self.scratch.data_ptr(), self.arrivals.data_ptr()
        names = ("query", "key", "value", "output")
        for name, bias in zip(names, self.biases, strict=True):
            setattr(step, f"{name}_bias", bias.data_ptr())
        self.steps = []
        for i in range(sets):
            mine = cuda_calls.CoSiMhaStep.from_buffer_copy(step)
            for name, kernel in zip(names, self.kernels[i], strict=True):
                setattr(mine, f"{name}_kernel", kernel.data_ptr())
            key, value = self.rings[i]
            mine.attention.key_cache, mine.attention.value_cache = key.data_ptr(), value.data_ptr()
            mine.attention.key_mask_cache = self.has_key[i].data_ptr()
            mine.attention.position = self.position[i].data_ptr()
            self.steps.append(mine)
        if size.hidden:
            self._put_into_blocks()
        # Torch's layers have kernels [out, in]. These are views, all in the ring's type.
        self.torch_x = self.x.to(kind)
        self.torch_biases = self.biases.to(kind)
        self.torch_row = (self.position[0, :1] % n).expand(1)

    def _put_into_blocks(self):
        """Turn the layers' steps into steps of encoder blocks."""
        torch, size, library = self.bench.torch, self.size, self.bench.library
        make = dict(dtype=torch.float32, device=self.bench.gpu.device)
        # The scales and offsets of two norms, and the last bias.
        self.vectors = torch.randn(5, size.features, **make)
        self.hidden_bias = torch.randn(size.hidden, **make)
        names = [
            f"{norm}_norm_{x}" for norm in ("attention", "output") for x in ("scale", "offset")
        ]
        names.append("output_bias")
        blocks = []
        for step, (up, down) in zip(self.steps, self.feed_forward, strict=True):
            block = cuda_calls.CoSiEncoderStep(
                attention=step, epsilon=EPSILON, hidden_features=size.hidden, activation=1,
                hidden_kernel=up.data_ptr(), hidden_bias=self.hidden_bias.data_ptr(),
                output_kernel=down.data_ptr(), result=self.result.data_ptr(),
            )  # fmt: skip
            for name, vector in zip(names, self.vectors, strict=True):
                setattr(block, name, vector.data_ptr())
            blocks.append(block)
        scratch = library.co_si_encoder_step_scratch_bytes(ctypes.byref(blocks[0]))
        self.block_scratch = torch.empty(scratch, dtype=torch.uint8, device=make["device"])
        for block in blocks:
            block.scratch = self.block_scratch.data_ptr()
        self.steps = blocks
        kind = getattr(torch, size.dtype)
        self.torch_vectors, self.torch_hidden_bias = (
            x.to(kind) for x in (self.vectors, self.hidden_bias)
        )

    def step(self, i):
        step = self.steps[i % self.sets]
        library = self.bench.library
        take = library.co_si_encoder_step if self.size.hidden else library.co_si_mha_step
        take(ctypes.byref(step), self.bench.gpu.stream())

    def set_overlap(self, overlap):
        """Set whether the launches of a step overlap, where the GPU can do that."""
        for step in self.steps:
            layer = step.attention if self.size.hidden else step
            layer.attention.overlap = int(overlap)

    def torch_step(self, i):
        """Take a step the usual way in PyTorch: project, write a row, SDPA, project back."""
        torch, (m, e, h, *_) = self.bench.torch, self.size
        addmm = torch.addmm
        kernels, (keys, values) = self.kernels[i % self.sets], self.rings[i % self.sets]
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # Views [M, H, N, D].
        query, key, value = (
            addmm(self.torch_biases[j], self.torch_x, kernels[j]).view(m, h, 1, -1)
            for j in range(3)
        )
        keys.index_copy_(2, self.torch_row, key)
        values.index_copy_(2, self.torch_row, value)
        attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        attended = addmm(self.torch_biases[3], attended.reshape(m, -1), kernels[3])
        if not self.size.hidden:
            return attended
        norm, gelu = torch.nn.functional.layer_norm, torch.nn.functional.gelu
        up, down = self.feed_forward[i % self.sets]
        scale, offset, last_scale, last_offset, bias = self.torch_vectors
        between = norm(self.torch_x + attended, (e,), scale, offset, EPSILON)
        forward = addmm(bias, gelu(addmm(self.torch_hidden_bias, between, up)), down)
        return norm(between + forward, (e,), last_scale, last_offset, EPSILON)

    def check(self):
        self.step(0)
        expected = self.torch_step(0)  # This writes the same row again.
        return _agreement(self.result, expected, self.size.dtype)


def measure_layer(bench, size):
    """Return an entry of the JSON's `layer`."""
    size_bytes = size.weights_bytes + size.attention.ring_bytes
    sets = gpu_sizes.copies_beyond(bench.gpu.l2_bytes, size_bytes)
    sets = max(1, min(sets, len(bench.pool) // size_bytes))
    layers = LayerWeights(bench, size, sets)
    # PyTorch's step writes the same row as our first step.
    error = layers.check()
    times, few = bench.pieces(sets, size.bytes), bench.pieces(1, size.bytes)
    ours = dict(
        out_of_l2=bench.time_graph(layers.step, times),
        in_l2=bench.time_graph(lambda _: layers.step(0), few),
    )
    layers.set_overlap(False)
    ours["apart"] = bench.time_graph(layers.step, times)
    rival = dict(graph=bench.time_graph(layers.torch_step, times))
    turns = min(times, 200)
    rival["eager"] = bench.time(
        lambda: [layers.torch_step(i) for i in range(turns)] and None, turns
    )
    return dict(
        size=size._asdict(),
        weights_bytes=size.weights_bytes,
        bytes=size.bytes,
        operations=size.operations,
        sets=sets,
        error_against_torch=error,
        ours=ours,
        torch=rival,
    )


def run(bench, attention, layer, seconds, save=lambda found: None, window_parts=(), retroactive=()):
    """Measure all sizes, and skip those that are left when the seconds are over.

    An error is recorded in the entry of its size. `save` is called now and then with the results so
    far, in case the process is killed.
    """
    import torch

    begin = time.monotonic()
    found = dict(
        machine=dict(
            **bench.gpu.facts,
            multiprocessors=bench.gpu.multiprocessors,
            l2_bytes=bench.gpu.l2_bytes,
            torch=torch.__version__,
        ),
        pool_bytes=len(bench.pool),
        copy=bench.copy(),
        empty_kernel=bench.empty_kernel(),
        attention=[],
        layer=[],
        window_parts=[],
        retroactive=[],
        failures=[],
    )
    jobs = [("layer", measure_layer, size) for size in layer]
    jobs += [("retroactive", measure_retroactive, size) for size in retroactive]
    jobs += [("window_parts", measure_window_parts, size) for size in window_parts]
    jobs += [("attention", measure_attention, size) for size in attention]
    with torch.inference_mode():
        for done, (part, measure, size) in enumerate(jobs):
            if done % 20 == 19:
                found["seconds"] = time.monotonic() - begin
                save(found)
            if time.monotonic() - begin > seconds:
                entry = dict(size=size._asdict(), skipped=f"no time left of {seconds:g} s")
            else:
                try:
                    entry = measure(bench, size)
                except (RuntimeError, cuda_calls.Refused) as error:
                    why = f"failed: {str(error).splitlines()[0]}"
                    found["failures"].append(f"{size}: {why}")
                    entry = dict(size=size._asdict(), skipped=why)
            found[part].append(entry)
    found["copy_again"] = bench.copy()
    found["goals"] = gpu_report.goals(found)
    found["seconds"] = time.monotonic() - begin
    return found


def write(found, json_path, picture):
    """Write the JSON and the picture, if they are asked for."""
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        part = json_path.with_name(f"{json_path.name}.part")
        part.write_text(json.dumps(found, indent=1))
        part.replace(json_path)  # The file is complete at any time.
    if picture:
        try:
            gpu_report.draw(picture, found)
        except ImportError as error:
            print(f"No picture: {error}.", file=sys.stderr)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].split(":")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seconds", type=float, default=200, help="start no size after these")
    parser.add_argument("--memory-gb", type=float, default=70, help="the most to use")
    parser.add_argument("--quick", action="store_true", help="measure few sizes, once")
    parser.add_argument("--predict", action="store_true", help="print the rows of docs/gpu.md")
    parser.add_argument("--from", dest="recorded", type=Path, help="show a JSON, measure nothing")
    chosen = parser.parse_args(arguments)
    if chosen.predict:
        print("\n".join(gpu_report.predictions()))
        return 0
    if chosen.recorded:
        found = json.loads(chosen.recorded.read_text())
    else:
        capability = cuda_build.find_capability()
        if capability is None:
            print("Found no GPU on this machine, expected one to measure.", file=sys.stderr)
            return 1
        try:
            import torch
        except ImportError:
            print("The benchmark needs PyTorch: `pip install torch`.", file=sys.stderr)
            return 1
        if not torch.cuda.is_available():
            print("PyTorch finds no GPU: install a build of PyTorch with CUDA.", file=sys.stderr)
            return 1
        # A capture first collects garbage. Freezing makes it skip what exists already.
        gc.collect()
        gc.freeze()
        path = cuda_build.build(cuda_build.default_directory(False, capability), False, capability)
        gpu = Gpu()
        memory = min(chosen.memory_gb * 1e9, 0.85 * gpu.free_bytes())
        bench = Bench(gpu, cuda_calls.CudaLibrary(path), int(memory) // 16 * 16)
        sizes = gpu_sizes.attention_sizes(), gpu_sizes.layer_sizes()
        parts, retroactive = gpu_sizes.window_parts_sizes(), gpu_sizes.retroactive_sizes()
        if chosen.quick:
            bench.repeats = 1
            sizes = sizes[0][:40:8], sizes[1][:1]
            parts, retroactive = parts[:1], retroactive[:2]
        found = run(
            bench, *sizes, chosen.seconds, lambda found: write(found, chosen.json, None),
            parts, retroactive,
        )  # fmt: skip
    gpu_report.print_tables(found)
    write(found, chosen.json, chosen.picture)
    for failure in found["failures"]:
        print(failure, file=sys.stderr)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
