"""Sessions on a GPU, against the float64 reference of the plan and against sessions on the CPU.

`gpu` runs on a GPU. `emulated` runs everywhere: the same sources, built for the emulator of CUDA in
tools/gpu/emulator.
"""

import gc
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import cuda_build
import nvcc
from continual_transformers_tf.models.lowering import lower
from continual_transformers_tf.session import (
    OtherModelError,
    Session,
    TooManyStreamsError,
    UnknownStreamError,
)
from model_case import BOUNDS
from model_cases import CASES
from plan_files import PlanFile, attention_only_plan, attention_plan
from test_session import Streamed, by_streams, check, referenced

CORE = Path(ct.__file__).parent / cuda_build.LISTS["CORE_LIBRARY"]
LIBRARY = "CONTINUAL_TRANSFORMERS_CUDA_LIBRARY"
FEATURES, OUTPUTS, WINDOW = 6, 5, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
F = np.float32


@cache
def library(machine):
    """Return the path of the library for a machine, or the reason why there is none."""
    emulated, capability = machine == "emulated", None
    if not emulated:
        capability = cuda_build.find_capability()
        if capability is None:
            return cuda_build.why_no_driver() or "there is no GPU here"
    directory = cuda_build.default_directory(emulated, capability, sessions=True)
    return cuda_build.build(directory, emulated, capability, CORE)


@pytest.fixture(params=["emulated", "gpu"])
def device(request, monkeypatch):
    """Return the name of the device to test."""
    found = library(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setenv(LIBRARY, str(found))
    return "cuda:0"


@pytest.fixture
def plan(random):
    return attention_plan(random, FEATURES, window=WINDOW, outputs=OUTPUTS)


@pytest.fixture
def session(plan, device):
    return plan.session(device=device)


@pytest.fixture
def on_cpu(plan):
    return plan.session()


@pytest.fixture
def x(random):
    """Return steps of 8 streams, (8, 20, FEATURES)."""
    return random.standard_normal((8, 20, FEATURES)).astype(F)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_every_model(random, device, name):
    case = CASES[name]
    model = case.build()
    lowered = lower(model, case.seq_len)
    if lowered.plan["compute_dtype"] == "float64":
        with pytest.raises(ValueError, match="compute dtype float64 has no kernels on cuda:0"):
            Session(model, seq_len=case.seq_len, device=device)
        return
    session = Session(model, seq_len=case.seq_len, device=device)
    inputs = case.inputs(model, random, (3, 2 * case.window + 8))
    ids = session.open(5)[[3, 0, 4]]
    outputs = by_streams(Streamed(session), inputs, ids)
    check(outputs, referenced(lowered.plan, lowered.weights, inputs), BOUNDS[case.dtype])
    # Copies of the streams continue on the CPU, and from there on the GPU again.
    on_cpu = Session(model, seq_len=case.seq_len)
    there = on_cpu.open(3)
    on_cpu.set_state(session.get_state(ids), there)
    step = [x[:, 0] for x in inputs]
    here, there_too = Streamed(session), Streamed(on_cpu)
    check(there_too.step(step, streams=there), here.step(step, streams=ids), BOUNDS[case.dtype])
    back = session.open(3)
    session.set_state(on_cpu.get_state(there), back)
    check(here.step(step, streams=back), there_too.step(step, streams=there), BOUNDS[case.dtype])
