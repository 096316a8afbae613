"""The native libraries, without TensorFlow: their paths, and the instruction sets they can use."""

import ctypes
import functools
import os
from pathlib import Path

PACKAGE = Path(__file__).parent
CORE_LIBRARY_PATH = PACKAGE / "libcontinual_transformers.so"

BACKEND_VARIABLE = "CONTINUAL_TRANSFORMERS_BACKEND"
BACKENDS = ("auto", "fused", "tensorflow")

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
        read = library.continual_transformers_read
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"{CORE_LIBRARY_PATH} could not be loaded: {error}. {HOW_TO_BUILD}"
        ) from error
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_ubyte
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
    found = {
        path.stem.removeprefix(prefix): path
        for path in PACKAGE.glob(f"{prefix}*.so")
        if "_cuda" not in path.stem
    }
    return dict(sorted(found.items(), key=lambda item: [*map(int, item[0].split("."))]))
