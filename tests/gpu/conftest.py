"""The fixture `machine`, which runs the kernels: "gpu" on a GPU, "emulated" on the CPU.

The GPU is used through CuPy or PyTorch, the CPU through tools/gpu/emulator. It needs NumPy and
pytest, and for "gpu" CUDA and CuPy or PyTorch; neither TensorFlow nor this package:

    python -m pytest --confcutdir=tests/gpu tests/gpu
"""

import os
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

import arena
import cuda_build
import cuda_calls


class Machine(NamedTuple):
    name: str
    library: cuda_calls.CudaLibrary
    memory: object

    @property
    def is_gpu(self):
        return self.name == "gpu"


@cache
def find_machine(name):
    """Return a Machine, or the reason why there is none."""
    if name == "emulated":
        memory, capability = arena.HostMemory(), None
    else:
        memory, reason = arena.device_memory()
        if memory is None:
            return reason
        capability = cuda_build.find_capability()
    emulated = name == "emulated"
    directory = cuda_build.default_directory(emulated, capability)
    path = cuda_build.build(directory, emulated, capability)
    return Machine(name, cuda_calls.CudaLibrary(path), memory)


@pytest.fixture(params=["emulated", "gpu"])
def machine(request):
    found = find_machine(request.param)
    if isinstance(found, str):
        if os.environ.get("CONTINUAL_TRANSFORMERS_EXPECT_GPU") == "1":
            pytest.fail(found)
        pytest.skip(found)
    if not found.is_gpu:  # Each test has its own order of threads and blocks, always the same.
        found.library.set_order(zlib.crc32(request.node.name.encode()) % 5)
    return found


@pytest.fixture
def random():
    return np.random.default_rng(20261124)
