"""The server over HTTP: with tritonclient, with plain requests, and with bytes that are none."""

import http.client
import json
import re
import socket
import ssl
import subprocess
import threading

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

import continual_transformers_tf as ct
from continual_transformers_tf.serving import program

FEATURES, OUTPUTS = 6, 3


def tensor(name, array, binary=True):
    array = np.asarray(array)
    datatype = {"f": "FP32", "i": "INT64", "O": "BYTES"}[array.dtype.kind]
    made = triton.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, binary_data=binary)


def infer(client, x, streams=None, step=None, binary=True, **options):
    inputs = [tensor("x", x, binary)]
    outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
    if streams is not None:
        names = np.array([str(name).encode() for name in streams], object)
        inputs.append(tensor("streams", names, binary))
    if np.ndim(step) == 1:
        inputs.append(tensor("step", np.asarray(step, np.int64), binary))
    elif step is not None:
        options["parameters"] = {"step": int(step)}
    return client.infer("small", inputs, outputs=outputs, **options).as_numpy("y")


@pytest.fixture
def http_client(server):
    client = triton.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    yield client
    client.close()


class Plain:
    """Requests without tritonclient. `call` returns (status, parsed or raw body)."""

    def __init__(self, port, token=None, context=None):
        made = http.client.HTTPSConnection if context else http.client.HTTPConnection
        options = {"context": context} if context else {}
        self.connection = made("localhost" if context else "127.0.0.1", port, timeout=60, **options)
        self.headers = {"authorization": f"Bearer {token}"} if token else {}

    def call(self, method, path, body=None, **headers):
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.connection.request(method, path, data, {**self.headers, **headers})
        response = self.connection.getresponse()
        content = response.read()
        if response.headers["content-type"] == "application/json":
            return response.status, json.loads(content)
        return response.status, content

    def step(self, stream, x, **parameters):
        x = np.asarray(x, np.float32)
        body = {
            "parameters": {"sequence_id": stream, **parameters},
            "inputs": [
                {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
            ],
        }
        return self.call("POST", "/v2/models/small/infer", body)


@pytest.fixture
def plain(server):
    return Plain(server.http_port)


def test_health_and_descriptions(http_client, session):
    assert http_client.is_server_live()
    assert http_client.is_server_ready()
    assert http_client.is_model_ready("small", "1")
    assert not http_client.is_model_ready("large")
    assert http_client.get_server_metadata()["name"] == "continual-transformers-server"
    metadata = http_client.get_model_metadata("small")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, FEATURES]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, OUTPUTS]}]
    config = http_client.get_model_config("small")
    assert config["max_batch_size"] > 0
    assert config["parameters"]["receptive_field"]["string_value"] == str(session.receptive_field)
    (model,) = http_client.get_model_repository_index()
    assert (model["name"], model["state"]) == ("small", "READY")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("sequence_id", [7, "a stream's name", 2**62])
def test_a_sequence_equals_a_session(http_client, session, samples, sequence_id, binary):
    stream = session.open()
    for t in range(13):
        x = samples(1, FEATURES)
        y = infer(
            http_client,
            x,
            binary=binary,
            sequence_id=sequence_id,
            sequence_start=t == 0,
            sequence_end=t == 12,
        )
        np.testing.assert_array_equal(y, session.step(x, streams=[stream]))


@pytest.mark.parametrize("binary", [True, False])
def test_many_streams(http_client, session, samples, binary):
    names = [f"many {binary} {i}" for i in range(5)]
    streams = [session.open() for _ in names]
    x = samples(5, FEATURES)
    for t in range(2):  # The second is a repeat.
        y = infer(http_client, x, names, step=[0] * 5, binary=binary)
        if t == 0:
            expected = session.step(x, streams=streams)
        np.testing.assert_array_equal(y, expected)
    x = samples(5, 4, FEATURES)
    y = infer(http_client, x, names, step=[1] * 5, binary=binary)
    np.testing.assert_array_equal(y, session.steps(x, streams=streams))
    with pytest.raises(InferenceServerException, match="expects step 5, got step 1") as refusal:
        infer(http_client, samples(5, FEATURES), names, step=[5, 5, 1, 5, 5], binary=binary)
    assert refusal.value.status() == "409"


@pytest.mark.parametrize("binary", [True, False])
def test_streams_end_without_a_step(http_client, samples, binary):
    nothing, one, names = np.zeros((0, FEATURES), np.float32), f"no step {binary}", ["p", "q"]
    infer(http_client, samples(1, FEATURES), sequence_id=one, step=0, binary=binary)
    infer(http_client, samples(2, FEATURES), names, step=[0, 0], binary=binary)
    for _ in range(2):  # The answer may be lost.
        end = {"sequence_id": one, "sequence_end": True, "step": 1, "binary": binary}
        assert infer(http_client, nothing, **end).shape == (0, OUTPUTS)
        y = infer(
            http_client,
            np.zeros((2, 0, FEATURES), np.float32),
            names,
            step=[1, 1],
            binary=binary,
            parameters={"end": True},
        )
        assert y.shape == (2, 0, OUTPUTS)
    with pytest.raises(InferenceServerException, match="is not open") as refusal:
        infer(http_client, samples(2, FEATURES), names, step=[1, 1], binary=binary)
    assert refusal.value.status() == "409"


def test_plain_json(plain, session, samples):
    x = samples(3, FEATURES)
    status, answer = plain.step("json", x)
    assert status == 200
    assert answer["parameters"] == {"next_step": 3}
    (output,) = answer["outputs"]
    assert output["shape"] == [3, OUTPUTS]
    y = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_array_equal(y, session.steps(x[None], streams=[session.open()])[0])


def test_a_refusal_says_what_is_expected(plain, samples):
    plain.step("refused", samples(FEATURES), step=0)
    status, answer = plain.step("refused", samples(FEATURES), step=3)
    assert status == 409
    assert answer["reason"] == "out_of_step"
    assert answer["expected"] == [{"stream": "refused", "step": 1}]
    assert "No stream of this request has moved" in answer["error"]


def test_new_weights_do_not_end_streams(http_client, samples):
    infer(http_client, samples(1, FEATURES), sequence_id="kept", step=0)
    http_client.load_model("small")
    infer(http_client, samples(1, FEATURES), sequence_id="kept", step=1)


def test_metrics(plain, samples):
    def value(line):
        status, text = plain.call("GET", "/metrics")
        assert status == 200
        found = re.search(rf"^{re.escape(line)} (\S+)$", text.decode(), re.MULTILINE)
        return float(found[1])

    steps = 'continual_transformers_steps_total{model="small"}'
    before = value(steps)
    plain.step("counted", samples(4, FEATURES))
    assert value(steps) == before + 4
    refused = (
        'continual_transformers_refused_requests_total{model="small",reason="invalid_argument"}'
    )
    before = value(refused)
    plain.step("counted", samples(4, FEATURES + 1))
    assert value(refused) == before + 1


def test_outputs_of_a_stream_as_they_come(server, plain, samples):
    watcher = Plain(server.http_port)
    watcher.connection.request("GET", "/v2/models/small/streams/watched%20one/outputs")
    response = watcher.connection.getresponse()
    assert response.headers["content-type"] == "text/event-stream"
    _, answer = plain.step("watched one", samples(FEATURES))
    event = response.fp.readline()
    assert event.startswith(b"data: ")
    shown = json.loads(event[6:])
    assert shown["next_step"] == 1
    np.testing.assert_allclose(shown["outputs"][0]["numbers"], answer["outputs"][0]["data"])
    watcher.connection.close()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n", 400),  # TLS without TLS
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20000 + b"\r\n\r\n", 431),
        (b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n", 413),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
def test_bad_messages_get_a_sentence(server, plain, text, status):
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=60) as connection:
        connection.sendall(text)
        answer = b""
        while more := connection.recv(65536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]
    assert plain.call("GET", "/v2/health/live")[0] == 200


def test_random_bytes_are_answered_or_dropped(server, plain):
    random = np.random.default_rng(1)
    message = (
        b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n"
        b"Inference-Header-Content-Length: 40\r\n\r\n" + b'{"inputs":[{"name":"x","shape":[1]}]}   '
    )
    for _ in range(300):
        changed = bytearray(message)
        for at in random.integers(0, len(changed), 4):
            changed[at] = random.integers(0, 256)
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=60) as connection:
            connection.sendall(changed)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert plain.call("GET", "/v2/health/ready")[0] == 200


@pytest.fixture
def guarded(start_server, model_file, tmp_path):
    """A server with a token."""
    (tmp_path / "token").write_text("a secret\n")
    return start_server(model_file, "--token-file", tmp_path / "token")


def test_the_token(guarded, samples):
    stranger = Plain(guarded.http_port)
    for path in ("/", "/metrics", "/v2/health/live", "/v2/health/ready"):
        assert stranger.call("GET", path)[0] == 200
    for path in ("/v2", "/status", "/v2/models/small", "/v2/models/small/streams"):
        status, answer = stranger.call("GET", path)
        assert (status, answer["reason"]) == (401, "unauthenticated")
    assert stranger.step("a", samples(FEATURES))[0] == 401
    assert Plain(guarded.http_port, "a secreT").step("a", samples(FEATURES))[0] == 401
    assert Plain(guarded.http_port, "a secret").step("a", samples(FEATURES))[0] == 200


def test_streams_move_to_another_server(
    guarded, start_server, model_file, tmp_path, samples, session
):
    other = start_server(model_file, "--token-file", tmp_path / "token")
    here, there = (Plain(server.http_port, "a secret") for server in (guarded, other))
    stream = session.open()
    xs = samples(10, FEATURES)
    for t in range(6):
        here.step("a b", xs[t], step=t)
        expected = session.step(xs[t : t + 1], streams=[stream])

    _, list_ = here.call("GET", "/v2/models/small/streams")
    assert [(s["name"], s["next_step"]) for s in list_["streams"]] == [("a b", 6)]
    path = list_["streams"][0]["path"]
    status, copy = here.call("GET", path)
    assert status == 200
    assert there.call("PUT", path, copy)[0] == 200
    assert here.call("DELETE", path)[0] == 200
    assert here.call("DELETE", path)[0] == 404

    # The last step again, and then the next ones.
    for t in range(5, 10):
        if t > 5:
            expected = session.step(xs[t : t + 1], streams=[stream])
        status, answer = there.step("a b", xs[t], step=t)
        assert status == 200
        got = np.array(answer["outputs"][0]["data"], np.float32)
        np.testing.assert_array_equal(got, expected[0])

    status, answer = there.call("PUT", path, copy[:-1] + b"!")
    assert status == 400
    assert "damaged" in answer["error"]


def test_without_a_token_there_is_no_operator(plain):
    status, answer = plain.call("GET", "/v2/models/small/streams")
    assert status == 403
    assert "--token-file" in answer["error"]


def make_certificate(folder, name, issuer=None):
    """Make name.key and name.pem in a folder; signed by itself, or by another one there."""
    files = {"keyout": folder / f"{name}.key", "out": folder / f"{name}.pem"}
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    if issuer:
        command += ["-CA", folder / f"{issuer}.pem", "-CAkey", folder / f"{issuer}.key"]
    for option, path in files.items():
        command += [f"-{option}", path]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return files["out"], files["keyout"]


def test_tls_and_certificates_of_clients(start_server, model_file, tmp_path, samples):
    ca, _ = make_certificate(tmp_path, "ca")
    certificate, key = make_certificate(tmp_path, "server", issuer="ca")
    arguments = ["--tls-certificate", certificate, "--tls-key", key]
    server = start_server(model_file, *arguments)
    context = ssl.create_default_context(cafile=ca)
    assert Plain(server.http_port, context=context).step("a", samples(FEATURES))[0] == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        Plain(server.http_port, context=ssl.create_default_context()).call("GET", "/v2")
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        Plain(server.http_port).call("GET", "/v2")

    server = start_server(model_file, *arguments, "--tls-client-ca", ca)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        Plain(server.http_port, context=context).call("GET", "/v2")
    context.load_cert_chain(*make_certificate(tmp_path, "client", issuer="ca"))
    assert Plain(server.http_port, context=context).call("GET", "/v2")[0] == 200


@pytest.mark.parametrize("empty", ["", "\n"], ids=["empty", "a line's end"])
def test_guards_that_are_empty_are_refused(model_file, tmp_path, empty):
    """A server without what it was to be guarded by would be open."""
    certificate, key = make_certificate(tmp_path, "server")
    (tmp_path / "empty").write_text(empty)
    tls = ["--tls-certificate", certificate, "--tls-key", key]
    for arguments in (
        ["--tls-certificate", tmp_path / "empty", "--tls-key", tmp_path / "empty"],
        [*tls, "--tls-client-ca", tmp_path / "empty"],
        ["--token-file", tmp_path / "empty"],
        ["--operator-token-file", tmp_path / "empty"],
    ):
        assert f"the file {tmp_path / 'empty'} is empty" in said_by(model_file, *arguments)
    for option in ("--tls-client-ca", "--token-file", "--state-dir", "--journal", "--ready-file"):
        assert f"{option}: it is empty" in said_by(model_file, *tls, option, "")
    assert "it is a folder" in said_by(model_file, "--token-file", tmp_path)


@pytest.mark.parametrize(
    "option", ["--idle-timeout", "--snapshot-every", "--max-message-mb", "--drain-seconds"]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_options_that_are_no_numbers_are_refused(model_file, option, value):
    assert f"{option}: it is no number" in said_by(model_file, f"{option}={value}")


def said_by(*arguments):
    """Return what the server says that refuses its arguments."""
    command = [program.PATH, "--grpc-port", "0", "--http-port", "0", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(start_server, model_file, samples, host):
    server = start_server(model_file, "--host", host)
    plain = http.client.HTTPConnection("::1", server.http_port)
    plain.request("GET", "/v2/health/ready")
    assert plain.getresponse().status == 200
    with ct.serving.Client(f"[::1]:{server.grpc_port}") as client:
        assert client.open("a").step(samples(FEATURES)).shape == (OUTPUTS,)


def test_other_ways_to_frame_a_request_are_refused(server):
    """A proxy in front may read them otherwise, and see other requests in the same bytes."""
    for header, status in (
        ("Transfer-Encoding: xchunked", 501),
        ("Transfer-Encoding: gzip, chunked", 501),
        ("Host: a", 400),
    ):
        with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
            first = f"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n"
            second = "GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall((first + second).encode())
            said = connection.makefile("rb").read().decode()  # The server closes the connection.
        assert said.startswith(f"HTTP/1.1 {status} ")
        assert said.count("HTTP/1.1") == 1


def test_clients_at_once(server, model_file, samples):
    """Each thread has a stream of its own, and gets its own answers.

    They are equal within rounding: a batch of another size may round otherwise.
    """
    session = ct.Session.load(model_file)
    failures = []

    def run(k):
        xs = np.random.default_rng(k).standard_normal((40, FEATURES)).astype(np.float32)
        expected = session.steps(xs[None], streams=[session.open()])[0]
        client = Plain(server.http_port)
        for t in range(40):
            status, answer = client.step(f"thread {k}", xs[t], step=t)
            if status != 200 or not np.allclose(
                answer["outputs"][0]["data"], expected[t], rtol=1e-5, atol=1e-6
            ):
                failures.append((k, t, answer))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_sigterm_answers_what_it_has(start_server, model_file, samples):
    server = start_server(model_file)
    plain = Plain(server.http_port)
    assert plain.step("a", samples(FEATURES))[0] == 200
    assert server.stop() == 0
    with pytest.raises(ConnectionError):
        Plain(server.http_port).call("GET", "/v2")
