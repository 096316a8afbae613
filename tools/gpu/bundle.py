"""The bundle: what a machine with only a GPU, CUDA and PyTorch lacks to build and check sessions.

`make gpu-bundle` makes it on a machine with .venv (make_bundle.py), `make gpu` uses it. It has

    packages/    what setup.py imports, or includes headers of
    tensorflow/  Google Highway's headers, in the folders of the TensorFlow they come from
    cases/       small models for the tests: model files, and cases.json
    plans/       the beginnings of the benchmark's model files, without the weights

This file needs only NumPy.
"""

import json
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import cuda_build

VARIABLE = "CONTINUAL_TRANSFORMERS_GPU_BUNDLE"  # Names another folder.
FOLDER = Path(os.environ.get(VARIABLE) or cuda_build.ROOT / "build" / "gpu-bundle")
# Where the package is put that is built from the bundle.
PACKAGE = cuda_build.ROOT / "build" / "gpu_sessions" / "package"
WEIGHTS = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}


class Case(NamedTuple):
    """A model of the tests, as tests/model_case.py describes it.

    Attributes:
        window: How many steps fill every window in it.
        high: Integers among the inputs are below this.
        gaps: Whether a fifth of the inputs' rows are zeros.
        bound: The largest allowed error, relative to the largest output.
    """

    window: int
    high: int
    gaps: bool
    bound: float

    def inputs(
        self,
        specs: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]],
        random: np.random.Generator,
        lead: tuple[int, int],
    ) -> list[npt.NDArray[Any]]:
        """Return arrays `(*lead, *shape)` for the session's inputs."""
        arrays: list[npt.NDArray[Any]] = []
        for _, shape, dtype in specs:
            full = (*lead, *shape)
            x: npt.NDArray[Any]
            if dtype.kind == "b":
                x = random.random(full) < 0.5
            elif dtype.kind in "iu":
                x = random.integers(0, self.high, full)
            else:
                x = random.normal(size=full)
                if self.gaps:
                    x[random.random(lead) < 0.2] = 0
            arrays.append(x.astype(dtype))
        return arrays


def read_cases(folder: Path = FOLDER) -> dict[str, Case]:
    """Return the cases by name; none if there is no bundle."""
    listed = folder / "cases" / "cases.json"
    if not listed.exists():
        return {}
    return {name: Case(**case) for name, case in json.loads(listed.read_text()).items()}


def model_file(name: str, folder: Path = FOLDER) -> Path:
    return folder / "cases" / f"{name}.safetensors"


def plan_file(name: str, folder: Path = FOLDER) -> Path:
    return folder / "plans" / f"{name}.plan"


def beginning(model: bytes) -> bytes:
    """Return a model file's header, all of it but the weights."""
    return model[: 8 + int.from_bytes(model[:8], "little")]


def weights_bytes(header: bytes) -> int:
    """Return the bytes of the weights that follow a header."""
    entries = json.loads(header[8:])
    return max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)


def fill(plan: Path, target: Path) -> Path:
    """Write a model file with a plan's header and random weights, always the same.

    Each product of a kernel has about the size of its input, so nothing overflows. Integers, such
    as the row that positions begin at, are 0.

    Raises:
        ValueError: If a weight has another dtype.
    """
    header = plan.read_bytes()
    random = np.random.default_rng(17)
    entries = json.loads(header[8:])
    del entries["__metadata__"]
    with open(target, "wb") as file:
        file.write(header)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in WEIGHTS:
                raise ValueError(
                    f"{plan}: weight {name} has dtype {entry['dtype']}, expected one of "
                    f"{', '.join(WEIGHTS)}: pack the model with weights in float32"
                )
            dtype, shape = np.dtype(WEIGHTS[entry["dtype"]]), entry["shape"]
            array = np.zeros(shape)
            if dtype.kind == "f":
                array = random.standard_normal(shape) * max(1, *shape[:1]) ** -0.5
            file.write(array.astype(dtype).tobytes())
    return target


def build_environment(capability: str | None, folder: Path = FOLDER) -> dict[str, str]:
    """Return the variables with which setup.py builds sessions from the bundle.

    Args:
        capability: The compute capability to build GPU sessions for; None: only the CPU's.
        folder: The bundle.
    """
    path = [str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "CONTINUAL_TRANSFORMERS_TENSORFLOW": "",
        "CONTINUAL_TRANSFORMERS_TENSORFLOW_HEADERS": str(folder / "tensorflow"),
        "CONTINUAL_TRANSFORMERS_SERVER": "0",
        "CONTINUAL_TRANSFORMERS_CUDA": "0" if capability is None else "1",
        "CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES": capability or "",
        # With it, a sanitizer can name the source line.
        "NVCC_APPEND_FLAGS": "-lineinfo",
    }


def build_command(python: str, target: Path = PACKAGE) -> list[str]:
    """Return the command that builds the package into `target`."""
    return [python, "setup.py", "-q", "build", "--build-lib", str(target)]


def package_is_built(target: Path = PACKAGE) -> bool:
    """Return whether this Python can import a package that was built into `target`."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    names = (cuda_build.LISTS["CORE_LIBRARY"], f"{cuda_build.LISTS['EXTENSION']}{suffix}")
    return all((target / "continual_transformers_tf" / name).exists() for name in names)


def why_unusable(folder: Path = FOLDER) -> str | None:
    """Return why there are no sessions to build from the bundle; None if there are."""
    if not (folder / "cases" / "cases.json").exists():
        return f"no bundle in {folder}: `make gpu-bundle` makes it, on a machine with .venv"
    return None


def sizes_by_part(folder: Path) -> Mapping[str, int]:
    """Return the bytes of each of the bundle's folders."""
    return {
        part.name: sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        for part in sorted(folder.iterdir())
    }
