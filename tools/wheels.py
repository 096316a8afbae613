"""Builds the wheels that can be published: `python3 tools/wheels.py OUT`.

There is one wheel for each CPython, with an op library for each supported TensorFlow, and one with
GPU kernels for any CPython, if there is an nvcc of CUDA 13. With a cross compiler for AArch64 there
is another for each CPython, without GPU kernels (`aarch64.py`). They are for machines with glibc
2.35 or newer. OUT has nothing else afterwards.
"""

import argparse
import itertools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path[:0] = [str(ROOT / "cuda"), str(ROOT / "tools")]
import aarch64  # noqa: E402
import nvcc  # noqa: E402  Beside this folder.
from tensorflow_headers import FRAMEWORK, LISTS, VARIABLE  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CUDA_PACKAGE = ROOT / "cuda" / "package"
WORK = ROOT / "build" / "wheels"

MACHINE = platform.machine()
# Debian 12's compiler and libraries need no newer glibc.
PLATFORM = "manylinux_2_35_{machine}"
# TensorFlow has no wheels for these pairs of CPython and TensorFlow.
WITHOUT_WHEELS = {("3.13", "2.19")}
# GPU kernels of published wheels are built with this CUDA.
CUDA_MAJOR = 13
# The environment variables of the wheels for each CPython.
WITHOUT_CUDA = {VARIABLE: ",".join(LISTS["TENSORFLOWS"]), "CONTINUAL_TRANSFORMERS_CUDA": "0"}
WITH_CUDA = {**WITHOUT_CUDA, "CONTINUAL_TRANSFORMERS_CUDA": "1"}


def supported_pythons() -> list[str]:
    """Return the versions of CPython that pyproject.toml names, such as "3.11"."""
    prefix = "Programming Language :: Python :: "
    names = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if prefix in line]
    return [name for name in names if "." in name]


def supported_pairs() -> list[tuple[str, str]]:
    """Return the supported pairs of CPython and TensorFlow, such as ("3.11", "2.20")."""
    pairs = itertools.product(supported_pythons(), LISTS["TENSORFLOWS"])
    return [pair for pair in pairs if pair not in WITHOUT_WHEELS]


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


def repair(wheel: Path, out: Path, machine: str = MACHINE, programs: str | None = None) -> None:
    """Check that a wheel runs with the platform's glibc, name it so, and strip its libraries.

    Args:
        wheel: The wheel's path.
        out: The folder for the new wheel.
        machine: The machine that the wheel is for.
        programs: The PATH on which `strip` is found, if it is another machine's.

    Raises:
        SystemExit: If the wheel needs another glibc than the platform's.
    """
    tag = PLATFORM.format(machine=machine)
    run(
        *(sys.executable, "-m", "auditwheel", "repair", wheel, "--only-plat"),
        # auditwheel takes no tag of another machine, but finds the oldest that fits.
        *("--plat", tag if machine == MACHINE else "auto"),
        # TensorFlow brings the first, and the package itself the second.
        *("--strip", "--exclude", FRAMEWORK, "--exclude", LISTS["CORE_LIBRARY"]),
        *("--wheel-dir", out),
        PATH=f"{sysconfig.get_path('scripts')}:{programs or os.environ['PATH']}",
    )
    if not (out / wheel.name.replace(f"linux_{machine}", tag)).exists():
        raise SystemExit(f"auditwheel found another tag than {tag} for {wheel.name}")


def cuda_wheel(wheel: Path, python: Path) -> Path:
    """Pack the GPU libraries of a wheel that was built with CUDA. Return the new wheel's path."""
    source = WORK / "cuda_package"
    shutil.copytree(CUDA_PACKAGE, source)
    shutil.copy(ROOT / "LICENSE", source)
    with zipfile.ZipFile(wheel) as files:
        op_libraries = [LISTS["OP_LIBRARY"].format(MINOR=minor) for minor in LISTS["TENSORFLOWS"]]
        for name in (LISTS["CUDA_LIBRARY"], *op_libraries):
            target = source / "continual_transformers_tf_cuda" / name
            target.write_bytes(files.read(f"continual_transformers_tf/{name}"))
    version = {"CONTINUAL_TRANSFORMERS_VERSION": PROJECT["version"]}
    return pip_wheel(python, source, WORK / "cuda_wheel", **version)


def wheels_of_this_machine(pythons: Mapping[str, Path], out: Path) -> list[str]:
    """Build wheels for this machine. Return what is left out and why."""
    for version, python in pythons.items():
        repair(pip_wheel(python, ROOT, WORK / version, **WITHOUT_CUDA), out)
    toolkit = nvcc.chosen()
    if toolkit is None or int(toolkit.version.split(".")[0]) < CUDA_MAJOR:
        return [f"GPU kernels (there is no nvcc of CUDA {CUDA_MAJOR} or newer)"]
    python = next(iter(pythons.values()))
    repair(cuda_wheel(pip_wheel(python, ROOT, WORK / "cuda", **WITH_CUDA), python), out)
    return []


def wheels_for_aarch64(pythons: Mapping[str, Path], out: Path) -> list[str]:
    """Build wheels for AArch64 with the cross compiler. Return what is left out and why."""
    for version, python in pythons.items():
        try:
            variables = aarch64.build_variables(version)
        except aarch64.Missing as why:
            return [f"wheels for AArch64 ({why})"]
        folder = WORK / f"{version}-{aarch64.MACHINE}"
        wheel = pip_wheel(python, ROOT, folder, **WITHOUT_CUDA, **variables)
        repair(wheel, out, aarch64.MACHINE, variables["PATH"])
    return []


def main() -> None:
    """Build the wheels that can be built here, and say which are left out and why."""
    builders = {MACHINE: wheels_of_this_machine}
    builders.setdefault(aarch64.MACHINE, wheels_for_aarch64)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--machine", choices=builders, help="build only the wheels for it")
    options = parser.parse_args()
    out = options.out.resolve()
    for folder in (out, WORK):
        shutil.rmtree(folder, ignore_errors=True)
    pythons = {version: find_python(version) for version in supported_pythons()}
    skipped = [
        f"CPython {version} (it, or its headers, are not installed)"
        for version, path in pythons.items()
        if path is None
    ]
    found = {version: path for version, path in pythons.items() if path is not None}
    if not found:
        raise SystemExit(f"No CPython of {', '.join(pythons)} was found with its headers")
    for machine in [options.machine] if options.machine else builders:
        skipped += builders[machine](found, out)
    built = sorted(out.glob("*.whl"))
    if built:
        run(sys.executable, "-m", "twine", "check", "--strict", *built)
    for path in built:
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}")
    for what in skipped:
        print(f"not built: {what}")


if __name__ == "__main__":
    main()
