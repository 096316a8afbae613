"""`make gpu-tensorflow`: run the op inside TensorFlow on this machine's GPU, check it and time it.

    python tools/gpu/tensorflow_run.py [--out DIRECTORY] [--seconds 470] [--only PART ...]

It puts the slices of TensorFlow together (tensorflow_bundle.py). Without slices it uses TensorFlow
and this package as they are installed here. It runs the tests of the ops, the layers and the
encoder on TensorFlow's GPU, then a benchmark. Each part is a process with its own time limit.
The results are in DIRECTORY (build/gpu/tensorflow, or $OUT): tensorflow.json, which is written
after each part, and the output of each part. The exit status is 0 only if nothing went wrong.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import cuda_build
import gpu_run
import tensorflow_bundle as bundle

ALL_SECONDS = 470
# The tests that run on TensorFlow's GPU, by part.
TESTS = {
    "op": ("test_single_output*.py",),
    "layer": ("test_co_si_mha*.py",),
    "encoder": ("test_co_si_transformer_encoder.py",),
    "retroactive": ("test_retroactive*.py", "test_co_re_mha.py"),
}


def parts(out: Path) -> list[gpu_run.Step]:
    """Return the parts, in the order in which they run."""
    environment: dict[str, str] = {}
    begin: list[gpu_run.Step] = []
    before: tuple[str, ...] = ()
    if bundle.read_about() is not None:
        found = bundle.answers(bundle.tree_of(), bundle.library_folders())
        environment = bundle.environment(bundle.tree_of(), found)
        command = [sys.executable, "tools/gpu/tensorflow_bundle.py"]
        begin = [gpu_run.Step("unpack", command, 150)]
        before = ("unpack",)
    start = [sys.executable, "tools/gpu/tensorflow_start.py"]
    many = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    pytest += ["-m", "not slow and not every_case", "--device", "GPU:0", *many]
    benchmark = [sys.executable, "benchmarks/gpu/tensorflow_benchmark.py"]
    benchmark += ["--json", str(out / "benchmark.json")]
    return [
        *begin,
        gpu_run.Step("start", start, 90, before, None, environment),
        gpu_run.Step("product", [*start, "--product"], 60, ("start",), None, environment),
        *(
            gpu_run.Step(name, [*pytest, *tests_of(name)], 120, ("start",), None, environment)
            for name in TESTS
        ),
        gpu_run.Step("benchmark", benchmark, 100, ("start",), None, environment),
    ]


def tests_of(part: str) -> list[str]:
    """Return the files with the tests of a part."""
    paths = (path for glob in TESTS[part] for path in cuda_build.ROOT.glob(f"tests/{glob}"))
    return sorted(str(path.relative_to(cuda_build.ROOT)) for path in paths)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("OUT") or cuda_build.ROOT / "build/gpu/tensorflow"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="for example: start op")
    chosen = parser.parse_args(arguments)
    if cuda_build.find_capability() is None:
        print("Found no GPU on this machine, expected one: the op runs on it in TensorFlow.")
        return 1
    why = gpu_run.why_no_tensorflow()
    if why:
        print(f"The op cannot run on a GPU in TensorFlow here: {why}")
        return 1
    out = Path(chosen.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = gpu_run.named(parts(out), chosen.only, parser)
    timed = out / "benchmark.json"
    timed.unlink(missing_ok=True)  # It may be from an earlier run.

    def record(found: dict[str, dict[str, Any]]) -> None:
        """Write all that is known so far, so that a run that is cut short tells most."""
        benchmark = json.loads(timed.read_text()) if timed.exists() else None
        everything = dict(wrong=gpu_run.is_wrong(found), parts=found, benchmark=benchmark)
        (out / "tensorflow.json").write_text(json.dumps(everything, indent=1))

    found = gpu_run.run_steps(wanted, out, chosen.seconds, record)
    gpu_run.print_failures(found, out)
    for name in ("unpack", "benchmark"):
        if found.get(name, {}).get("went") == "ok":
            print("\n" + (out / f"{name}.txt").read_text(errors="replace").strip())
    print("\n" + gpu_run.summary(found))
    # A part that was not run needed one that failed.
    wrong = gpu_run.is_wrong(found)
    print(f"\n{'SOMETHING WAS WRONG' if wrong else 'Nothing was wrong'}; all results are in {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
