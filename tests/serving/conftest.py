import contextlib
import json
import os

# Ray starts its programs by a fork. gRPC's handlers for that crash the new process now and then, if
# other threads are in gRPC. They are read when gRPC is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tritonclient.grpc
from click.testing import CliRunner
from google.protobuf import descriptor_pb2
from guards import make_certificates
from ports import free_port
from proxy import Proxy

import continual_transformers_tf as ct
from continual_transformers_tf import cli
from continual_transformers_tf.serving import program

ROOT = Path(__file__).parent.parent.parent
WINDOW, FEATURES, OUTPUTS = 5, 6, 3


def pytest_collection_modifyitems(config, items):
    if program.PATH.exists():
        return
    skip = pytest.mark.skip(reason="the server is not built: see tools/server_packages.py")
    for item in items:
        if "serving" in item.path.parts:
            item.add_marker(skip)


class Server:
    """A running server, and what it logs."""

    def __init__(self, *arguments, env=None):
        self.process = subprocess.Popen(
            [program.PATH, "--grpc-port", "0", "--http-port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.events, self._ready = [], threading.Event()
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(60)
        if self.event("ready") is None:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not start: {self.said}")
        self.grpc_port = self.event("ready")["grpc_port"]
        self.http_port = self.event("ready")["http_port"]
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"

    def _read(self):
        for line in self.process.stderr:
            self.said += line
            try:
                self.events.append(json.loads(line))
            except ValueError:
                continue
            if self.events[-1].get("event") == "ready":
                self._ready.set()
        self._ready.set()

    def event(self, name):
        return next((event for event in self.events if event.get("event") == name), None)

    def stop(self):
        """End the server as an operator does. Return its exit status."""
        self.process.terminate()
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
        self._reader.join()
        self.process.stderr.close()
        return status

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


@pytest.fixture
def start_server():
    """Return a function that starts a server; all of them are ended after the test."""
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A model file with one input, x [6], and one output, y [3]."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((WINDOW, FEATURES), name="x")
    hidden = ct.CoSiMultiHeadAttention(WINDOW, 2, 3)(inputs, inputs)
    outputs = keras.layers.Dense(OUTPUTS, name="y")(hidden)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    ct.Session(keras.Model(inputs, outputs)).save(path)
    return path


@pytest.fixture(scope="session")
def watch_file(tmp_path_factory):
    """The model file of the demo, as the command line writes it."""
    path = tmp_path_factory.mktemp("demo") / "new" / "watch.safetensors"
    result = CliRunner().invoke(cli.main, ["demo", "--save-model", str(path)])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def server(model_file):
    running = Server(model_file)
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(server):
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as made:
        yield made


@pytest.fixture
def session(model_file):
    return ct.Session.load(model_file)


@pytest.fixture
def samples():
    """Return a function that makes random float32 arrays."""
    random = np.random.default_rng(3)
    return lambda *shape: random.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    """The descriptor of cc/server/inference.proto."""
    path = tmp_path_factory.mktemp("proto") / "descriptors"
    proto = "cc/server/inference.proto"
    subprocess.run(["protoc", f"-I{ROOT}", f"--descriptor_set_out={path}", proto], check=True)
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    return file


@pytest.fixture
def proxy(server):
    made = Proxy(server.grpc_url)
    yield made
    made.stop()


@contextlib.contextmanager
def running_redis(folder):
    """Run a Redis without persistence, on a free port. Its address."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server on PATH")
    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder))
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def redis(tmp_path):
    """Return the address of a Redis without persistence."""
    with running_redis(tmp_path) as address:
        yield address


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with an authority, ca, what it signed, server and client, and a token."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture
def start_sharded(start_server, model_file, tmp_path):
    """Return a function that starts a server which is to be one of several."""
    token = tmp_path / "operator-token"
    token.write_text("an operator's secret")

    def start(*arguments):
        options = ("--sharded", "--operator-token-file", token)
        return start_server(model_file, *options, *arguments)

    return start
