"""Finds TensorFlow's headers: those of the installed TensorFlow, or of a wheel that pip fetches.

An op library is compiled with the headers of its TensorFlow, and linked to that TensorFlow's
framework library. Nothing else of a wheel is needed, so nothing else of it is unpacked. The headers
of some versions contain Google Highway's.
"""

import os
import platform
import re
import runpy
import site
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(os.path.abspath(__file__)).parent.parent
LISTS = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
# Where fetched headers are kept. The variable names a folder that was filled elsewhere, for
# machines without a network.
FETCHED = Path(
    os.environ.get("CONTINUAL_TRANSFORMERS_TENSORFLOW_HEADERS") or ROOT / "build" / "tensorflow"
)

# The machine to build for. _PYTHON_HOST_PLATFORM names another than this one (aarch64.py).
MACHINE = sysconfig.get_platform().rpartition("-")[2]
IS_CROSS_BUILD = platform.machine() != MACHINE

# The minor versions to build op libraries for, such as "2.20,2.21". "": none.
VARIABLE = "CONTINUAL_TRANSFORMERS_TENSORFLOW"

FRAMEWORK = "libtensorflow_framework.so.2"
# The wheels of this name have headers. On AArch64 there is one wheel for CPU and GPU.
PUBLISHED = "tensorflow-cpu" if MACHINE == "x86_64" else "tensorflow"
NAMES = ("tensorflow", "tensorflow-cpu", "tensorflow_cpu")


class TensorFlow(NamedTuple):
    """A folder with TensorFlow's `include` and its framework library."""

    folder: Path
    version: str
    distribution: str  # the name of its wheel

    @property
    def minor(self) -> str:
        """The minor version, such as "2.21"."""
        return ".".join(self.version.split(".")[:2])

    @property
    def has_cuda(self) -> bool:
        """Whether this TensorFlow can use a GPU."""
        return self.distribution == "tensorflow"

    @property
    def has_highway(self) -> bool:
        """Whether the headers of this version hold Google Highway's."""
        return (self.folder / LISTS["HIGHWAY_INCLUDE"]).is_dir()


def installed() -> TensorFlow | None:
    """Return the installed TensorFlow, or None. It is never another machine's.

    pip builds in an isolated environment, whose Python cannot import what is installed in the
    target environment. But both have the same interpreter, so its folders can be searched.
    """
    if IS_CROSS_BUILD:
        return None
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["purelib"], paths["platlib"], site.getusersitepackages()]):
        for distribution in metadata.distributions(path=[folder]):
            headers = Path(folder, "tensorflow", "include", "tensorflow")
            if distribution.name in NAMES and headers.is_dir():
                return TensorFlow(
                    Path(folder, "tensorflow"),
                    distribution.version,
                    distribution.name.replace("_", "-"),
                )
    return None


def fetched(minor: str) -> TensorFlow:
    """Return the headers of a TensorFlow that is not installed. pip fetches its wheel once.

    Args:
        minor: A minor version, such as "2.20".

    Raises:
        SystemExit: If pip cannot fetch it, with pip's reason.
    """
    kept = FETCHED / MACHINE
    found = sorted(kept.glob(f"{minor}.*/include"))
    if found:
        return TensorFlow(found[-1].parent, found[-1].parent.name, PUBLISHED)
    print(f"fetching {PUBLISHED} {minor} (250 MB), for its headers", flush=True)
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        # The headers do not depend on Python. Python 3.11 has a wheel of every version.
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder),
            *("--only-binary=:all:", "--implementation=cp", "--python-version=3.11"),
            *(f"--platform=manylinux{tag}_{MACHINE}" for tag in ("2014", "_2_17", "_2_27")),
        ]
        done = subprocess.run([*command, f"{PUBLISHED}=={minor}.*"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise SystemExit(f"pip could not fetch {PUBLISHED} {minor}: {done.stderr.strip()}")
        version = wheels[0].name.split("-")[1]
        with zipfile.ZipFile(wheels[0]) as files:
            wanted = re.compile(rf"tensorflow/(include/|{re.escape(FRAMEWORK)}$)")
            files.extractall(folder, [name for name in files.namelist() if wanted.match(name)])
        Path(folder, "tensorflow").rename(kept / version)
    return TensorFlow(kept / version, version, PUBLISHED)


def find(minor: str) -> TensorFlow:
    """Return the headers of a minor version: the installed ones if they fit."""
    here = installed()
    return here if here and here.minor == minor else fetched(minor)


def wanted() -> list[TensorFlow]:
    """Return the TensorFlows to build op libraries for.

    They are those that CONTINUAL_TRANSFORMERS_TENSORFLOW lists; if it is not set, the installed
    one, if there is one.

    Raises:
        SystemExit: If the variable or the installed TensorFlow is not of a supported version.
    """
    supported = LISTS["TENSORFLOWS"]
    choice = os.environ.get(VARIABLE)
    if choice is None:
        here = installed()
        if here and here.minor not in supported:
            raise SystemExit(
                f"TensorFlow {here.version} is installed, and this package supports "
                f"{', '.join(supported)}: pip install '{PUBLISHED}=={supported[-1]}.*'. "
                f'{VARIABLE}="" builds without TensorFlow\'s ops'
            )
        return [here] if here else []
    minors = [minor for minor in choice.replace(" ", ",").split(",") if minor]
    for minor in minors:
        if minor not in supported:
            raise SystemExit(
                f"Expected {VARIABLE} to list some of {', '.join(supported)}, but got {choice!r}"
            )
    return [find(minor) for minor in minors]


def with_highway(tensorflows: list[TensorFlow]) -> TensorFlow:
    """Return a TensorFlow whose headers hold Highway's: one of these, or else a fetched one."""
    found = next((one for one in tensorflows if one.has_highway), None)
    return found or find(LISTS["TENSORFLOWS"][-1])
