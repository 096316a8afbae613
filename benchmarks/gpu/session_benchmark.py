"""Time whole models on a GPU: `python benchmarks/gpu/session_benchmark.py --json FILE`.

It times `Session.step`, with NumPy arrays and with arrays on the GPU, the latter also with launches
that do not overlap. Beside it is the CPU's session. The rival is the same step in PyTorch: a ring,
scaled_dot_product_attention, a CUDA graph. All are timed by the clock on the wall, from the call to
when the output can be read. The bound is the time of the least bytes of a step at the rate of a
large copy on the device. With `--persistent` it times only a stream's step of each encoder, as a
graph of launches and in persistent kernels.

The models are the bundle's plans (tools/gpu/bundle.py) with random weights. Each result is printed
and written when it is there, the most telling first. It needs this package, PyTorch and the bundle.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "gpu"))

import bundle  # noqa: E402
import gpu_benchmark  # noqa: E402
import session_report  # noqa: E402
import session_sizes  # noqa: E402

AGREEMENT = 1e-3  # The largest difference from the CPU's outputs, relative to the largest output.
COPY_BYTES = 1 << 30
ROOM = 5  # How many times a step's least bytes must be free.


class TorchArrays:
    """Arrays on the GPU, by PyTorch."""

    device = "cuda:0"

    def __init__(self):
        import torch

        self.torch, self.gpu = torch, gpu_benchmark.Gpu()

    def array(self, host):
        """Return a copy on the GPU."""
        return self.torch.from_numpy(host).to(self.gpu.device)

    def free_bytes(self):
        self.torch.cuda.empty_cache()
        return self.gpu.free_bytes()

    def copy_rate(self):
        """Return the bytes per second that a large copy on the device reads and writes."""
        source = self.torch.empty(COPY_BYTES, dtype=self.torch.uint8, device=self.gpu.device)
        target = self.torch.empty_like(source)
        taken = [self.gpu.seconds(lambda: target.copy_(source)) for _ in range(8)][1:]
        return 2 * COPY_BYTES / statistics.median(taken)


class TorchRival:
    """A size's step in PyTorch, with random weights: for its time, not for its numbers.

    Each layer has rings [M, H, N, D], into which a step writes a row, the same each time. Only the
    retroactive layer computes all outputs of its window; encoders compute the newest.
    """

    def __init__(self, torch, size, streams, device):
        self.torch, self.size, self.streams = torch, size, streams
        e, f = size.features, size.hidden

        def random(*shape):
            return torch.randn(*shape, device=device) * shape[0] ** -0.5

        rings = (streams, size.heads, size.window, e // size.heads)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.x = random(streams, size.inputs or e)
        self.first = random(size.inputs, e) if size.inputs else None
        self.last = random(e, size.outputs) if size.outputs else None
        count = 3 if size.kind == "retroactive" else 2
        self.layers = [
            dict(
                projections=random(e, 3 * e), output=random(e, e), bias=random(e),
                rings=[random(*rings) for _ in range(count)],
                up=random(e, f) if f else None, hidden_bias=random(f) if f else None,
                down=random(f, e) if f else None,
            )
            for _ in range(size.layers)
        ]  # fmt: skip

    def attention(self, layer, x):
        size, torch = self.size, self.torch
        parts = (x @ layer["projections"]).view(self.streams, 3, size.heads, 1, -1).unbind(1)
        newest = parts if size.kind == "retroactive" else parts[1:]
        for ring, row in zip(layer["rings"], newest, strict=True):
            ring.index_copy_(2, self.row, row)
        query, key, value = [parts[0], *layer["rings"]][-3:]
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        y = y.transpose(1, 2).reshape(-1, size.features)  # All rows that were asked for.
        return torch.addmm(layer["bias"], y, layer["output"])

    def step(self):
        torch, functional = self.torch, self.torch.nn.functional
        x = self.x if self.first is None else self.x @ self.first
        if self.size.kind == "retroactive":
            return self.attention(self.layers[0], x)
        of = (self.size.features,)
        for layer in self.layers:
            x = functional.layer_norm(x + self.attention(layer, x), of)
            y = functional.gelu(torch.addmm(layer["hidden_bias"], x, layer["up"]))
            x = functional.layer_norm(x + torch.addmm(layer["bias"], y, layer["down"]), of)
        return x if self.last is None else x @ self.last


def microseconds(work, target=0.03, repeats=5):
    """Return the microseconds of `work` by the clock on the wall: median, least and most.

    Args:
        work: A function that returns when its work is done.
        target: The seconds of a timed piece.
        repeats: How many pieces; a piece that takes longer than a second is timed once.
    """
    work()
    begin = time.perf_counter()
    work()
    once = time.perf_counter() - begin
    if once > 1:
        return dict(median=once * 1e6, least=once * 1e6, most=once * 1e6)
    laps = max(1, min(2000, round(target / max(once, 1e-7))))
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(laps):
            work()
        taken.append((time.perf_counter() - begin) * 1e6 / laps)
    return dict(median=statistics.median(taken), least=min(taken), most=max(taken))


def least_bytes(session, weights_bytes, streams):
    """Return the least bytes of a step: weights once, each stream's state, inputs and outputs.

    A table of positions counts as a whole, although each stream reads one row: 1.4 % of
    CoOadTR-b1's bytes.
    """
    ends = sum(
        np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape))
        for spec in (*session.inputs, *session.outputs)
    )
    return weights_bytes + streams * (session.state_bytes + ends)


def cuda_library():
    """Return the library that sessions on a GPU use."""
    from continual_transformers_tf import native

    library = ctypes.CDLL(native.cuda_session_library())
    library.continual_transformers_cuda_persistent_graphs.restype = ctypes.c_int64
    return library


@contextlib.contextmanager
def launches(*, overlap=True, persist=False):
    """Choose how steps are launched in the graphs that sessions make within the context.

    Args:
        overlap: Whether launches may overlap.
        persist: Whether a step of one stream may be a persistent kernel.
    """
    library = cuda_library()

    def choose(overlap, persist):
        library.continual_transformers_cuda_set_overlap(int(overlap))
        library.continual_transformers_cuda_set_persist(int(persist))

    choose(overlap, persist)
    try:
        yield
    finally:
        choose(True, False)


def persistent_graphs():
    """Return how many graphs with persistent kernels sessions have made.

    A graph that the driver refuses does not count: the session makes one of launches instead.
    """
    return cuda_library().continual_transformers_cuda_persistent_graphs()


def compare(outputs, expected):
    """Return the largest difference of outputs from the CPU's, relative to the largest of these.

    Raises:
        RuntimeError: If it is too large.
    """
    error = float(np.abs(np.stack(outputs) - expected).max() / np.abs(expected).max())
    if not error < AGREEMENT:  # True for NaN, too.
        raise RuntimeError(f"the CPU's output differs by {error:g}, expected <{AGREEMENT:g}")
    return error


def measure(machine, size, streams, path, copy_rate, save=lambda entry: None, **timing):
    """Return the entry of one size and number of streams.

    `save` is called with the entry as far as it is known, after each of its figures.

    Raises:
        RuntimeError: If the GPU's outputs are not the CPU's.
    """
    from continual_transformers_tf.session import Session

    on_gpu, no_overlap = (Session.load(path, device=machine.device) for _ in range(2))
    on_cpu = Session.load(path, threads=os.cpu_count() or 1)
    (given,), (returned,) = on_gpu.inputs, on_gpu.outputs
    header = bundle.beginning(path.read_bytes())
    size_bytes = least_bytes(on_gpu, bundle.weights_bytes(header), streams)
    # Streams of two sessions, a step's values, and the rival's rings.
    if ROOM * size_bytes > machine.free_bytes():
        return dict(skipped=f"{ROOM * size_bytes / 1e9:.1f} GB do not fit into the GPU's memory")
    ids, there = on_gpu.open(streams), on_cpu.open(streams)
    no_overlap_ids = no_overlap.open(streams)
    random = np.random.default_rng(streams)
    # All streams begin as copies of one whose window is full. The CPU fills it, so that both steps
    # below start from a state that is right; it would take minutes to fill a long window.
    past = random.standard_normal((1, size.window, *given.shape)).astype(given.dtype)
    filler = on_cpu if size.window <= 1024 else on_gpu
    filled = filler.open()
    filler.steps(past, streams=filled)
    copies = filler.get_state(filled) * streams
    on_gpu.set_state(copies, ids)
    no_overlap.set_state(copies, no_overlap_ids)
    on_cpu.set_state(copies, there)
    x = random.standard_normal((streams, *given.shape)).astype(given.dtype)
    out = np.empty((streams, *returned.shape), returned.dtype)
    expected = on_cpu.step(x, streams=there)
    outputs = [on_gpu.step(x, streams=ids)]
    with launches(overlap=False):
        outputs.append(no_overlap.step(x, streams=no_overlap_ids))  # It makes the graph.
    error = compare(outputs, expected)
    entry = dict(
        size=size._asdict(), streams=streams, bytes=size_bytes, error_against_cpu=error,
        bound=size_bytes / copy_rate * 1e6,
    )  # fmt: skip
    x_there, out_there = machine.array(x), machine.array(out)
    works = dict(
        device_arrays=lambda: on_gpu.step(x_there, streams=ids, out=out_there),
        no_overlap=lambda: no_overlap.step(x_there, streams=no_overlap_ids, out=out_there),
        numpy_arrays=lambda: on_gpu.step(x, streams=ids, out=out),
        torch_graph=rival_step(machine, size, streams),
        cpu=lambda: on_cpu.step(x, streams=there, out=out),
    )
    for name, work in works.items():
        entry[name] = microseconds(work, **timing)
        save(entry)
    return entry


def measure_persistent(machine, size, path, copy_rate, **timing):
    """Return the entry of a stream's step, as a graph of launches and in persistent kernels.

    Raises:
        RuntimeError: If the outputs are not the CPU's, or the driver refuses persistent kernels.
    """
    from continual_transformers_tf.session import Session

    on_cpu = Session.load(path)
    (given,), (returned,) = on_cpu.inputs, on_cpu.outputs
    random = np.random.default_rng(1)
    x = random.standard_normal((1, size.window + 2, *given.shape)).astype(given.dtype)
    x_there = machine.array(x[:, -1])
    out = machine.array(np.empty((1, *returned.shape), returned.dtype))
    weights_bytes = bundle.weights_bytes(bundle.beginning(path.read_bytes()))
    entry = dict(size=size._asdict(), streams=1)
    for name in ("device_arrays", "persistent"):
        session = Session.load(path, device=machine.device)
        stream, there = session.open(), on_cpu.open()
        before = persistent_graphs()
        with launches(persist=name == "persistent"):
            outputs = [session.step(x[:, 0], streams=stream)]  # It makes the graph.
        if (persistent_graphs() > before) != (name == "persistent"):
            raise RuntimeError("the GPU's driver refuses persistent kernels")
        compare(outputs, on_cpu.step(x[:, 0], streams=there))
        for filled, at in ((session, stream), (on_cpu, there)):
            filled.steps(x[:, 1:-1], streams=at)  # Another graph takes these.
        outputs = [session.step(x[:, -1], streams=stream)]
        error = compare(outputs, on_cpu.step(x[:, -1], streams=there))
        step = functools.partial(session.step, x_there, streams=stream, out=out)
        entry[name] = microseconds(step, **timing)
        entry["error_against_cpu"] = max(error, entry.get("error_against_cpu", 0.0))
    entry["bytes"] = least_bytes(session, weights_bytes, 1)
    entry["bound"] = entry["bytes"] / copy_rate * 1e6
    return entry


def run_persistent(machine, folder, save=lambda found: None, sizes=None, **timing):
    """Measure a stream's step of each encoder in persistent kernels."""
    rate = machine.copy_rate()
    found = dict(machine=machine.gpu.facts, copy_bytes_per_second=rate, entries=[], failures=[])
    encoders = [size for size in session_sizes.SIZES if size.kind != "retroactive"]
    with tempfile.TemporaryDirectory() as temporary:
        for size in encoders if sizes is None else sizes:
            path = bundle.fill(
                bundle.plan_file(size.name, folder), Path(temporary, f"{size.name}.safetensors")
            )
            try:
                entry = measure_persistent(machine, size, path, rate, **timing)
                found["entries"].append(entry)
                print(session_report.persistent_line(entry), flush=True)
            except RuntimeError as error:
                found["failures"].append(f"{size.name}: {str(error).splitlines()[0]}")
            save(found)
    return found


def measure_compiled(machine, size, streams, **timing):
    """Return what of an entry is `torch.compile`'s: its time, or why there is none."""
    try:
        step = rival_step(machine, size, streams, torch_compile=True)
        return dict(torch_compiled=microseconds(step, **timing))
    except Exception as error:  # If a rival fails, our own figures stay.
        return dict(torch_compiled_failed=f"{type(error).__name__}: {error}")


def rival_step(machine, size, streams, torch_compile=False):
    """Return a function that copies an input, replays PyTorch's step, and waits for it.

    Args:
        torch_compile: Whether the step is compiled by `torch.compile`, which takes a minute.
    """
    torch, gpu = machine.torch, machine.gpu
    with torch.inference_mode():
        rival = TorchRival(torch, size, streams, gpu.device)
        given = rival.x.clone()
        one_step = torch.compile(rival.step) if torch_compile else rival.step
        for _ in range(3):  # What happens only in first calls happens outside the graph.
            one_step()
        gpu.synchronize()
        replay = gpu.capture(one_step)

    def step():
        with torch.inference_mode():
            rival.x.copy_(given)
            replay()
        gpu.synchronize()

    return step


def run(machine, folder, seconds, save=lambda found: None, jobs=None, **timing):
    """Measure all jobs, and skip those that are left when the seconds are over.

    An error is recorded in the entry of its job. `save` is called after every figure.
    """
    begin = time.monotonic()
    rate = machine.copy_rate()
    found = dict(machine=machine.gpu.facts, copy_bytes_per_second=rate, entries=[], failures=[])
    print("\n".join(session_report.heading(found)), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for size, streams in session_sizes.jobs() if jobs is None else jobs:
            entry = dict(size=size._asdict(), streams=streams)
            found["entries"].append(entry)
            try:
                if time.monotonic() - begin > seconds:
                    entry["skipped"] = f"no time left of {seconds:g} s"
                else:
                    path = Path(temporary, f"{size.name}.safetensors")
                    if not path.exists():
                        bundle.fill(bundle.plan_file(size.name, folder), path)

                    def keep(figures, entry=entry):
                        entry.update(figures)
                        save(found)

                    keep(measure(machine, size, streams, path, rate, keep, **timing))
            except (RuntimeError, ValueError) as error:  # Full memory is one, too.
                entry["skipped"] = f"failed: {str(error).splitlines()[0]}"
                found["failures"].append(f"{size.name} M={streams}: {entry['skipped']}")
            print(session_report.line(entry), flush=True)
            save(found)
    # Last, because it takes a minute for each model.
    for entry in found["entries"]:
        size = session_sizes.SessionSize(**entry["size"])
        in_time = time.monotonic() - begin < seconds
        if in_time and session_report.has_goal(entry) and size.kind != "retroactive":
            entry.update(measure_compiled(machine, size, entry["streams"], **timing))
            save(found)
    for text in session_report.last_lines(found):
        print(text, flush=True)
    found["seconds"] = time.monotonic() - begin
    save(found)
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].split(":")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="start no model after these")
    parser.add_argument("--persistent", action="store_true", help="time only persistent kernels")
    chosen = parser.parse_args(arguments)
    why = bundle.why_unusable()
    if why:
        print(f"Found {why}.", file=sys.stderr)
        return 1
    if gpu_benchmark.cuda_build.find_capability() is None:
        print("Found no GPU on this machine, expected one to measure.", file=sys.stderr)
        return 1

    def save(found):
        gpu_benchmark.write(found, chosen.json, None)

    if chosen.persistent:
        found = run_persistent(TorchArrays(), bundle.FOLDER, save)
    else:
        found = run(TorchArrays(), bundle.FOLDER, chosen.seconds, save)
    for failure in found["failures"]:
        print(failure, file=sys.stderr)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
