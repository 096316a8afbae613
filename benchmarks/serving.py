"""The server's speed, against its floor, its rivals and a session in this process.

    python benchmarks/serving.py [--quick]

The floor (benchmarks/cc/empty_grpc_server.cc) is a gRPC server of the same library that answers at
once with an empty tensor. The rivals are a `grpc.aio` server in Python and Triton's Python backend,
both on `ct.Session`. Triton is left out if it is not installed (triton_rival.py says how).

They are measured with `perf_analyzer`, if it is on PATH (`pip install tritonclient[perf_analyzer]`
in an environment of its own), in turn with the server. `make bench-serving` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import triton_rival

import continual_transformers_tf as ct
from continual_transformers_tf.bench.session_goals import Goal
from continual_transformers_tf.serving import load, messages, program

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import server_packages  # noqa: E402

METHOD = f"{messages.SERVICE}/ModelInfer"
ATTEMPTS = 3  # perf_analyzer gives up if the machine is too busy with something else.
IN_FLIGHT = 2  # Requests of many rows at once, so that the client works while the server does.


class Load(NamedTuple):
    """What `perf_analyzer` measured: steps a second, and quantiles in microseconds."""

    steps: float
    p50: float
    p99: float


def main() -> None:
    """Measure, and print a table of the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a moment, to see that it works")
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="FOLDER",
        default=ROOT / "build" / "bench" / "triton",
        help="Triton's environment (default: build/bench/triton)",
    )
    parser.add_argument("--rival", nargs=2, metavar=("MODEL", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival:
        asyncio.run(serve_rival(Path(arguments.rival[0]), int(arguments.rival[1])))
        return
    rounds, seconds = (1, 0.3) if arguments.quick else (5, 2.0)
    spans = (1.0, 3.0) if arguments.quick else (10.0, 20.0)  # Of many streams.
    with tempfile.TemporaryDirectory() as folder:
        goals = [
            many_rows(Path(folder), rounds, seconds),
            *many_streams(Path(folder), *spans),
            *many_streams(Path(folder), *spans, "int8"),
            *single_steps(Path(folder), rounds, seconds, arguments.triton),
        ]
    print("\n| | goal | measured | |\n| --- | --- | --- | --- |")
    for goal in goals:
        print(f"| {' | '.join(goal.cells())} |")


def pack(folder: Path, blocks: int, features: int, embedding: int) -> Path:
    """Write the model file of `blocks` encoder blocks, with a window of 64 steps."""
    path = folder / f"blocks{blocks}.safetensors"
    # In another process, so that TensorFlow is not in this one.
    code = (
        "import keras, sys, continual_transformers_tf as ct;"
        "from continual_transformers_tf.bench.model_rivals import tensorflow_models;"
        "from continual_transformers_tf.bench.sizes import ModelSize;"
        f"size = ModelSize(1, 64, {features}, {embedding}, 4, {blocks});"
        "ct.Session(tensorflow_models.streaming_model(size)).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
    return path


def many_rows(folder: Path, rounds: int, seconds: float) -> Goal:
    """Measure 1,000 streams in requests of 250 rows, through the server and in this process."""
    streams, rows, features = 1000, 250, 32
    path = pack(folder, 3, features, 64)
    session = ct.Session.load(path)
    name = session.inputs[0].name
    x = np.random.default_rng(0).normal(size=(rows, features)).astype("float32")
    ids = [session.open(rows) for _ in range(streams // rows)]
    bodies = [
        request_of(path.stem, name, x, range(g * rows, (g + 1) * rows)) for g in range(len(ids))
    ]

    def in_process(until: float) -> int:
        steps = 0
        while time.perf_counter() < until:
            for group in ids:
                session.step(x, streams=group)
            steps += streams
        return steps

    with program.LocalServer(path) as server:
        channels = [grpc.insecure_channel(server.url, [("i", i)]) for i in range(IN_FLIGHT)]
        calls = [channel.unary_unary(METHOD) for channel in channels]

        def over_grpc(until: float) -> int:
            steps = [0] * IN_FLIGHT

            def client(i: int) -> None:
                # Each client has streams of its own.
                while time.perf_counter() < until:
                    for body in bodies[i::IN_FLIGHT]:
                        calls[i](body)
                        steps[i] += rows

            threads = [threading.Thread(target=client, args=(i,)) for i in range(IN_FLIGHT)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sum(steps)

        rates: dict[str, list[float]] = {"session": [], "server": []}
        for round_number in range(rounds + 1):
            for kind, run in (("session", in_process), ("server", over_grpc)):
                began = time.perf_counter()
                steps = run(began + seconds)
                if round_number > 0:  # The first one fills the windows.
                    rates[kind].append(steps / (time.perf_counter() - began))
        for channel in channels:
            channel.close()
    ratios = [a / b for a, b in zip(rates["server"], rates["session"], strict=True)]
    return Goal(
        "1,000 streams, requests of 250 rows, 3 blocks of E = 64: over `Session.step`",
        0.7,
        statistics.median(ratios),
        True,
        "×",
        f"{statistics.median(rates['server']):,.0f} of {statistics.median(rates['session']):,.0f} "
        "steps/s",
    )


def request_of(model: str, name: str, x: np.ndarray, streams: range) -> bytes:
    """Return a request for one step of each stream."""
    request = messages.ModelInferRequest(model_name=model)
    for tensor, datatype, array in (
        (name, "FP32", x),
        ("streams", "INT64", np.asarray(streams, np.int64)),
    ):
        request.inputs.add(name=tensor, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request.SerializeToString()


SAVE_DEMO = """
import sys
import continual_transformers_tf as ct
from continual_transformers_tf.demo.model import trained_model
ct.Session(trained_model(), cache_dtype=sys.argv[2]).save(sys.argv[1])
"""


def many_streams(
    folder: Path, warm_up: float, seconds: float, cache_dtype: str = "float32"
) -> list[Goal]:
    """Measure 10,000 streams of the demo's model that step 10 times a second each.

    In the first 10 s they get their memory, and their windows of 100 steps fill.
    """
    path = folder / f"watch_{cache_dtype}.safetensors"
    # In another process, so that TensorFlow is not in this one.
    command = [sys.executable, "-c", SAVE_DEMO, path, cache_dtype]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    options = load.Options(streams=10_000, rate=10, rows=100, seconds=warm_up + seconds)
    with program.LocalServer(path) as server:
        result = load.Load(server.url, path.stem, path, options).run()
    measured = result.latency[result.answered_at > warm_up]
    if result.wrong or result.lost or not result.checked or not measured.size:
        raise SystemExit(
            f"{measured.size} requests were answered after {warm_up:g} s, {result.wrong} of "
            f"{result.checked} answers are wrong, {result.lost} streams are lost"
        )
    what = (
        f"10,000 streams of the demo's model with rings in {cache_dtype}, 10 steps/s each, "
        "requests of 100 rows: "
    )
    latency, late = load.quantiles(measured), load.quantiles(result.lateness)
    detail = (
        f"p50 {latency['p50']:.2f} ms, {100 * len(measured) / seconds:,.0f} steps/s; the load test "
        f"itself sent late by {late['p99']:.2f} ms (p99) and took {result.core:.0%} of a core"
    )
    refused = float(sum(result.refused.values()))
    return [
        Goal(what + "p99", 5.0, latency["p99"], False, " ms", detail),
        Goal(what + "refused", 0.0, refused, False, "", f"of {len(result.latency):,} requests"),
    ]


def single_steps(folder: Path, rounds: int, seconds: float, triton: Path) -> list[Goal]:
    """Measure one step a request with `perf_analyzer`: the server, its floor, and the rivals."""
    if shutil.which("perf_analyzer") is None:
        print("perf_analyzer is not on PATH: one step a request is not measured", file=sys.stderr)
        return []
    path = pack(folder, 1, 6, 48)
    session = ct.Session.load(path)
    name, output = session.inputs[0].name, session.outputs[0].name
    found: dict[tuple[str, int], list[Load]] = {}
    with contextlib.ExitStack() as stack:
        floor = build_floor(folder)
        ports = {"floor": "127.0.0.1:18101", "aio": "127.0.0.1:18103"}
        for command in (
            [floor, "18101", path.stem, name, "6", output],
            [sys.executable, __file__, "--rival", path, "18103"],
        ):
            stack.enter_context(running(list(map(str, command))))
        ports["server"] = stack.enter_context(program.LocalServer(path)).url
        if triton_rival.is_installed(triton):
            ports["triton"] = stack.enter_context(
                triton_rival.running(triton, folder / "triton", path, 18105)
            )
        else:
            print(f"Triton is not in {triton}: it is not measured", file=sys.stderr)
        wait_for_ports(list(ports.values()))
        for kind, url in ports.items():
            if kind != "floor":
                check_answers(url, path)
        for _ in range(rounds):
            for concurrency in (1, 8):
                for kind, url in ports.items():
                    if kind == "triton" and concurrency == 1:
                        continue
                    measured = perf_analyzer(url, path.stem, concurrency, seconds)
                    found.setdefault((kind, concurrency), []).append(measured)

    def ratio(a: str, b: str, concurrency: int, of: Callable[[Load], float]) -> float:
        pairs = zip(found[a, concurrency], found[b, concurrency], strict=True)
        return statistics.median(of(x) / of(y) for x, y in pairs)

    def shown(kind: str, concurrency: int, of: Callable[[Load], float]) -> str:
        return f"{statistics.median(map(of, found[kind, concurrency])):,.0f}"

    goals = []
    names = {
        "floor": "the floor",
        "aio": "a `grpc.aio` server",
        "triton": "Triton's Python backend",
    }
    for concurrency in (1, 8):
        for rival, least in (("floor", 0.85), ("aio", 2.0), ("triton", 3.0)):
            if (rival, concurrency) not in found:
                continue
            goals.append(
                Goal(
                    f"steps/s, one a request, concurrency {concurrency}: over {names[rival]}",
                    least,
                    ratio("server", rival, concurrency, lambda load: load.steps),
                    True,
                    "×",
                    f"{shown('server', concurrency, lambda load: load.steps)} and "
                    f"{shown(rival, concurrency, lambda load: load.steps)}",
                )
            )
    for quantile, most in (("p50", 1.3), ("p99", 1.5)):

        def of(load: Load, quantile: str = quantile) -> float:
            return float(getattr(load, quantile))

        detail = f"{shown('server', 1, of)} and {shown('floor', 1, of)} µs"
        goals.append(
            Goal(
                f"{quantile}, concurrency 1: over the floor",
                most,
                ratio("server", "floor", 1, of),
                False,
                "×",
                detail,
            )
        )
    return goals


def check_answers(url: str, path: Path) -> None:
    """Raise an error if a server does not answer a sequence as a session does."""
    session, steps = ct.Session.load(path), 5
    (taken,), (given,) = session.inputs, session.outputs
    x = np.random.default_rng(0).normal(size=(1, steps, *taken.shape)).astype("float32")
    expected = session.steps(x, streams=[session.open()])[0]
    with grpc.insecure_channel(url) as channel:
        call = channel.unary_unary(METHOD)
        for t in range(steps):
            request = messages.ModelInferRequest(model_name=path.stem)
            request.parameters["sequence_id"].int64_param = 999_999_999
            request.parameters["sequence_start"].bool_param = t == 0
            request.parameters["sequence_end"].bool_param = t == steps - 1
            request.inputs.add(name=taken.name, datatype="FP32", shape=[1, *taken.shape])
            request.raw_input_contents.append(x[0, t].tobytes())
            answer = messages.ModelInferResponse.FromString(
                call(request.SerializeToString(), timeout=30)
            )
            y = np.frombuffer(answer.raw_output_contents[0], np.float32)
            np.testing.assert_allclose(y.reshape(given.shape), expected[t], atol=1e-5, err_msg=url)


def build_floor(folder: Path) -> Path:
    """Build the floor, with the server's options."""
    packages = server_packages.find()
    sources = server_packages.messages(folder / "messages")
    target = folder / "empty_grpc_server"
    command = [
        "g++",
        "-std=c++17",
        "-O3",
        f"-I{folder / 'messages'}",
        f"-I{ROOT}",
        *packages.compile,
    ]
    source = ROOT / "benchmarks" / "cc" / "empty_grpc_server.cc"
    command += map(str, [source, *sources, "-o", target])
    subprocess.run([*command, *packages.link], check=True)
    return target


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[None]:
    """Run a program for as long as a `with` block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_ports(urls: list[str]) -> None:
    """Return when all servers accept connections."""
    for url in urls:
        with grpc.insecure_channel(url) as channel:
            grpc.channel_ready_future(channel).result(30)


def perf_analyzer(url: str, model: str, concurrency: int, seconds: float) -> Load:
    """Measure a server."""
    command = ["perf_analyzer", "-m", model, "-i", "grpc", "-u", url, "--percentile", "99"]
    command += ["--concurrency-range", str(concurrency), "--sequence-length", "1000"]
    command += ["--measurement-interval", str(round(1000 * seconds)), "-s", "50", "-r", "10"]
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True)
        found = [
            re.search(pattern, done.stdout)
            for pattern in (
                r"throughput: ([\d.]+) infer/sec",
                r"p50 latency: (\d+) usec",
                r"p99 latency: (\d+) usec",
            )
        ]
        if None not in found:
            return Load(*(float(match[1]) for match in found if match))
    said = (done.stderr + done.stdout).strip().splitlines()
    raise SystemExit(f"perf_analyzer did not measure {url}: {' '.join(said[-3:])}")


async def serve_rival(path: Path, port: int) -> None:
    """Serve a model from Python: what one writes first."""
    session = ct.Session.load(path)
    streams: dict[int, int] = {}
    counts = {"answered": 0}
    taken, given = session.inputs[0], session.outputs[0]

    async def infer(request, context):
        parameters = request.parameters
        key = parameters["sequence_id"].int64_param
        if key not in streams or parameters["sequence_start"].bool_param:
            streams[key] = session.open()
        x = np.frombuffer(request.raw_input_contents[0], np.float32)
        y = session.step(x.reshape(1, *taken.shape), streams=[streams[key]])
        response = messages.ModelInferResponse(model_name=request.model_name, id=request.id)
        response.outputs.add(name=given.name, datatype="FP32", shape=y.shape)
        response.raw_output_contents.append(y.tobytes())
        if parameters["sequence_end"].bool_param:
            session.close(streams.pop(key))
        counts["answered"] += 1
        return response

    async def server_metadata(request, context):
        return messages.ServerMetadataResponse(name="rival", extensions=["statistics"])

    async def ready(request, context):
        return messages.ModelReadyResponse(ready=True)

    async def metadata(request, context):
        response = messages.ModelMetadataResponse(name=request.name, versions=["1"])
        response.inputs.add(name=taken.name, datatype="FP32", shape=[-1, *taken.shape])
        response.outputs.add(name=given.name, datatype="FP32", shape=[-1, *given.shape])
        return response

    async def config(request, context):
        response = messages.ModelConfigResponse()
        response.config.name, response.config.max_batch_size = request.name, 1
        response.config.sequence_batching.oldest.SetInParent()
        response.config.input.add(name=taken.name, data_type="TYPE_FP32", dims=taken.shape)
        response.config.output.add(name=given.name, data_type="TYPE_FP32", dims=given.shape)
        return response

    async def statistics_of(request, context):
        response = messages.ModelStatisticsResponse()
        model = response.model_stats.add(name=request.name, version="1")
        # perf_analyzer looks for the version that has answered something.
        model.inference_count = model.execution_count = counts["answered"]
        for kind in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            getattr(model.inference_stats, kind).count = counts["answered"]
        return response

    methods = {
        "ModelInfer": infer,
        "ServerMetadata": server_metadata,
        "ModelReady": ready,
        "ModelMetadata": metadata,
        "ModelConfig": config,
        "ModelStatistics": statistics_of,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            method,
            request_deserializer=getattr(messages, f"{name}Request").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, method in methods.items()
    }
    server = grpc.aio.server()
    service = messages.SERVICE.removeprefix("/")
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
