"""Build the kernels into a library with the interface of cuda/c_api.h, or sessions on a GPU.

nvcc builds it for this machine's GPU. A C++ compiler builds it for the emulator, which runs the
kernels on the CPU.

    python tools/gpu/cuda_build.py [--emulated] [--capability 90] [--output DIRECTORY]
        [--sessions CORE]

prints the library's path. With `--sessions` it is the library of sessions on a GPU, linked to the
core library CORE. A library from the same sources and commands is not built again.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTS = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
LIBRARY = "libcontinual_transformers_kernels.so"


def what_is_read() -> list[Path]:
    """Return every file that a build may read."""
    patterns = (
        "cuda/*",
        "cuda/session/*",
        "cc/session/*.h",
        "include/*.h",
        "cc/library.bzl",
        "cc/attention/*.h",
        "tools/gpu/emulator/*",
        "tools/object_files.py",
    )
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def why_no_driver() -> str | None:
    """Return the reason why there is no driver for GPUs; None if there is one, even without a GPU.

    This is faster than importing PyTorch.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return None


def find_capability() -> str | None:
    """Return the compute capability of the first GPU, as "90", or None if there is no GPU."""
    if why_no_driver() is not None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        number = found.stdout.split("\n")[0].strip().replace(".", "")
        if number.isdigit():
            return number
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return "".join(map(str, torch.cuda.get_device_capability()))
    return None


def build(
    directory: str | Path,
    emulated: bool = False,
    capability: str | None = None,
    core: Path | None = None,
) -> Path:
    """Build the library, unless it is up to date, and return its path.

    Args:
        directory: Where it is put, and its objects.
        emulated: Whether to build it for the emulator.
        capability: If not, the compute capability to build it for.
        core: The core library. With it, the result is the library of sessions on a GPU.

    Raises:
        RuntimeError: With the compiler's output.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / (LIBRARY if core is None else LISTS["CUDA_LIBRARY"])
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(repr((emulated, capability, compiler, core)).encode())
    digest.update(Path(__file__).read_bytes())
    for path in what_is_read():
        digest.update(path.name.encode() + path.read_bytes())
    stamp = directory / "built"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Several workers may build it at once.
        if library.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
            return library
        stamp.unlink(missing_ok=True)
        # A process that has mapped the old library keeps it.
        fresh = library.with_suffix(".fresh")
        if emulated:
            _build_emulated(compiler, directory, fresh, core)
        elif capability is None:
            raise RuntimeError("Expected the compute capability to build for, but got None")
        else:
            environment = {
                **os.environ,
                "CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES": capability,
                # With it, a sanitizer can name the source line.
                "NVCC_APPEND_FLAGS": "-lineinfo",
            }
            what = ["library", str(fresh)]
            if core is not None:
                what = ["session-library", str(fresh), str(core)]
            _run([sys.executable, str(ROOT / "cuda/nvcc.py"), *what], environment)
        fresh.replace(library)
        stamp.write_text(digest.hexdigest())
    return library


def _build_emulated(compiler: str, directory: Path, target: Path, core: Path | None) -> None:
    # A GPU fails on an unaligned vector; here UBSan does.
    checks = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
    options = ["-std=c++17", "-O1", "-fPIC", *checks, "-fno-sanitize-recover=all"]
    options += [f"-I{ROOT / 'tools/gpu/emulator'}", f"-I{ROOT}", "-x", "c++"]
    names = LISTS["CUDA_SOURCES"] + LISTS["CUDA_C_API_SOURCES"]
    links = []
    if core is not None:
        names = LISTS["CUDA_SESSION_KERNEL_SOURCES"] + LISTS["CUDA_SESSION_SOURCES"]
        links = [f"-L{core.parent}", f"-l:{core.name}", "-Wl,-z,defs"]
    objects = [str((directory / name).with_suffix(".o")) for name in names]
    for made in objects:
        Path(made).parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = (
            [compiler, *options, "-c", str(ROOT / "cuda" / name), "-o", made]
            for name, made in zip(names, objects, strict=True)
        )
        list(pool.map(_run, commands))
    _run([compiler, "-shared", *checks, *objects, *links, "-o", str(target)])


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def default_directory(
    emulated: bool, capability: str | None = None, sessions: bool = False
) -> Path:
    folder = ROOT / "build" / ("gpu_sessions" if sessions else "gpu")
    return folder / ("emulated" if emulated else f"sm_{capability}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--capability", help="for example 90; default: this GPU's")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--sessions", type=Path, metavar="CORE")
    chosen = parser.parse_args(arguments)
    capability = chosen.capability or (None if chosen.emulated else find_capability())
    if capability is None and not chosen.emulated:
        print("Found no GPU here: name a compute capability, as --capability 90.", file=sys.stderr)
        return 1
    try:
        sessions = chosen.sessions is not None
        directory = chosen.output or default_directory(chosen.emulated, capability, sessions)
        print(build(directory, chosen.emulated, capability, chosen.sessions))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
