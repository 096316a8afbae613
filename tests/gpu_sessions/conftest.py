"""The fixture `device`: "cuda:0" twice, once on the emulator and once on a GPU.

It needs NumPy, pytest and a build of this package. Neither TensorFlow nor Keras, except for
test_keras_models_on_gpu.py:

    python -m pytest --confcutdir=tests/gpu_sessions tests/gpu_sessions
"""

import ctypes
import importlib.util
import os
import zlib

import numpy as np
import pytest

from on_gpu import LIBRARY, library
from session_benchmark import launches

collect_ignore = []
if importlib.util.find_spec("keras") is None:
    collect_ignore.append("test_keras_models_on_gpu.py")


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Return the name of the device to test."""
    found = library(request.param)
    if isinstance(found, str):
        if os.environ.get("CONTINUAL_TRANSFORMERS_EXPECT_GPU") == "1":
            pytest.fail(found)
        pytest.skip(found)
    monkeypatch.setenv(LIBRARY, str(found))
    if request.param == "emulated":  # Each test has its own order of threads and blocks.
        order = zlib.crc32(request.node.name.encode()) % 5
        ctypes.CDLL(str(found)).cuda_emulator_set_order(order)
    return "cuda:0"


@pytest.fixture(params=[False, True], ids=["launches", "persistent"])
def persist(device, request):
    """Let steps of one stream be launches, and then, where they can, a persistent kernel.

    The value is whether they are.
    """
    with launches(persist=request.param):
        yield request.param


@pytest.fixture
def random():
    return np.random.default_rng(20261129)
