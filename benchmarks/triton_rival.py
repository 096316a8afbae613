"""Triton, whose Python backend steps a session: the rival of those who have Triton already.

The wheel nvidia-pytriton has it. It needs NumPy 1, so it has an environment of its own, with the
Python of .venv:

    .venv/bin/python -m venv build/bench/triton
    build/bench/triton/bin/pip install nvidia-pytriton==0.7.0 "numpy<2"
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

import continual_transformers_tf as ct

MODEL = Path(__file__).resolve().parent / "triton_model.py"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = Path("lib", f"python{PYTHON}", "site-packages")
START_SECONDS = 60

# The scheduler "oldest" makes batches of the sequences that wait, as the server does.
CONFIG = """
name: "{model}"
backend: "python"
max_batch_size: 64
input {{ name: "{input.name}" data_type: TYPE_FP32 dims: {input_shape} }}
output {{ name: "{output.name}" data_type: TYPE_FP32 dims: {output_shape} }}
instance_group {{ kind: KIND_CPU count: 1 }}
sequence_batching {{
  oldest {{ max_candidate_sequences: 64 }}
  control_input {{
    name: "START" control {{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }}
  }}
  control_input {{
    name: "END" control {{ kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] }}
  }}
  control_input {{
    name: "CORRID" control {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }}
  }}
}}
parameters {{ key: "model_file" value: {{ string_value: "{path}" }} }}
parameters {{ key: "package" value: {{ string_value: "{package}" }} }}
"""


def is_installed(environment: Path) -> bool:
    """Return whether an environment has Triton, for this version of Python."""
    return (environment / PACKAGES / "pytriton" / "tritonserver").exists()


@contextlib.contextmanager
def running(environment: Path, folder: Path, path: Path, port: int) -> Iterator[str]:
    """Run Triton for as long as a `with` block.

    Args:
        environment: A virtual environment with nvidia-pytriton.
        folder: Where to put what it reads.
        path: The model file.
        port: Its port for gRPC.

    Returns:
        "host:port", once it answers.

    Raises:
        OSError: If it does not.
    """
    packages = environment.resolve() / PACKAGES
    triton = packages / "pytriton" / "tritonserver"
    # The backend looks for its program for this version of Python beside itself.
    backend = folder / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    stub = triton / "python_backend_stubs" / PYTHON
    shutil.copy(stub / "triton_python_backend_stub", backend)
    version = folder / "models" / path.stem / "1"
    version.mkdir(parents=True)
    shutil.copy(MODEL, version / "model.py")
    session = ct.Session.load(path)
    (taken,), (given,) = session.inputs, session.outputs
    config = CONFIG.format(
        model=path.stem,
        input=taken,
        input_shape=list(taken.shape),
        output=given,
        output_shape=list(given.shape),
        path=path,
        package=Path(ct.__file__).parent.parent,
    )
    (version.parent / "config.pbtxt").write_text(config)
    libraries = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environ = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        # The Python in the backend's program takes the packages of the first one on PATH.
        "PATH": f"{environment.resolve() / 'bin'}:{os.environ['PATH']}",
    }
    options = {
        "model-repository": folder / "models",
        "backend-directory": folder / "backends",
        "grpc-address": "127.0.0.1",
        "grpc-port": port,
        "allow-http": "false",
        "allow-metrics": "false",
        "exit-timeout-secs": 5,
    }
    command = [triton / "bin" / "tritonserver", *(f"--{k}={v}" for k, v in options.items())]
    log_file = folder / "triton.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        url = f"127.0.0.1:{port}"
        with grpc.insecure_channel(url) as channel:
            ready = grpc.channel_ready_future(channel)
            end = time.monotonic() + START_SECONDS
            while not ready.done():
                if process.poll() is not None or time.monotonic() > end:
                    raise OSError(f"Triton did not start:\n{log_file.read_text()[-3000:]}")
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
