"""The native libraries, without TensorFlow: their paths, and the instruction sets they can use."""

import ctypes
import functools
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent
CORE_LIBRARY_PATH = PACKAGE / "libcontinual_transformers.so"

BACKEND_VARIABLE = "CONTINUAL_TRANSFORMERS_BACKEND"
BACKENDS = ("auto", "fused", "tensorflow")

# The package with GPU kernels: op libraries of the same names as here, built with CUDA.
CUDA_PACKAGE = "continual_transformers_tf_cuda"
CUDA_DISTRIBUTION = "continual-transformers-tf-cuda"
CUDA_LIBRARY = "libcontinual_transformers_cuda.so"  # for sessions
# Written into an op library by cc/tensorflow/build_info.cc.
_CUDA_BUILD = re.compile(rb"\0((\d+)\.\d+) for sm_\d")

INSTALL = (
    "pip install --force-reinstall --no-deps --no-cache-dir .` in a checkout of "
    "continual-transformers-tf."
)
HOW_TO_BUILD = (
    f"To build it, with a C++17 compiler (Debian and Ubuntu: `apt install g++`): `{INSTALL}"
)


def backend() -> str:
    """Return what CONTINUAL_TRANSFORMERS_BACKEND asks for: "auto", "fused" or "tensorflow".

    Raises:
        ValueError: If it is set to anything else.
    """
    choice = os.environ.get(BACKEND_VARIABLE, "auto")
    if choice not in BACKENDS:
        raise ValueError(f"Expected {BACKEND_VARIABLE} to be one of {BACKENDS}, but got {choice!r}")
    return choice


@functools.cache
def core_library() -> ctypes.CDLL:
    """Load the core library and return its C functions (cc/attention/c_api.cc).

    Raises:
        ImportError: If it cannot be loaded.
    """
    if not CORE_LIBRARY_PATH.exists():
        raise ImportError(f"{CORE_LIBRARY_PATH} does not exist. {HOW_TO_BUILD}")
    try:
        library = ctypes.CDLL(str(CORE_LIBRARY_PATH))
        for name in ("target", "targets", "target_error"):
            getattr(library, f"continual_transformers_{name}").restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"{CORE_LIBRARY_PATH} could not be loaded: {error}. {HOW_TO_BUILD}"
        ) from error
    return library


def cpu_targets() -> tuple[list[str], str]:
    """Return the vector instruction sets that the CPU kernels can use on this machine.

    Returns:
        (names, the one in use). The fastest name comes first. The one in use is the fastest, or the
        one that CONTINUAL_TRANSFORMERS_TARGET named when the library was loaded.

    Raises:
        ImportError: If the core library cannot be loaded.
        ValueError: If CONTINUAL_TRANSFORMERS_TARGET names none of them.
    """
    library = core_library()
    error = library.continual_transformers_target_error().decode()
    if error:
        raise ValueError(error)
    names = library.continual_transformers_targets().decode().split(",")
    return names, library.continual_transformers_target().decode()


def op_libraries() -> dict[str, Path]:
    """Return the op libraries of this installation: {TensorFlow's minor version: path}."""
    prefix = f"{CORE_LIBRARY_PATH.stem}_tf"
    found = {path.stem.removeprefix(prefix): path for path in PACKAGE.glob(f"{prefix}*.so")}
    return dict(sorted(found.items(), key=lambda item: [*map(int, item[0].split("."))]))


def op_library(minor: str) -> tuple[Path, str | None]:
    """Return the op library for a version of TensorFlow, with GPU kernels if there are any.

    Args:
        minor: TensorFlow's minor version, such as "2.21".

    Returns:
        (path, why the package with GPU kernels is not used). The path may not exist. The reason is
        None if that package is used, or not installed.
    """
    name = f"{CORE_LIBRARY_PATH.stem}_tf{minor}.so"
    spec = importlib.util.find_spec(CUDA_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = next((Path(folder, name) for folder in folders if Path(folder, name).exists()), None)
    if path is None:
        return PACKAGE / name, None
    reason = _why_no_gpu_kernels(path)
    return (PACKAGE / name if reason else path), reason


def _why_no_gpu_kernels(path: Path) -> str | None:
    """Return why an op library of the package with GPU kernels cannot be used here, or None."""
    ours, theirs = (metadata.version(n) for n in ("continual-transformers-tf", CUDA_DISTRIBUTION))
    if ours != theirs:
        return (
            f"{CUDA_DISTRIBUTION} {theirs} does not fit continual-transformers-tf {ours}: "
            f"pip install '{CUDA_DISTRIBUTION}=={ours}'"
        )
    driver = cuda_driver()
    built = _CUDA_BUILD.search(path.read_bytes())
    if built and driver and driver[0] < int(built[2]):
        return (
            f"the GPU's driver supports CUDA {driver[0]}.{driver[1]}, and {CUDA_DISTRIBUTION} was "
            f"built with CUDA {built[1].decode()}: install a newer driver"
        )
    return None


def cuda_session_library() -> str | None:
    """Return the path of the library for sessions on a GPU; None: there is none.

    It is where the core library looks for it (cc/session/device.cc).
    """
    named = os.environ.get("CONTINUAL_TRANSFORMERS_CUDA_LIBRARY")
    folders = [PACKAGE.parent / CUDA_PACKAGE, PACKAGE]
    paths = [Path(named)] if named else [folder / CUDA_LIBRARY for folder in folders]
    return next((str(path) for path in paths if path.exists()), None)


def cuda_driver() -> tuple[int, int] | None:
    """Return the newest CUDA that the GPU's driver supports, such as (13, 0); None: no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10
