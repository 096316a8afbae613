"""`make gpu`: build the kernels for this machine's GPU, check them and time them.

    python tools/gpu/gpu_run.py [--out DIRECTORY] [--only STEP ...]

It needs nvcc, a C++ compiler, Python, NumPy, PyTorch and pytest. It needs no TensorFlow, no network
and not this package. Each step is a process with its own time limit, and there is one for all.
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
from pathlib import Path
from typing import Any, NamedTuple

import cuda_build

ROOT = cuda_build.ROOT
ALL_SECONDS = 475
NOT_RUN = "not run"
SUITE = [
    sys.executable, "-m", "pytest", "--confcutdir=tests/gpu", "tests/gpu", "benchmarks/gpu",
    "-q", "-rfE", "-p", "no:cacheprovider", "-k", "not emulated",
]  # fmt: skip
# The tests of the op, the layer and the encoder, which run on TensorFlow's GPU.
TENSORFLOW_TESTS = ("test_single_output*.py", "test_co_si_*.py")


class Step(NamedTuple):
    """One step of `make gpu`.

    Args:
        limit: The seconds after which the step is stopped.
        needs: The names of steps that must succeed before this one runs.
        reason: Why it does not run; None: it runs.
    """

    name: str
    command: list[str]
    limit: float
    needs: tuple[str, ...] = ()
    reason: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012


def steps(out: Path) -> list[Step]:
    """Return the steps of `make gpu`, on a machine with a GPU."""
    many = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    sanitizer = find_sanitizer()
    lacking = None if sanitizer else "there is no compute-sanitizer, on PATH or in CUDA_HOME"
    # For the sanitizer, each buffer is a separate allocation, so that it sees the buffer's end.
    expected = {"CONTINUAL_TRANSFORMERS_EXPECT_GPU": "1"}  # Without a GPU, a test fails.
    apart = {**expected, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    made = [
        Step("build", [sys.executable, "tools/gpu/cuda_build.py"], 100),
        Step("suite", [*SUITE, *many], 110, ("build",), None, expected),
    ]
    for tool in ("memcheck", "racecheck"):
        command = [
            sanitizer or "",
            "--tool",
            tool,
            "--error-exitcode",
            "86",
            *SUITE,
            "-m",
            "sanitizer",
        ]
        made.append(Step(tool, command, 60, ("build",), lacking, apart))
    command = [
        sys.executable, "benchmarks/gpu/gpu_benchmark.py",
        "--json", str(out / "benchmark.json"), "--picture", str(out / "benchmark.png"),
    ]  # fmt: skip
    made.append(Step("benchmark", command, 230, ("build",)))
    tests = sorted(
        str(path.relative_to(ROOT))
        for glob in TENSORFLOW_TESTS
        for path in ROOT.glob(f"tests/{glob}")
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--device", "GPU:0", *tests]
    made.append(Step("tensorflow", [*command, *many], 120, (), why_no_tensorflow()))
    return made


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer; None if there is none."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    beside = os.pathsep.join(str(Path(home, "bin")) for home in homes if home)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def why_no_tensorflow() -> str | None:
    """Return why the ops' tests cannot run in TensorFlow on its GPU; None if they can."""
    for module in ("tensorflow", "continual_transformers_tf"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed here"
    program = (
        "import tensorflow as tf, continual_transformers_tf as ct\n"
        "assert tf.config.list_physical_devices('GPU'), 'TensorFlow sees no GPU'\n"
        "assert 'GPU' in ct.ops.kernels(), 'the op library was built without GPU kernels'\n"
    )
    try:
        asked = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return "TensorFlow did not start within 60 s"
    return None if asked.returncode == 0 else asked.stderr.strip().split("\n")[-1]


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
            # Also stops processes that it left behind: they are in its process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().split("\n")
    return dict(went=went, status=status, seconds=time.monotonic() - begin, last_line=lines[-1])


def run_steps(
    chosen: list[Step], out: Path, seconds: float = ALL_SECONDS
) -> dict[str, dict[str, Any]]:
    """Run one step after another. The rest of `seconds` also limits each step."""
    begin = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    for step in chosen:
        left = seconds - (time.monotonic() - begin)
        missing = [name for name in step.needs if found.get(name, {}).get("went", "ok") != "ok"]
        reason = step.reason
        if reason is None and missing:
            reason = f"{missing[0]}: {found[missing[0]]['went']}"
        if reason is None and left <= 1:
            # The step should have run. That is an error, unlike something that is not installed.
            found[step.name] = dict(went="timed out", last_line=f"the {seconds:g} s were over")
        elif reason is not None:
            found[step.name] = dict(went=NOT_RUN, last_line=reason)
        else:
            print(f"{step.name} ...", flush=True)
            limit = min(step.limit, left)
            command = [*step.command]
            if step.name == "benchmark":  # So that it ends before the limit.
                command += ["--seconds", f"{0.8 * limit:.0f}"]
            log = out / f"{step.name}.txt"
            found[step.name] = run_step(step._replace(command=command), log, limit)
    return found


def summary(found: dict[str, dict[str, Any]], benchmark: dict[str, Any] | None = None) -> str:
    """Return the summary, which is printed last."""
    lines = []
    for name, step in found.items():
        took = f"{step['seconds']:6.1f} s" if "seconds" in step else " " * 8
        lines.append(f"{name:12} {step['went']:10} {took}  {step['last_line']}")
    if benchmark:
        sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
        import gpu_report

        lines += ["", *gpu_report.heading(benchmark), *gpu_report.goal_lines(benchmark)]
    return "\n".join(lines)


def is_wrong(found: dict[str, dict[str, Any]]) -> bool:
    """Return whether a step that ran did not succeed."""
    return any(step["went"] not in ("ok", NOT_RUN) for step in found.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "build/gpu")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="such as: build suite")
    chosen = parser.parse_args(arguments)
    capability = cuda_build.find_capability()
    if capability is None:
        print("There is no GPU here. `make gpu` needs one: run it on a machine with a GPU.")
        return 1
    out = Path(chosen.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = steps(out)
    names = [step.name for step in wanted]
    if chosen.only:
        unknown = set(chosen.only) - set(names)
        if unknown:
            parser.error(
                f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(names)}"
            )
        wanted = [step for step in wanted if step.name in chosen.only]
    recorded = out / "benchmark.json"
    recorded.unlink(missing_ok=True)  # Left from an earlier run.
    found = run_steps(wanted, out)
    benchmark = json.loads(recorded.read_text()) if recorded.exists() else None
    wrong = is_wrong(found)
    everything = dict(capability=capability, wrong=wrong, steps=found, benchmark=benchmark)
    (out / "gpu.json").write_text(json.dumps(everything, indent=1))
    for name, step in found.items():
        if step["went"] in ("failed", "timed out") and (out / f"{name}.txt").exists():
            print(f"\n--- {name}: the end of what it said")
            print("\n".join((out / f"{name}.txt").read_text(errors="replace").split("\n")[-40:]))
    print("\n" + summary(found, benchmark))
    print(f"\n{'SOMETHING WAS WRONG' if wrong else 'Nothing was wrong'}. All output is in {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
