"""Builds the wheels that can be published: `python3 tools/wheels.py OUT`.

There is one wheel for each CPython, with an op library for each supported TensorFlow, and one with
GPU kernels for any CPython, if there is an nvcc of CUDA 13. They are for machines with glibc 2.35
or newer. OUT has nothing else afterwards.
"""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.insert(0, str(ROOT / "cuda"))
import nvcc  # noqa: E402  Beside this folder.

LISTS = runpy.run_path(str(ROOT / "cc" / "library.bzl"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CUDA_PACKAGE = ROOT / "cuda" / "package"
WORK = ROOT / "build" / "wheels"

# Debian 12's compiler and libraries need no newer glibc.
PLATFORM = f"manylinux_2_35_{os.uname().machine}"
# TensorFlow brings it.
NOT_OURS = "libtensorflow_framework.so.2"
# GPU kernels of published wheels are built with this CUDA.
CUDA_MAJOR = 13


def supported_pythons() -> list[str]:
    """Return the versions of CPython that pyproject.toml names, such as "3.11"."""
    prefix = "Programming Language :: Python :: "
    names = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if prefix in line]
    return [name for name in names if "." in name]


def find_python(version: str) -> Path | None:
    """Return the interpreter of a version of CPython, with its headers; or None.

    It may be on PATH or be pyenv's.
    """
    for path in candidates(version):
        program = (
            "import sys, sysconfig; print(sys.version_info[:2], sysconfig.get_paths()['include'])"
        )
        done = subprocess.run([path, "-c", program], capture_output=True, text=True)
        wanted = f"({version.replace('.', ', ')}) "
        if done.returncode == 0 and done.stdout.startswith(wanted):
            headers = Path(done.stdout.removeprefix(wanted).strip())
            if (headers / "Python.h").exists():
                return path
    return None


def candidates(version: str) -> Iterator[Path]:
    """Return the places where an interpreter of a version may be."""
    for folder in os.get_exec_path():
        if Path(folder, f"python{version}").exists():
            yield Path(folder, f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)


def run(*command: str | Path, **variables: str) -> None:
    """Run a command in the checkout, with further environment variables."""
    print("+", *command, flush=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=True)


def pip_wheel(python: Path, source: Path, folder: Path, **variables: str) -> Path:
    """Have pip build a wheel in an environment of its own. Return its path."""
    # An earlier build's libraries would be packed too.
    for stale in source.glob("build/lib*"):
        shutil.rmtree(stale)
    folder.mkdir(parents=True)
    # An environment, because Debian's Python does not let pip build outside of one.
    environment = folder.parent / f"{folder.name}.venv"
    run(python, "-m", "venv", "--clear", environment)
    run(
        *(environment / "bin" / "python", "-m", "pip", "wheel", source),
        *("--no-deps", "--wheel-dir", folder),
        **variables,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> None:
    """Check that a wheel runs with the platform's glibc, name it so, and strip its libraries."""
    run(
        *(sys.executable, "-m", "auditwheel", "repair", wheel, "--plat", PLATFORM, "--only-plat"),
        *("--strip", "--exclude", NOT_OURS, "--exclude", LISTS["CORE_LIBRARY"]),
        *("--wheel-dir", out),
        PATH=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
    )


def cuda_wheel(wheel: Path, python: Path) -> Path:
    """Pack the op libraries of a wheel that was built with CUDA. Return the new wheel's path."""
    source = WORK / "cuda_package"
    shutil.copytree(CUDA_PACKAGE, source)
    shutil.copy(ROOT / "LICENSE", source)
    with zipfile.ZipFile(wheel) as files:
        for minor in LISTS["TENSORFLOWS"]:
            name = LISTS["OP_LIBRARY"].format(MINOR=minor)
            target = source / "continual_transformers_tf_cuda" / name
            target.write_bytes(files.read(f"continual_transformers_tf/{name}"))
    version = {"CONTINUAL_TRANSFORMERS_VERSION": PROJECT["version"]}
    return pip_wheel(python, source, WORK / "cuda_wheel", **version)


def main() -> None:
    """Build the wheels that can be built here, and say which are left out and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    for folder in (out, WORK):
        shutil.rmtree(folder, ignore_errors=True)
    pythons = {version: find_python(version) for version in supported_pythons()}
    skipped = [
        f"CPython {version} (it, or its headers, are not installed)"
        for version, path in pythons.items()
        if path is None
    ]
    variables = {"CONTINUAL_TRANSFORMERS_TENSORFLOW": ",".join(LISTS["TENSORFLOWS"])}
    found = {version: path for version, path in pythons.items() if path is not None}
    for version, path in found.items():
        wheel = pip_wheel(path, ROOT, WORK / version, CONTINUAL_TRANSFORMERS_CUDA="0", **variables)
        repair(wheel, out)
    toolkit = nvcc.chosen()
    if toolkit is None or int(toolkit.version.split(".")[0]) < CUDA_MAJOR:
        skipped.append(f"GPU kernels (there is no nvcc of CUDA {CUDA_MAJOR} or newer)")
    elif found:
        python = next(iter(found.values()))
        wheel = pip_wheel(python, ROOT, WORK / "cuda", CONTINUAL_TRANSFORMERS_CUDA="1", **variables)
        repair(cuda_wheel(wheel, python), out)
    if not found:
        raise SystemExit(f"No CPython of {', '.join(pythons)} was found with its headers")
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(out.glob("*.whl")))
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}")
    for what in skipped:
        print(f"not built: {what}")


if __name__ == "__main__":
    main()
