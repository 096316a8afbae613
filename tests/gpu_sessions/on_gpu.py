"""Libraries of sessions on a GPU, real or emulated, and arrays there. It needs no Keras."""

import ctypes
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import continual_transformers_tf as ct
import continual_transformers_tf.session  # It loads the core library, which the others link.
import cuda_build

CORE = Path(ct.__file__).parent / cuda_build.LISTS["CORE_LIBRARY"]
LIBRARY = "CONTINUAL_TRANSFORMERS_CUDA_LIBRARY"


@cache
def library(machine):
    """Return the path of the library for a machine, or the reason why there is none."""
    if machine == "emulated":
        return cuda_build.build(cuda_build.default_directory(True, None, True), True, None, CORE)
    capability = cuda_build.find_capability()
    if capability is None:
        return cuda_build.why_no_driver() or "there is no GPU here"
    built = CORE.with_name(cuda_build.LISTS["CUDA_LIBRARY"])
    if built.exists():  # The package was built with it.
        return built
    directory = cuda_build.default_directory(False, capability, sessions=True)
    return cuda_build.build(directory, False, capability, CORE)


class OnEmulator:
    """An array in the emulator's device memory."""

    def __init__(self, array, gpu=0):
        self.emulator = ctypes.CDLL(str(library("emulated")))
        self.emulator.cuda_emulator_allocate.restype = ctypes.c_void_p
        self.gpu, self.bytes = gpu, array.nbytes
        self.address = self.emulator.cuda_emulator_allocate(ctypes.c_size_t(array.nbytes))
        # NumPy knows the address and does not touch the elements.
        memory = (ctypes.c_char * array.nbytes).from_address(self.address)
        self.view = np.frombuffer(memory, array.dtype).reshape(array.shape)
        self.copy(self.address, np.ascontiguousarray(array).ctypes.data)

    def copy(self, to, source):
        self.emulator.cuda_emulator_copy(*map(ctypes.c_void_p, (to, source, self.bytes)))

    def on_host(self):
        array = np.empty(self.view.shape, self.view.dtype)
        self.copy(array.ctypes.data, self.address)
        return array

    def __dlpack_device__(self):
        return 2, self.gpu

    def __dlpack__(self, *, stream=None):
        assert stream == 1  # CUDA's default stream.
        return self.view.__dlpack__()


class VersionedOnEmulator(OnEmulator):
    """The same, which can say by DLPack 1.0 that it is read-only."""

    def __init__(self, array, read_only, version=(1, 0)):
        super().__init__(array)
        self.view.flags.writeable = not read_only
        self.version = version

    def __dlpack__(self, *, stream=None, max_version=None):
        assert stream == 1
        assert max_version == (1, 0)
        capsule = self.view.__dlpack__(max_version=max_version)
        # The structure of the capsule begins with its version.
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        numbers = (ctypes.c_uint32 * 2).from_address(pointer(capsule, b"dltensor_versioned"))
        numbers[:] = self.version
        return capsule


def to_gpu(array):
    """Return an array on the GPU, and a function that returns what it holds."""
    if "emulated" in os.environ[LIBRARY]:
        there = OnEmulator(array)
        return there, there.on_host
    torch = pytest.importorskip("torch")
    there = torch.from_numpy(np.ascontiguousarray(array)).cuda()
    return there, lambda: there.cpu().numpy()
