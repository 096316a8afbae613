"""Load the fused op library, and choose between it and plain TensorFlow."""

import ctypes
import functools
import os
import re
import warnings
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import kernels as kernel_registry
from tensorflow.python.ops import control_flow_util

from continual_transformers_tf import native
from continual_transformers_tf.native import BACKEND_VARIABLE, backend

MINOR = ".".join(tf.__version__.split(".")[:2])
# The library in use, and why the package with GPU kernels is not used, if it is installed.
_IN_USE = native.op_library(MINOR)
LIBRARY_PATH: Path = _IN_USE[0]
LIBRARY_NAME = LIBRARY_PATH.name
_NO_GPU_KERNELS: str | None = _IN_USE[1]

# The op of every layer's attention. Its kernels tell which devices have fused kernels.
SINGLE_OUTPUT = "ContinualTransformers>SingleOutputAttention"

# Written into the library by cc/tensorflow/build_info.cc.
_BUILD_INFO = re.compile(rb"continual-transformers-tf built for TensorFlow (\d+\.\d+[^ \0]*)\.\0")

_HOW_TO_BUILD = (
    "To build it for this TensorFlow, with a C++17 compiler (Debian and Ubuntu: "
    f"`apt install g++`): `{native.INSTALL}"
)


def built_for(path: str | Path) -> str | None:
    """Return the version of TensorFlow that an op library was built for.

    Args:
        path: The library's path.

    Returns:
        A string, such as "2.21.0"; None if the file is not an op library of this package.
    """
    found = _BUILD_INFO.search(Path(path).read_bytes())
    return found.group(1).decode() if found else None


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Load the library once, and return (its Python module, None) or (None, the reason)."""
    if not LIBRARY_PATH.exists():
        others = ", ".join(native.op_libraries())
        there = f"; there are op libraries for TensorFlow {others}" if others else ""
        return None, f"{LIBRARY_PATH} does not exist{there}. {_HOW_TO_BUILD}"
    # Read the version from the file's bytes before anything is loaded: a library of another
    # version may crash the process instead of reporting an error.
    try:
        version = built_for(LIBRARY_PATH)
    except OSError as error:
        return None, f"{LIBRARY_PATH} could not be read: {error}. {_HOW_TO_BUILD}"
    if version is None:
        return None, (
            f"{LIBRARY_PATH} is not an op library of continual-transformers-tf. {_HOW_TO_BUILD}"
        )
    if version.split(".")[:2] != MINOR.split("."):
        return None, (
            f"{LIBRARY_PATH} was built for TensorFlow {version}, but this is TensorFlow "
            f"{tf.__version__}; TensorFlow's C++ API changes with every minor version. "
            f"{_HOW_TO_BUILD}"
        )
    try:
        return tf.load_op_library(str(LIBRARY_PATH)), None
    except (tf.errors.OpError, RuntimeError) as error:
        return None, f"{LIBRARY_PATH} could not be loaded: {error}. {_HOW_TO_BUILD}"


def load_early() -> None:
    """Load the library where it may be needed, so that TensorFlow knows the ops of SavedModels.

    If it cannot be loaded, nothing happens: `fused_ops` says so when an op is needed.
    """
    if os.environ.get(BACKEND_VARIABLE) != "tensorflow":
        _load()


@functools.cache
def _warn_of_cpu_only() -> None:
    if _NO_GPU_KERNELS:
        warnings.warn(
            f"continual_transformers_tf uses its CPU kernels only: {_NO_GPU_KERNELS}.",
            RuntimeWarning,
            stacklevel=4,
        )


@functools.cache
def _warn_once(reason: str | None) -> None:
    warnings.warn(
        "continual_transformers_tf runs without its fused kernels, in plain TensorFlow: the same "
        f"results, slower. The reason: {reason} (Set {BACKEND_VARIABLE}=tensorflow to choose plain "
        "TensorFlow and see this no more.)",
        RuntimeWarning,
        stacklevel=4,
    )


def fused_ops(device_type: str, op: str = SINGLE_OUTPUT) -> Any:
    """Return the module with the fused ops, or None if plain TensorFlow must be used.

    Args:
        device_type: The type of the device that holds the streams' state, such as "CPU".
        op: The name of the op that is wanted.

    Raises:
        ImportError: With CONTINUAL_TRANSFORMERS_BACKEND=fused, if the library cannot be loaded.
        ValueError: If CONTINUAL_TRANSFORMERS_BACKEND is not one of its values, or is "fused" and
            the op has no kernel for this device.
    """
    choice = backend()
    if choice == "tensorflow":
        return None
    _warn_of_cpu_only()
    module, reason = _load()
    if module is None:
        if choice == "fused":
            raise ImportError(f"{BACKEND_VARIABLE}=fused, but {reason}")
        _warn_once(reason)
        return None
    if not has_kernel(op, device_type):
        reason = _no_kernel(op, device_type)
        if choice == "fused":
            raise ValueError(f"{BACKEND_VARIABLE}=fused, but {reason}")
        if not in_xla():
            _warn_once(reason)
        return None
    # XLA knows no custom ops. With jit_compile=True the plain twin is traced.
    return None if in_xla() else module


def has_kernel(op: str, device_type: str) -> bool:
    """Return whether an op of the library has a kernel for a type of devices."""
    return device_type in _registered_device_types(op)


def _no_kernel(op: str, device_type: str) -> str:
    """Return why an op has no kernel for a type of devices, and what to do about it."""
    if device_type == "GPU" and not has_kernel(SINGLE_OUTPUT, "GPU"):
        return (
            f"the streams' state is on a GPU, and {LIBRARY_PATH} was built without CUDA. "
            f"`pip install {native.CUDA_DISTRIBUTION}` brings a published wheel's GPU kernels. "
            "To build them, where there is nvcc: "
            f"`CONTINUAL_TRANSFORMERS_CUDA=1 {native.INSTALL}"
        )
    there_are = " and ".join(sorted(_registered_device_types(op)))
    return (
        f"the streams' state is on a {device_type}, and {op.split('>')[1]} has kernels for "
        f'{there_are} alone. (A layer that is made within `tf.device("CPU")` keeps its there.)'
    )


def in_xla() -> bool:
    """Return whether a graph is being traced for XLA, by jit_compile=True."""
    return not context.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def kernels() -> frozenset[str]:
    """Return the device types that have fused kernels in this process.

    Returns:
        A frozenset of names: "CPU", and "GPU" if the library was built with CUDA, whether or not
        there is a GPU. It is empty if plain TensorFlow is used; `load_error` says why.
    """
    if load_error() is not None:
        return frozenset()
    _warn_of_cpu_only()
    return _registered_device_types(SINGLE_OUTPUT)


@functools.cache
def _registered_device_types(op: str) -> frozenset[str]:
    _load()
    registered = kernel_registry.get_registered_kernels_for_op(op)
    return frozenset(kernel.device_type for kernel in registered.kernel)


def cuda_build() -> str | None:
    """Return what the fused kernels for GPUs were built with and for.

    Returns:
        A string, such as "13.0 for sm_80, sm_90, PTX of 90": CUDA's version, the GPUs that there is
        machine code for, and what the driver compiles for newer ones. None if the library was
        built without CUDA.

    Raises:
        RuntimeError: If there are no fused kernels (`load_error` says why).
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    cuda_build = ctypes.CDLL(str(LIBRARY_PATH)).continual_transformers_cuda_build
    cuda_build.restype = ctypes.c_char_p
    return cuda_build().decode() or None


def load_error() -> str | None:
    """Return why this process has no fused kernels, a sentence; None if it has them."""
    if backend() == "tensorflow":
        return f"{BACKEND_VARIABLE}=tensorflow asks for plain TensorFlow"
    return _load()[1]
