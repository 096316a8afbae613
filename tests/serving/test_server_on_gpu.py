"""The server with `--device`. The GPU is emulated: tests/gpu_sessions has the rest."""

import subprocess
from pathlib import Path

import numpy as np
import tritonclient.http as triton

import continual_transformers_tf as ct
import cuda_build
from continual_transformers_tf.serving import program

CORE = Path(ct.__file__).parent / cuda_build.LISTS["CORE_LIBRARY"]
LIBRARY = "CONTINUAL_TRANSFORMERS_CUDA_LIBRARY"


def test_streams_on_a_gpu(start_server, model_file, session, tmp_path):
    directory = cuda_build.default_directory(emulated=True, sessions=True)
    library = cuda_build.build(directory, emulated=True, core=CORE)
    options = ("--device", "cuda:0", "--state-dir", tmp_path)
    x = np.random.default_rng(5).standard_normal((2, 9, 6)).astype("float32")
    expected = session.steps(x)

    def step(client, t):
        given = triton.InferInput("x", [2, 6], "FP32").set_data_from_numpy(x[:, t])
        names = triton.InferInput("streams", [2], "BYTES")
        names.set_data_from_numpy(np.array([b"a", b"b"], object))
        return client.infer("small", [given, names]).as_numpy("y")

    for steps in (range(5), range(5, 9)):  # A server goes on with the streams of the one before.
        server = start_server(model_file, *options, env={LIBRARY: str(library)})
        with triton.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
            for t in steps:
                np.testing.assert_allclose(step(client, t), expected[:, t], rtol=1e-4, atol=1e-5)
        assert server.stop() == 0


def test_a_device_that_does_not_exist(model_file):
    done = subprocess.run(
        [program.PATH, "--grpc-port", "0", "--http-port", "0", "--device", "tpu", model_file],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Expected device to be" in done.stderr
