"""Builds the kernels into a library with the interface of cuda/c_api.h: by nvcc for the GPU that is
there, or by a C++ compiler on the emulator, which runs them on the CPU.

    python tests/gpu/cuda_build.py [--emulated] [--capability 90] [--output DIRECTORY]

prints the library's path. What was built from the same sources by the same commands is kept.
"""

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = "libcontinual_transformers_cuda.so"
COMMON = ["-std=c++17", f"-I{ROOT}"]


def sources():
    return sorted((ROOT / "cuda").glob("*.cu"))


def what_is_read():
    """Every file that a build may read."""
    patterns = ("cuda/*", "cc/attention/*.h", "tests/gpu/emulator/*")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def find_nvcc():
    """nvcc's path, or None: that on PATH, else CUDA_HOME's, else that of /usr/local/cuda."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def why_no_driver():
    """None where there is a driver for GPUs, whether or not there is a GPU; sooner known than by an
    import of PyTorch."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return None


def find_capability():
    """The compute capability of the first GPU, as "90", or None where there is no GPU."""
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


def compile_commands(objects, emulated, capability, nvcc):
    """How each source becomes one of `objects`, and those a library."""
    if emulated:
        compiler = os.environ.get("CXX", "g++")
        # A GPU stops at a vector that is not aligned; here UBSan does.
        checks = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
        emulator = f"-I{ROOT / 'tests/gpu/emulator'}"
        options = ["-O1", *checks, "-fno-sanitize-recover=all", "-fPIC", emulator, "-x", "c++"]
        link = [compiler, "-shared", *checks]
    else:
        compiler = nvcc
        target = f"-gencode=arch=compute_{capability},code=sm_{capability}"
        options = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", target, "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
        link = [nvcc, "-shared", target]
    compiles = [
        [compiler, *COMMON, *options, "-c", str(source), "-o", str(made)]
        for source, made in zip(sources(), objects, strict=True)
    ]
    return compiles, [*link, *map(str, objects)]


def build(directory, emulated=False, capability=None):
    """Builds the library, unless it is there as its sources are now, and returns its path.

    Raises:
        RuntimeError: with what the compiler said.
    """
    if not sources():
        raise RuntimeError(f"there are no kernels in {ROOT / 'cuda'}")
    nvcc = None if emulated else find_nvcc()
    if not emulated and nvcc is None:
        raise RuntimeError("there is no nvcc, neither on PATH nor in CUDA_HOME")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / LIBRARY
    objects = [directory / f"{source.stem}.o" for source in sources()]
    compiles, link = compile_commands(objects, emulated, capability, nvcc)
    digest = hashlib.sha256(repr((compiles, link)).encode())
    for path in what_is_read():
        digest.update(path.name.encode() + path.read_bytes())
    stamp = directory / "built"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Several workers may want it at once.
        if library.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest():
            return library
        stamp.unlink(missing_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(_run, compiles))
        # A process that has the old library mapped keeps it.
        fresh = library.with_suffix(".fresh")
        said.append(_run([*link, "-o", str(fresh)]))
        fresh.replace(library)
        (directory / "compiler.txt").write_text("\n".join(said))
        stamp.write_text(digest.hexdigest())
    return library


def _run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def default_directory(emulated, capability=None):
    return ROOT / "build" / "gpu" / ("emulated" if emulated else f"sm_{capability}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--capability", help="such as 90; that of the GPU where it is left out")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args(arguments)
    capability = chosen.capability or (None if chosen.emulated else find_capability())
    if capability is None and not chosen.emulated:
        print("There is no GPU here; --capability says for which to build.", file=sys.stderr)
        return 1
    try:
        directory = chosen.output or default_directory(chosen.emulated, capability)
        print(build(directory, chosen.emulated, capability))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
