"""The slices of TensorFlow: GPU TensorFlow for a machine that has no network.

`make gpu-tensorflow-bundle` makes them (make_tensorflow_bundle.py), `make gpu-tensorflow` uses them
(tensorflow_run.py). The folder has

    about.json           what the slices hold, and their digests
    tensorflow.tar.xz.*  slices of one archive: TensorFlow and the packages that it needs
    package.tar.xz       this package, with an op library for that TensorFlow and that GPU

    python tools/gpu/tensorflow_bundle.py

puts them together in the folder's `tree`, and links the CUDA libraries that TensorFlow opens to
those of this machine. It needs only Python.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
VARIABLE = "CONTINUAL_TRANSFORMERS_GPU_TENSORFLOW"  # Names another folder.
FOLDER = Path(os.environ.get(VARIABLE) or ROOT / "build" / "gpu-tensorflow")
ABOUT = "about.json"
TENSORFLOW, PACKAGE = "tensorflow.tar.xz", "package.tar.xz"

# The libraries of CUDA 12 that TensorFlow opens when it looks for GPUs, what may answer for each,
# best first, and whether it uses no GPU without it.
LIBRARIES = {
    "libcudart.so.12": (("libcudart.so.12",), True),
    "libcublas.so.12": (("libcublas.so.12", "libcublas.so.13"), True),
    "libcublasLt.so.12": (("libcublasLt.so.12", "libcublasLt.so.13"), True),
    "libcufft.so.11": (("libcufft.so.11", "libcufft.so.12"), True),
    "libcusolver.so.11": (("libcusolver.so.11", "libcusolver.so.12"), True),
    "libcusparse.so.12": (("libcusparse.so.12", "libcusparse.so.13"), True),
    "libcudnn.so.9": (("libcudnn.so.9",), True),
    "libnccl.so.2": (("libnccl.so.2",), False),
    "libcupti.so.12": (("libcupti.so.12", "libcupti.so.13"), False),
}


# The most functions that are named of those that a library lacks.
MOST_NAMES = 12


class Damaged(Exception):
    """A slice is missing or has other bytes than it should have."""


class Tree(NamedTuple):
    """The folder that the slices are unpacked to."""

    folder: Path

    @property
    def site(self) -> Path:
        """TensorFlow, and the packages that it needs."""
        return self.folder / "site"

    @property
    def package(self) -> Path:
        """This package."""
        return self.folder / "package"

    @property
    def links(self) -> Path:
        """The CUDA libraries, under the names by which TensorFlow opens them."""
        return self.folder / "cuda"


def tree_of(folder: Path = FOLDER) -> Tree:
    return Tree(folder / "tree")


def read_about(folder: Path = FOLDER) -> dict[str, Any] | None:
    """Return what about.json says; None if there are no slices."""
    path = folder / ABOUT
    return json.loads(path.read_text()) if path.exists() else None


def this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def why_unusable(folder: Path = FOLDER, capability: str | None = None) -> str | None:
    """Return why TensorFlow cannot be put together here and run; None if it can.

    Args:
        folder: The slices.
        capability: The GPU's compute capability; None: it is not asked about.
    """
    about = read_about(folder)
    if about is None:
        return (
            f"no slices of TensorFlow in {folder}: `make gpu-tensorflow-bundle` makes them, on a "
            "machine with .venv and a network"
        )
    if about["python"] != this_python():
        return (
            f"the slices in {folder} hold TensorFlow for Python {about['python']}, and this is "
            f"Python {this_python()}: `make gpu-tensorflow-bundle "
            f'TENSORFLOW_BUNDLE_FLAGS="--python {this_python()}"` makes others'
        )
    # As chosen() in device_code.py: of the same major version, and not newer.
    made_for = about["capability"]
    fits = capability is None or (made_for[:-1] == capability[:-1] and made_for <= capability)
    if not fits:
        return (
            f"the slices in {folder} hold device code for compute capability {made_for}, and this "
            f"GPU has {capability}: `make gpu-tensorflow-bundle "
            f'TENSORFLOW_BUNDLE_FLAGS="--capability {capability}"` makes others'
        )
    missing = [name for name in about["files"] if not (folder / name).exists()]
    if missing:
        return f"{len(missing)} of {len(about['files'])} slices are not here: {', '.join(missing)}"
    return None


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's bytes and digest, as about.json has them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(bytes=path.stat().st_size, sha256=digest)


class Joined(io.RawIOBase):
    """The bytes of several files, one after the other."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        self._left = list(paths)
        self._file: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._left:
                    return 0
                self._file = open(self._left.pop(0), "rb")  # noqa: SIM115
            count = self._file.readinto(buffer)
            if count:
                return count
            self._file.close()
            self._file = None


def unpack(folder: Path = FOLDER) -> Tree:
    """Put the slices together, unless that was done already, and return the tree.

    Raises:
        Damaged: If a slice is missing or damaged.
    """
    about = read_about(folder)
    if about is None:
        raise Damaged(f"There is no {ABOUT} in {folder}")
    tree = tree_of(folder)
    stamp = tree.folder / ABOUT
    if stamp.exists() and json.loads(stamp.read_text()) == about:
        return tree
    for name, expected in about["files"].items():
        path = folder / name
        if not path.exists():
            raise Damaged(f"{path} is not here")
        found = describe_file(path)
        if found != expected:
            raise Damaged(
                f"{path} has {found['bytes']:,} bytes with SHA-256 {found['sha256'][:8]}, expected "
                f"{expected['bytes']:,} with {expected['sha256'][:8]}: carry it here again"
            )
    fresh = folder / "tree.fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for archive in (TENSORFLOW, PACKAGE):
        slices = [folder / name for name in sorted(about["files"]) if name.startswith(archive)]
        with tarfile.open(fileobj=io.BufferedReader(Joined(slices), 1 << 20), mode="r|xz") as tar:
            tar.extractall(fresh, filter="data")
    (fresh / ABOUT).write_text(json.dumps(about))
    shutil.rmtree(tree.folder, ignore_errors=True)
    fresh.rename(tree.folder)
    return tree


def cuda_homes() -> list[Path]:
    """Return the folders where this machine may have CUDA's toolkit, best first."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return [Path(home) for home in homes if home]


def library_folders() -> list[Path]:
    """Return the folders where this machine may have CUDA libraries, best first."""
    site = Path(sysconfig.get_paths()["purelib"], "nvidia")
    found = sorted(site.glob("*/lib"))
    for home in cuda_homes():
        found += [home / "lib64", home / "targets/x86_64-linux/lib", home / "extras/CUPTI/lib64"]
    found.append(Path("/usr/lib/x86_64-linux-gnu"))
    return [folder for folder in found if folder.is_dir()]


def answers(tree: Tree, folders: Sequence[Path]) -> dict[str, Path | None]:
    """Return for each library that TensorFlow opens the one that answers for it, or None."""
    places = [*sorted(tree.site.glob("nvidia/*/lib")), *folders]
    found: dict[str, Path | None] = {}
    for wanted, (names, _) in LIBRARIES.items():
        paths = (place / name for name in names for place in places)
        found[wanted] = next((path for path in paths if path.exists()), None)
    return found


def link_libraries(tree: Tree, found: Mapping[str, Path | None]) -> None:
    """Link the libraries that answer under the names by which TensorFlow opens them."""
    shutil.rmtree(tree.links, ignore_errors=True)
    tree.links.mkdir()
    for wanted, path in found.items():
        if path is not None:
            (tree.links / wanted).symlink_to(path.absolute())


def environment(tree: Tree, found: Mapping[str, Path | None]) -> dict[str, str]:
    """Return the variables with which Python imports this TensorFlow and finds its libraries.

    A library that is opened by a link looks for its neighbours beside the link, so their own
    folders are on the path too.
    """

    def path(variable: str, *folders: Path) -> str:
        before = os.environ.get(variable)
        return os.pathsep.join([*dict.fromkeys(map(str, folders)), *([before] if before else [])])

    own = [library.parent for library in found.values() if library is not None]
    variables = {
        "PYTHONPATH": path("PYTHONPATH", tree.package, tree.site),
        "LD_LIBRARY_PATH": path("LD_LIBRARY_PATH", tree.links, *own),
        # Several processes share the GPU's memory.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    # XLA compiles with the toolkit's libdevice and ptxas.
    toolkit = next((h for h in cuda_homes() if (h / "nvvm/libdevice").is_dir()), None)
    if toolkit is not None:
        variables["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={toolkit}"
    return variables


# Opens one library in a process of its own, because some end the process, and prints those of the
# functions on standard input that it lacks.
_ASK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(*[name for name in sys.stdin.read().split() if not hasattr(library, name)])
"""


def what_lacks(
    wanted: str, path: Path | None, functions: Sequence[str], variables: Mapping[str, str]
) -> tuple[str | None, list[str]]:
    """Return why a library cannot be opened, or None, and which functions it lacks.

    TensorFlow knows all functions of CUDA 12's libraries by name, and calls some. One that is
    lacking fails when it is called.

    Args:
        wanted: The name by which TensorFlow opens it.
        path: What answers for it.
        functions: The names that TensorFlow knows.
        variables: From `environment`.
    """
    if path is None:
        names = " or ".join(LIBRARIES[wanted][0])
        return f"found no {names} here", []
    done = subprocess.run(
        [sys.executable, "-c", _ASK, wanted], input=" ".join(functions), capture_output=True,
        text=True, env={**os.environ, **variables}, timeout=60,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return f"{path} cannot be opened: {said[-1]}", []
    return None, done.stdout.split()


def main(folder: Path = FOLDER) -> int:
    """Put the slices together, link the libraries, and say what they lack."""
    why = why_unusable(folder)
    if why:
        print(f"Found {why}.")
        return 1
    try:
        tree = unpack(folder)
    except (Damaged, tarfile.TarError, EOFError) as error:
        print(error)
        return 1
    found = answers(tree, library_folders())
    link_libraries(tree, found)
    variables = environment(tree, found)
    functions = (read_about(folder) or {}).get("functions", {})
    needed = []
    lacking = []
    for wanted, path in found.items():
        why, lacks = what_lacks(wanted, path, functions.get(wanted, []), variables)
        print(f"{wanted:20} {why or path}")
        if lacks:
            lacking.append(wanted)
            named = ", ".join(lacks[:MOST_NAMES])
            if len(lacks) > MOST_NAMES:
                named += f" and {len(lacks) - MOST_NAMES} more"
            print(f"{'':20} of {len(functions[wanted])} functions it lacks {named}")
        if why and LIBRARIES[wanted][1]:
            needed.append(wanted)
    if needed:  # Then TensorFlow says so too, when it starts.
        print(f"TensorFlow is in {tree.folder}, but uses no GPU without {', '.join(needed)}.")
        return 0
    lack = f"; functions of CUDA 12 are lacking in {', '.join(lacking)}" if lacking else ""
    print(f"TensorFlow is in {tree.folder}{lack}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
