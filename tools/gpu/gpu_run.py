"""`make gpu`: build the kernels and sessions for this machine's GPU, check them and time them.

    python tools/gpu/gpu_run.py [--out DIRECTORY] [--only STEP ...]

It needs nvcc, a C++ compiler, Python, NumPy, PyTorch and pytest, and for sessions the bundle
(bundle.py). It needs no network and not this package, and TensorFlow only for its last step
(tensorflow_run.py). Each step is a process with its own time limit, and there is one for all.
The results are in DIRECTORY (build/gpu, or $OUT): gpu.json, pictures, and the output of each step.
The exit status is 0 only if nothing went wrong. A figure that misses its goal is not an error.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import bundle
import cuda_build
import tensorflow_bundle

ROOT = cuda_build.ROOT
ALL_SECONDS = 475
NOT_RUN = "not run"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-k"]
SUITE = [*PYTEST, "not emulated", "--confcutdir=tests/gpu", "tests/gpu", "benchmarks/gpu"]
IN_SESSIONS = ["--confcutdir=tests/gpu_sessions", "tests/gpu_sessions"]
SESSIONS = [*PYTEST, "not emulated and not persistent", *IN_SESSIONS]
# By themselves: a kernel that never ends would take the time of what is tested with it.
PERSISTENT = [*PYTEST, "not emulated and persistent", *IN_SESSIONS]


class Step(NamedTuple):
    """One step of `make gpu`.

    Args:
        limit: The seconds after which the step is stopped.
        needs: The names of steps that must succeed before this one runs.
        reason: Why it cannot run on this machine, or None.
        environment: Variables that are set for it.
        is_beside: Whether it runs beside the steps after it, up to the first that needs it.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[str, ...] = ()
    reason: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012
    is_beside: bool = False


def steps(out: Path, capability: str | None = None) -> list[Step]:
    """Return the steps of `make gpu`, the most telling first.

    Args:
        out: Where results are written.
        capability: The GPU's compute capability.
    """
    many = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    sanitizer = find_sanitizer()
    lacking = None if sanitizer else "found no compute-sanitizer on PATH or in CUDA_HOME"
    unbundled = bundle.why_unusable()
    # For the sanitizer, each buffer is a separate allocation, so that it sees the buffer's end.
    expected = {"CONTINUAL_TRANSFORMERS_EXPECT_GPU": "1"}  # Without a GPU, a test fails.
    apart = {**expected, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # The package that is built from the bundle, not one that may be installed here.
    path = os.pathsep.join(filter(None, [str(bundle.PACKAGE), os.environ.get("PYTHONPATH")]))
    packaged = {"PYTHONPATH": path}

    def under(tool: str, tests: list[str]) -> list[str]:
        checked = [sanitizer or "", "--tool", tool, "--error-exitcode", "86"]
        return [*checked, *tests, "-m", "sanitizer"]

    def timed(name: str, program: str, *options: str) -> list[str]:
        return [sys.executable, program, "--json", str(out / f"{name}.json"), *options]

    made = [
        Step(
            "session-build",
            bundle.build_command(sys.executable),
            200,
            (),
            unbundled,
            bundle.build_environment(capability),
            is_beside=True,
        ),
        Step("build", [sys.executable, "tools/gpu/cuda_build.py"], 100),
        Step("suite", [*SUITE, *many], 100, ("build",), None, expected),
        Step(
            "sessions",
            [*SESSIONS, *many],
            75,
            ("session-build",),
            unbundled,
            {**expected, **packaged},
        ),
        Step(
            "session-benchmark",
            timed("session-benchmark", "benchmarks/gpu/session_benchmark.py"),
            75,
            ("session-build",),
            unbundled,
            packaged,
        ),
    ]
    made += [
        Step(
            "persistent",
            [*PERSISTENT, *many, "-m", "not slow"],
            45,
            ("session-build",),
            unbundled,
            {**expected, **packaged},
        ),
        Step(
            "persistent-benchmark",
            timed("persistent-benchmark", "benchmarks/gpu/session_benchmark.py", "--persistent"),
            30,
            ("persistent",),
            unbundled,
            packaged,
        ),
    ]
    for tool in ("memcheck", "racecheck"):
        made.append(Step(tool, under(tool, SUITE), 45, ("build",), lacking, apart))
    for name, tool, tests, needed in (
        ("session-memcheck", "memcheck", SESSIONS, "session-build"),
        ("persistent-racecheck", "racecheck", PERSISTENT, "persistent"),
    ):
        made.append(
            Step(
                name,
                under(tool, tests),
                45,
                (needed,),
                lacking or unbundled,
                {**apart, **packaged},
            )
        )
    picture = ["--picture", str(out / "benchmark.png")]
    command = timed("benchmark", "benchmarks/gpu/gpu_benchmark.py", *picture)
    made.append(Step("benchmark", command, 230, ("build",)))
    command = [sys.executable, "tools/gpu/tensorflow_run.py", "--out", str(out / "tensorflow")]
    made.append(Step("tensorflow", command, 230, (), why_no_tensorflow()))
    return made


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    beside = os.pathsep.join(str(Path(home, "bin")) for home in homes if home)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def why_no_tensorflow() -> str | None:
    """Return why the op cannot run on a GPU in TensorFlow; None if it may.

    It may in the TensorFlow of the slices, if they are here, or else in one that is installed.
    """
    why = tensorflow_bundle.why_unusable(capability=cuda_build.find_capability())
    if tensorflow_bundle.read_about() is not None:
        return why
    for module in ("tensorflow", "continual_transformers_tf"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed here, and there are {why}"
    try:
        asked = subprocess.run(
            [sys.executable, "tools/gpu/tensorflow_start.py"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "TensorFlow did not start within 60 s"
    if asked.returncode == 0:
        return None
    return (asked.stdout.strip() or asked.stderr.strip()).split("\n")[-1]


def run_step(step: Step, log: Path, limit: float) -> dict[str, Any]:
    """Run a step, with its output in `log`; stop it and its children at the limit.

    Returns:
        A dict: how it went ("ok", "failed" or "timed out"), its exit status, seconds and last line.
    """
    begin = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env={**os.environ, **step.environment},
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            went = "ok" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            went, status = "timed out", None
        finally:
            # This also stops processes that the step left behind: they are in its process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().split("\n")
    return dict(went=went, status=status, seconds=time.monotonic() - begin, last_line=lines[-1])


def run_steps(
    chosen: list[Step],
    out: Path,
    seconds: float = ALL_SECONDS,
    record: Callable[[dict[str, dict[str, Any]]], None] = lambda found: None,
) -> dict[str, dict[str, Any]]:
    """Run one step after another. The rest of `seconds` also limits each step.

    `record` is called after each step, with how the steps so far went.
    """
    begin = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    beside: dict[str, Future[dict[str, Any]]] = {}
    pool = ThreadPoolExecutor()
    for step in chosen:
        for name in beside.keys() & step.needs:
            found[name] = beside.pop(name).result()
        left = seconds - (time.monotonic() - begin)
        missing = [name for name in step.needs if found.get(name, {}).get("went", "ok") != "ok"]
        reason = step.reason
        if reason is None and missing:
            reason = f"{missing[0]}: {found[missing[0]]['went']}"
        if reason is None and left <= 1:
            # The step should have run, so this is an error. A tool that is not installed is not.
            found[step.name] = dict(went="timed out", last_line=f"no time left of {seconds:g} s")
        elif reason is not None:
            found[step.name] = dict(went=NOT_RUN, last_line=reason)
        else:
            print(f"{step.name} ...", flush=True)
            limit = min(step.limit, left)
            command = [*step.command]
            if step.name.endswith(("benchmark", "tensorflow")):  # It must end before the limit.
                command += ["--seconds", f"{0.8 * limit:.0f}"]
            log = out / f"{step.name}.txt"
            started = step._replace(command=command)
            if step.is_beside:
                beside[step.name] = pool.submit(run_step, started, log, limit)
            else:
                found[step.name] = run_step(started, log, limit)
        record(found)
    found |= {name: run.result() for name, run in beside.items()}
    return {step.name: found[step.name] for step in chosen}


def summary(
    found: dict[str, dict[str, Any]],
    benchmark: dict[str, Any] | None = None,
    of_sessions: dict[str, Any] | None = None,
) -> str:
    """Return the summary, which is printed last: of the steps, and of what the benchmarks found."""
    lines = []
    for name, step in found.items():
        took = f"{step['seconds']:6.1f} s" if "seconds" in step else " " * 8
        lines.append(f"{name:17} {step['went']:10} {took}  {step['last_line']}")
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    if of_sessions:
        import session_report

        lines += ["", *session_report.table(of_sessions)]
    if benchmark:
        import gpu_report

        lines += ["", *gpu_report.heading(benchmark), *gpu_report.goal_lines(benchmark)]
    return "\n".join(lines)


def is_wrong(found: dict[str, dict[str, Any]]) -> bool:
    """Return whether a step that ran did not succeed."""
    return any(step["went"] not in ("ok", NOT_RUN) for step in found.values())


def named(made: list[Step], names: list[str] | None, parser: argparse.ArgumentParser) -> list[Step]:
    """Return the steps of these names; None: all. An unknown name is an error of the parser's."""
    if names is None:
        return made
    there_are = [step.name for step in made]
    unknown = set(names) - set(there_are)
    if unknown:
        parser.error(
            f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(there_are)}"
        )
    return [step for step in made if step.name in names]


def print_failures(found: dict[str, dict[str, Any]], out: Path) -> None:
    """Print the end of the output of each step that did not succeed."""
    for name, step in found.items():
        if step["went"] in ("failed", "timed out") and (out / f"{name}.txt").exists():
            print(f"\n--- {name}: the end of its output")
            print("\n".join((out / f"{name}.txt").read_text(errors="replace").split("\n")[-40:]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "build/gpu")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="for example: build suite")
    chosen = parser.parse_args(arguments)
    capability = cuda_build.find_capability()
    if capability is None:
        print("Found no GPU on this machine, expected one: `make gpu` checks the kernels on it.")
        return 1
    out = Path(chosen.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = named(steps(out, capability), chosen.only, parser)
    recorded = [out / f"{name}.json" for name in ("benchmark", "session-benchmark")]
    for path in recorded:
        path.unlink(missing_ok=True)  # It may be from an earlier run.
    found = run_steps(wanted, out)
    benchmark, of_sessions = (
        json.loads(path.read_text()) if path.exists() else None for path in recorded
    )
    wrong = is_wrong(found)
    everything = dict(
        capability=capability, wrong=wrong, steps=found, benchmark=benchmark, sessions=of_sessions
    )
    (out / "gpu.json").write_text(json.dumps(everything, indent=1))
    print_failures(found, out)
    print("\n" + summary(found, benchmark, of_sessions))
    print(f"\n{'SOMETHING WAS WRONG' if wrong else 'Nothing was wrong'}; all results are in {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
