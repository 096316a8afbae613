"""Count what a step costs, and compare it with the recorded counts: a guard on a noisy machine.

    python tools/step_counts.py check     # `make guard`
    python tools/step_counts.py record    # `make guard-record`

A program takes steps of fixed models under valgrind, which counts instructions, reads and writes of
memory. Times differ by half on a busy machine, these counts by nothing. The kernels are those for
AVX2, because valgrind does not know AVX-512.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import build_benchmarks  # noqa: E402
from object_files import side_by_side  # noqa: E402

RECORD = ROOT / "benchmarks" / "step_counts.json"
PROGRAM = "step_counts"
TARGET = "AVX2"
# Two runs differ by this many steps, which is also a whole number of turns of the rings.
STEPS = (8, 8 + 64)
# How much a count may rise. Another version of the C library changes a step by about 0.1 %.
TOLERANCE = 0.02
# What callgrind calls the counts. It counts reads and writes only while it simulates caches, whose
# sizes then change nothing here. It counts a read for each lane of a fused multiply-add that has an
# operand in memory, so there can be more reads than instructions.
EVENTS = {"instructions": "Ir", "reads": "Dr", "writes": "Dw"}
CACHES = ("--I1=32768,8,64", "--D1=32768,8,64", "--LL=8388608,16,64")

Counts = dict[str, float]  # instructions, reads, writes and allocations of a step


class CountedModel(NamedTuple):
    """A model whose step is counted.

    Attributes:
        file: The name of its model file.
        streams: How many streams take a step.
        dtype: The dtype of weights and rings.
    """

    file: str
    streams: int
    dtype: str


MODELS = {
    "encoder, float32, 1 stream": CountedModel("encoder", 1, "float32"),
    "encoder, float32, 32 streams": CountedModel("encoder", 32, "float32"),
    "encoder, bfloat16, 1 stream": CountedModel("encoder", 1, "bfloat16"),
    "encoder, int8, 1 stream": CountedModel("encoder", 1, "int8"),
    "retroactive attention, float32, 1 stream": CountedModel("retroactive", 1, "float32"),
}


def compiler_of(library: Path) -> str:
    """Return which compiler made a library, for example "Debian 12.2.0"."""
    found = set(re.findall(rb"GCC: \((\w+)[^)]*\) ([\d.]+)", library.read_bytes()))
    return ", ".join(sorted(f"{vendor.decode()} {number.decode()}" for vendor, number in found))


def reason_to_skip(compiler: str | None) -> str | None:
    """Return why nothing can be counted or compared here, or None.

    Args:
        compiler: What made the library of the recorded counts; None: nothing is compared.
    """
    from continual_transformers_tf import native

    if shutil.which("valgrind") is None:
        return "there is no valgrind: on Debian, apt install valgrind"
    if platform.machine() != "x86_64" or TARGET not in native.cpu_targets()[0]:
        return f"the counts are of {TARGET}, which this processor does not have"
    own = compiler_of(native.CORE_LIBRARY_PATH)
    if compiler is not None and own != compiler:
        return f"the library was built by {own or 'another compiler'}, the record is of {compiler}"
    return None


def write_models(folder: Path) -> None:
    """Write the model files."""
    import continual_transformers_tf as ct
    from continual_transformers_tf.bench.model_rivals.tensorflow_models import streaming_model
    from continual_transformers_tf.bench.rivals import tensorflow_rivals
    from continual_transformers_tf.bench.sizes import ModelSize, Size

    encoder = streaming_model(ModelSize(1, 64, 32, 64, 4, 1))
    retroactive = tensorflow_rivals.retroactive_layer(Size(64, 64, 4))
    for name, model in (("encoder", encoder), ("retroactive", retroactive)):
        ct.Session(model).save(folder / f"{name}.safetensors")


def count(program: Path, folder: Path, model: CountedModel) -> Counts:
    """Return the counts of a step of a model."""
    runs = []
    for steps in STEPS:
        report = folder / f"{model.file}-{model.streams}-{model.dtype}-{steps}.callgrind"
        command = [
            "valgrind", "--tool=callgrind", "--cache-sim=yes", *CACHES,
            f"--callgrind-out-file={report}", str(program),
            str(folder / f"{model.file}.safetensors"), str(model.streams), str(steps), model.dtype,
        ]  # fmt: skip
        environment = {**os.environ, "CONTINUAL_TRANSFORMERS_TARGET": TARGET}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        runs.append(totals(report.read_text()) | {"allocations": int(done.stdout)})
    taken = STEPS[1] - STEPS[0]
    return {name: round((runs[1][name] - runs[0][name]) / taken, 1) for name in runs[0]}


def totals(report: str) -> dict[str, int]:
    """Return the counts of a whole run, from callgrind's report."""
    found = {}
    for line in report.splitlines():
        name, _, numbers = line.partition(":")
        if name in ("events", "totals"):
            found[name] = numbers.split()
    by_event = dict(zip(found["events"], found["totals"], strict=False))
    return {name: int(by_event[event]) for name, event in EVENTS.items()}


def count_all() -> dict[str, Counts]:
    """Return the counts of a step of every model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build_benchmarks.build(ROOT / "build" / "bench", [PROGRAM])[PROGRAM]
        write_models(folder)
        counted = side_by_side(lambda model: count(program, folder, model), MODELS.values())
        return dict(zip(MODELS, counted, strict=True))


def compare(counted: Mapping[str, Counts], recorded: Mapping[str, Counts]) -> list[str]:
    """Return a sentence for every count that rose by more than it may."""
    found = []
    for model, counts in counted.items():
        if model not in recorded:
            found.append(f"{model}: it is not in the record")
            continue
        for name, now in counts.items():
            before = recorded[model][name]
            if now > before * (1 + TOLERANCE):
                by = f" ({now / before - 1:+.1%})" if before else ""
                found.append(f"{model}: {now:,.0f} {name} a step, recorded are {before:,.0f}{by}")
    return found


def show(counted: Mapping[str, Counts], recorded: Mapping[str, Counts]) -> None:
    """Print a table of the counts, with how much each has changed."""
    print(f"{'a step of':<42}" + "".join(f"{name:>22}" for name in (*EVENTS, "allocations")))
    for model, counts in counted.items():
        cells = []
        for name, now in counts.items():
            before = recorded.get(model, {}).get(name)
            cells.append(f"{now:,.0f}" + (f" ({now / before - 1:+.1%})" if before else ""))
        print(f"{model:<42}" + "".join(f"{cell:>22}" for cell in cells))


def main(what: str) -> int:
    """Check or record the counts. Return the exit status."""
    from continual_transformers_tf import native

    before = json.loads(RECORD.read_text()) if RECORD.exists() else {"counts": {}}
    why = reason_to_skip(before.get("compiler") if what == "check" else None)
    if why is not None:
        print(f"The counts of a step are not {what}ed: {why}.")
        return 0 if what == "check" else 1
    counted = count_all()
    show(counted, before["counts"])
    if what == "record":
        made = {
            "compiler": compiler_of(native.CORE_LIBRARY_PATH),
            "target": TARGET,
            "counts": counted,
        }
        RECORD.write_text(json.dumps(made, indent=2) + "\n")
        print(f"written: {RECORD.relative_to(ROOT)}")
        return 0
    risen = compare(counted, before["counts"])
    if risen:
        print(f"\nA step costs more than {TOLERANCE:.0%} more than recorded:")
        print("\n".join(f"  {line}" for line in risen))
        print(
            "To see where, run callgrind_annotate on the program (tools/step_counts.py). If it is "
            f"intended, run `make guard-record`, and commit {RECORD.relative_to(ROOT)} with the "
            "reason."
        )
    return 1 if risen else 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["check"], ["record"]):
        raise SystemExit("usage: step_counts.py check|record")
    raise SystemExit(main(sys.argv[1]))
