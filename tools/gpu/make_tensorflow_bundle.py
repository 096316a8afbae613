"""`make gpu-tensorflow-bundle`: GPU TensorFlow in slices, for a GPU machine without a network.

    .venv/bin/python tools/gpu/make_tensorflow_bundle.py [--python 3.12] [--capability 90]
        [--output DIRECTORY]

pip downloads TensorFlow's wheel for GPUs, of the version in .venv, and the packages that it needs.
Most of the wheel is device code for other GPUs, C++ headers and profilers: this program removes
them, packs the rest and cuts it into slices that are small enough to carry (tensorflow_bundle.py).
It also builds this package with GPU kernels for that TensorFlow. It needs nvcc, xz and .venv.
Slices that are there already are kept, and only the package is built again.
"""

import argparse
import filecmp
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import cuda_build
import device_code
import tensorflow_bundle as bundle

ROOT = cuda_build.ROOT
sys.path.insert(0, str(ROOT / "tools"))
import object_files  # noqa: E402  In a folder that was just added.
import tensorflow_headers  # noqa: E402

SLICE_BYTES = 56 << 20
CAPABILITY = "90"
PYTHON = "3.12"
# glibc's minor versions, 2.5 to 2.35: pip takes a wheel only if its platform is named exactly.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 36)]
PLATFORMS += [f"manylinux{name}_x86_64" for name in ("1", "2010", "2014")]

# What TensorFlow's ops and Keras run without: paths below the folder of packages.
DROPPED = (
    "bin",
    "clang",
    "nvidia/cuda_runtime/include",
    "tensorflow/include",
    "tensorflow/compiler/mlir/stablehlo/stablehlo_extension.so",
    "tensorflow/python/profiler/internal/_pywrap_profiler_plugin.so",
)
# An empty module in the place of a library that is dropped, because TensorFlow imports it.
EMPTY = "tensorflow/python/profiler/internal/_pywrap_profiler_plugin.py"

# The libraries with device code, and with the names of the CUDA functions that TensorFlow calls.
TENSORFLOW_LIBRARIES = (
    "tensorflow/libtensorflow_cc.so.2",
    "tensorflow/libtensorflow_framework.so.2",
)
# The beginnings of the names of each library's functions.
PREFIXES = {
    "libcublas.so.12": "cublas",
    "libcublasLt.so.12": "cublasLt",
    "libcufft.so.11": "cufft",
    "libcusolver.so.11": "cusolver",
    "libcusparse.so.12": "cusparse",
    "libcudnn.so.9": "cudnn",
    "libnccl.so.2": "nccl",
    "libcupti.so.12": "cupti",
}


def pip_install(target: Path, python: str, requirements: Sequence[str], *options: str) -> None:
    """Have pip unpack wheels for another Python into a folder, with what they need.

    Raises:
        SystemExit: If pip cannot find them, with pip's reason.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", str(target)]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={name}" for name in PLATFORMS]
    done = subprocess.run([*command, *options, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip could not install {' '.join(requirements)}: {done.stderr.strip()}")


def slim(site: Path, capability: int) -> device_code.Sizes:
    """Remove what GPUs of one compute capability do not need. Return the sizes of device code."""
    for name in DROPPED:
        path = site / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (site / EMPTY).write_text("")
    sizes = [
        device_code.keep_one_capability(site / name, capability) for name in TENSORFLOW_LIBRARIES
    ]
    return device_code.Sizes(sum(s.kept for s in sizes), sum(s.zeroed for s in sizes))


def functions_asked_for(site: Path) -> dict[str, list[str]]:
    """Return the names of CUDA functions in TensorFlow's libraries, by the library that has them.

    TensorFlow looks a function up by its name when it first calls it. It knows all functions of
    each library, also those that it never calls.
    """
    begin = "|".join(sorted(PREFIXES.values(), key=len, reverse=True))
    names = re.compile(rb"(?<=\0)(%s)[A-Z]\w*(?=\0)" % begin.encode())
    found: dict[str, set[str]] = {prefix: set() for prefix in PREFIXES.values()}
    for name in TENSORFLOW_LIBRARIES:
        with (
            open(site / name, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            for match in names.finditer(data):
                found[match[1].decode()].add(match[0].decode())
    return {wanted: sorted(found[prefix]) for wanted, prefix in PREFIXES.items()}


def headers_read(version: str) -> list[str]:
    """Return the headers of a TensorFlow that the objects of its op library were made of.

    They are relative to its folder of headers.
    """
    begin = f"build/include/tensorflow-{version}/include/"
    minor = "_".join(version.split(".")[:2])
    listed = (ROOT / "build" / "objects").glob(f"op_library_{minor}*/**/*.d")
    read = {name for path in listed for name in object_files.listed_in(path)}
    return sorted(name.removeprefix(begin) for name in read if name.startswith(begin))


def other_headers(ours: Path, theirs: Path) -> list[str]:
    """Return the headers in `ours` that are not the same in `theirs`, relative to the folders."""
    names = (path.relative_to(ours) for path in sorted(ours.rglob("*")) if path.is_file())
    return [
        str(name)
        for name in names
        if not (theirs / name).is_file()
        or not filecmp.cmp(ours / name, theirs / name, shallow=False)
    ]


def check_headers(version: str, others: Sequence[str]) -> None:
    """Check that the op library fits TensorFlow for GPUs.

    Args:
        version: The version of TensorFlow.
        others: The headers that are not the same there.

    Raises:
        SystemExit: If it was built with one of these.
    """
    differ = sorted({*others}.intersection(headers_read(version)))
    if differ:
        raise SystemExit(
            f"The op library was built with headers that TensorFlow {version} for GPUs does not "
            f"have so: {', '.join(differ[:9])}"
        )


def pack(folder: Path, write: Callable[[bytes], Any]) -> None:
    """Call `write` with the bytes of a compressed archive of a folder.

    Raises:
        SystemExit: If tar or xz fails.
    """
    tar = subprocess.Popen(["tar", "-C", folder, "-cf", "-", "."], stdout=subprocess.PIPE)
    # Not Python's lzma: it uses one processor.
    xz = subprocess.Popen(["xz", "-T0", "-6"], stdin=tar.stdout, stdout=subprocess.PIPE)
    assert tar.stdout is not None
    assert xz.stdout is not None
    tar.stdout.close()
    while piece := xz.stdout.read(1 << 20):
        write(piece)
    if tar.wait() or xz.wait():
        raise SystemExit(f"tar and xz could not pack {folder}")


def cut(source: Path, target: Path, name: str, most_bytes: int) -> dict[str, dict[str, Any]]:
    """Pack a folder into slices of at most `most_bytes`. Return what about.json says of them."""
    slices: dict[str, dict[str, Any]] = {}
    whole = target / f"{name}.whole"
    with open(whole, "wb") as archive:
        pack(source, archive.write)
    with open(whole, "rb") as archive:
        while piece := archive.read(most_bytes):
            path = target / f"{name}.{len(slices):02d}"
            path.write_bytes(piece)
            slices[path.name] = bundle.describe_file(path)
    whole.unlink()
    return slices


def cuda_runtime(site: Path) -> str:
    """Return the requirement for CUDA's runtime that the unpacked TensorFlow names."""
    (found,) = metadata.distributions(name="tensorflow", path=[str(site)])
    named = [line.split(";")[0].strip() for line in found.requires or []]
    return next(line for line in named if line.startswith("nvidia-cuda-runtime"))


def make_tensorflow(target: Path, wanted: dict[str, Any], most_bytes: int) -> dict[str, Any]:
    """Write the slices of TensorFlow to `target`. Return what about.json says of them.

    Raises:
        SystemExit: If that TensorFlow has no device code for the GPU, or if the op library was
            built with other headers than it has.
    """
    with tempfile.TemporaryDirectory(dir=target) as folder:
        tree = bundle.Tree(Path(folder))
        requirements = [f"{name}=={wanted[name]}" for name in ("tensorflow", "keras")]
        print(f"pip fetches {' and '.join(requirements)} for Python {wanted['python']}", flush=True)
        pip_install(tree.site, wanted["python"], requirements)
        here = tensorflow_headers.wanted()[0]
        others = other_headers(here.folder / "include", tree.site / "tensorflow" / "include")
        check_headers(here.version, others)
        pip_install(tree.site, wanted["python"], [cuda_runtime(tree.site)], "--no-deps")
        functions = functions_asked_for(tree.site)
        try:
            sizes = slim(tree.site, int(wanted["capability"]))
        except ValueError as error:
            raise SystemExit(str(error)) from error
        print(
            f"kept {sizes.kept:,} bytes of device code for compute capability "
            f"{wanted['capability']}, and removed {sizes.zeroed:,}; packing takes minutes",
            flush=True,
        )
        files = cut(tree.folder, target, bundle.TENSORFLOW, most_bytes)
        return dict(functions=functions, other_headers=others, files=files)


def build_environment(capability: str) -> dict[str, str]:
    """Return the variables with which setup.py builds the op library for one kind of GPU."""
    return {
        "CONTINUAL_TRANSFORMERS_CUDA": "1",
        "CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES": capability,
        "CONTINUAL_TRANSFORMERS_SERVER": "0",
    }


def make_package(target: Path, capability: str) -> dict[str, Any]:
    """Build this package and write its archive to `target`. Return what about.json says of it."""
    with tempfile.TemporaryDirectory(dir=target) as folder:
        tree = bundle.Tree(Path(folder))
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tree.package)]
        environment = {**os.environ, **build_environment(capability)}
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if done.returncode:
            raise SystemExit("This package could not be built with GPU kernels")
        path = target / bundle.PACKAGE
        with open(path, "wb") as file:
            pack(tree.folder, file.write)
    return {path.name: bundle.describe_file(path)}


def write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / bundle.ABOUT).write_text(json.dumps(about, indent=1))


def make(folder: Path, python: str, capability: str, most_bytes: int = SLICE_BYTES) -> int:
    """Make the slices. Return their bytes."""
    here = tensorflow_headers.wanted()
    if not here:
        raise SystemExit("There is no TensorFlow in .venv: the slices are made of the same version")
    if shutil.which("xz") is None:
        raise SystemExit(
            "There is no xz here, which packs TensorFlow: on Debian, apt install xz-utils"
        )
    wanted = dict(
        tensorflow=here[0].version, keras=metadata.version("keras"), python=python,
        capability=capability,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    about = bundle.read_about(folder) or {}
    files = {name: file for name, file in about.get("files", {}).items() if name != bundle.PACKAGE}
    is_kept = {name: about.get(name) for name in wanted} == wanted and all(
        (folder / name).exists() and bundle.describe_file(folder / name) == file
        for name, file in files.items()
    )
    package = make_package(folder, capability)
    if is_kept:
        print(f"kept the slices of TensorFlow {wanted['tensorflow']} that are in {folder}")
        check_headers(wanted["tensorflow"], about["other_headers"])
        made = dict(about, files=files)
    else:
        for old in (folder / bundle.ABOUT, *folder.glob(f"{bundle.TENSORFLOW}.*")):
            old.unlink(missing_ok=True)
        made = make_tensorflow(folder, wanted, most_bytes)
    made["files"] |= package
    write_about(folder, {**wanted, **made})
    for name, file in made["files"].items():
        print(f"{name:22} {file['bytes']:>12,} bytes")
    return sum(file["bytes"] for file in made["files"].values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=bundle.FOLDER)
    parser.add_argument("--python", default=PYTHON, help="the GPU machine's Python")
    parser.add_argument("--capability", default=CAPABILITY, help="its GPU's compute capability")
    parser.add_argument("--slice-bytes", type=int, default=SLICE_BYTES)
    options = parser.parse_args(arguments)
    total = make(options.output, options.python, options.capability, options.slice_bytes)
    print(f"{options.output}: {total:,} bytes for Python {options.python} and compute capability "
          f"{options.capability}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
