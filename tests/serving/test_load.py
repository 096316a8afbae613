"""The load test: what it measures, and that it finds wrong answers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from guards import guards

import continual_transformers_tf as ct
from continual_transformers_tf import cli
from continual_transformers_tf.demo import watch
from continual_transformers_tf.demo.model import trained_model
from continual_transformers_tf.serving import load, program

ROOT = Path(__file__).parent.parent.parent
WINDOW, FEATURES, OUTPUTS = 5, 6, 3


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.main, ["load", "--json", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout), result.stderr


def metric(server, name):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as page:
        text = page.read().decode()
    found = re.findall(rf"^continual_transformers_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert found, name
    return sum(map(float, found))


@pytest.fixture
def other_weights(tmp_path, model_file):
    """A model file of the same model with other weights."""
    keras.utils.set_random_seed(8)
    inputs = keras.Input((WINDOW, FEATURES), name="x")
    hidden = ct.CoSiMultiHeadAttention(WINDOW, 2, 3)(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(OUTPUTS, name="y")(hidden))
    ct.Session.load(model_file).load_weights(model)  # It has the same architecture.
    ct.Session(model).save(tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_figures(start_server, model_file, tmp_path):
    """Nothing on the server is left from it, and its streams are the server's."""
    server = start_server(model_file, "--strict-start")
    picture = tmp_path / "new" / "load.png"
    figures, _ = run(
        *("--url", server.grpc_url, "--model-file", model_file, "--picture", picture),
        *("--streams", 20, "--rows", 7, "--rate", 10, "--seconds", 1),
    )
    # A group's last step, which ends its streams, is checked and not measured.
    assert figures["checked_steps"] == metric(server, "steps_total")
    assert 0 < figures["steps"] <= 200
    assert figures["steps"] + figures["unanswered_steps"] == 200
    assert figures["checked_steps"] >= figures["steps"] + 20
    assert figures["wrong_steps"] == figures["lost_streams"] == 0
    assert figures["largest_difference"] <= load.TOLERANCE
    assert figures["refused"] == {}
    latencies = list(figures["latency_ms"].values())
    assert latencies == sorted(latencies)
    assert latencies[0] > 0
    assert figures["cores"] > 0
    assert not figures["interrupted"]
    assert metric(server, "streams_opened_total") == 20
    assert metric(server, "streams_ended_total") == 20
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_server_with_certificates_and_a_token(start_server, model_file, certificates, tmp_path):
    server = start_server(model_file, *guards(certificates))
    arguments = [*("--url", server.grpc_url, "--model-file", model_file)]
    arguments += [*("--streams", 6, "--rows", 2, "--seconds", 0.3)]
    ca = ["--ca", certificates / "ca.pem"]
    own = ["--certificate", certificates / "client.pem", "--key", certificates / "client.key"]
    token = ["--token-file", certificates / "token"]
    figures, _ = run(*arguments, *ca, *own, *token)
    assert figures["checked_steps"] >= figures["steps"] > 0
    assert figures["wrong_steps"] == figures["lost_streams"] == 0
    (tmp_path / "wrong").write_text("another")
    (tmp_path / "empty").write_text("\n")
    for options, message in [
        ([*ca, *own], "no valid token"),
        ([*ca, *own, "--token-file", tmp_path / "wrong"], "no valid token"),
        ([*ca, *own, "--token-file", tmp_path / "empty"], "the token file .*empty is empty"),
        (["--ca", tmp_path / "wrong", *own, *token], "wrong is no PEM file|failed to connect"),
        ([*own, *token], "certificate and key need ca too"),
        ([*ca, *own[:2], *token], "needs both certificate and key, got only one"),
    ]:
        command = ["load", *map(str, [*arguments, *options])]
        said = CliRunner().invoke(cli.main, command)
        assert said.exit_code == 1
        assert re.search(message, said.output), said.output
    said = CliRunner().invoke(cli.main, ["load", *map(str, token)])
    assert said.exit_code == 2
    assert "--token-file is for a server that runs: --url is missing" in said.output


def test_as_fast_as_answers_come(server, model_file):
    figures, _ = run(
        *("--url", server.grpc_url, "--model", "small", "--model-file", model_file),
        *("--streams", 6, "--rows", 2, "--rate", 0, "--seconds", 0.5),
    )
    assert figures["requests"] * 2 == figures["steps"] > 6
    assert figures["unanswered_steps"] == figures["wrong_steps"] == 0


def test_the_table(server, model_file):
    arguments = ["--url", server.grpc_url, "--model-file", model_file, "--streams", "2"]
    result = CliRunner().invoke(cli.main, ["load", *arguments, "--seconds", "0.3"])
    assert result.exit_code == 0, result.output
    for row in ("steps a second", "latency, p99", "requests refused", "largest difference"):
        assert row in result.output


def test_a_server_of_its_own(model_file):
    figures, said = run("--model-file", model_file, "--streams", 3, "--seconds", 0.3)
    assert figures["checked_steps"] >= 3
    assert said == ""


def test_wrong_answers_are_found(server, other_weights):
    """The server has other weights than the file that answers are compared with."""
    figures, said = run(
        *("--url", server.grpc_url, "--model-file", other_weights),
        *("--streams", 4, "--rows", 2, "--seconds", 0.3),
        status=1,
    )
    assert figures["wrong_steps"] == figures["checked_steps"] > 0
    assert re.search(r"\d+ of \d+ answers are wrong. step 0 of load-\w+-0: got \[", said)


def loads(url, model_file, streams=4, rate=20.0, rows=2, seconds=1.0, on_progress=None):
    options = load.Options(streams, rate, rows, seconds)
    return load.Load(url, "small", model_file, options, on_progress)


def test_one_wrong_answer_is_found(monkeypatch, server, model_file):
    def swapped(samples, streams, step):
        right = of_step(samples, streams, step)
        return [x[::-1] for x in right] if step == 3 and streams.start == 2 else right

    of_step = load.Samples.of_step
    monkeypatch.setattr(load.Samples, "of_step", swapped)
    result = loads(server.grpc_url, model_file, rate=0, seconds=0.5).run()
    # The two streams of the other group have right answers. These two remember the wrong samples
    # for as long as their window.
    assert 0 < result.wrong <= 2 * WINDOW
    assert result.first_wrong.startswith("step 3 of load-")


def test_refused_requests_are_sent_again_and_counted(proxy, model_file):
    proxy.faults = ["busy", None, "lose answer", "busy", "lose request"]
    result = loads(proxy.url, model_file).run()
    assert result.refused == {"queue_full": 2, "unavailable": 2}
    assert result.checked > result.steps > 0
    assert result.wrong == result.lost == 0


def test_latency_counts_from_when_a_request_was_due(proxy, model_file):
    """One late answer makes the following requests late too."""
    proxy.faults = [None, None, 1.0]
    result = loads(proxy.url, model_file, streams=2, rate=20, seconds=3).run()
    # The third step is answered after a second. By then 20 more were due, half of them for longer
    # than half a second.
    assert (result.latency > 0.5).sum() >= 10


def test_a_server_that_dies(monkeypatch, start_server, model_file):
    monkeypatch.setattr(load, "GRACE_SECONDS", 0.5)
    server = start_server(model_file)

    def kill(seconds, steps, latency):
        if steps and server.process.poll() is None:
            server.kill()

    result = loads(server.grpc_url, model_file, on_progress=kill).run()
    assert result.lost == 4
    assert result.refused["unavailable"] > 0
    assert result.checked >= result.steps > 0
    assert result.unanswered > 0
    assert result.wrong == 0


def test_streams_that_cannot_go_on_fail_the_command(start_server, model_file):
    server = start_server(model_file, "--max-streams", 3)
    figures, said = run(
        *("--url", server.grpc_url, "--model-file", model_file),
        *("--streams", 4, "--rows", 2, "--seconds", 0.3),
        status=1,
    )
    assert figures["lost_streams"] == 2
    assert figures["refused"] == {"too_many_streams": 1}
    assert "2 streams could not go on" in said


def test_one_of_several_servers_is_refused(start_sharded, model_file):
    figures, said = run(
        *("--url", start_sharded().grpc_url, "--model-file", model_file),
        *("--streams", 4, "--rows", 2, "--seconds", 0.3),
        status=1,
    )
    assert figures["refused"] == {"wrong_server": 2}
    assert "is one of several servers that share the streams" in said


def test_only_so_many_answers_are_kept(monkeypatch, server, model_file):
    monkeypatch.setattr(load, "MOST_KEPT_STEPS", 40)
    result = loads(server.grpc_url, model_file, streams=16, rate=0).run()
    assert result.steps > 80
    assert 10 < result.checked <= 42
    assert result.wrong == 0


def test_ctrl_c_ends_it_with_what_there_is(start_server, model_file):
    server = start_server(model_file)
    command = [sys.executable, "-m", "continual_transformers_tf.cli", "load", "--json"]
    options = ["--url", server.grpc_url, "--model-file", model_file, "--seconds", "600"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        while metric(server, "requests_total") < 20:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        figures = json.loads(process.communicate(timeout=60)[0])
    finally:
        process.kill()
    assert process.returncode == 0
    assert figures["interrupted"]
    assert figures["checked_steps"] == metric(server, "steps_total")
    assert figures["wrong_steps"] == figures["lost_streams"] == 0
    assert metric(server, "streams_ended_total") == 1000


def test_mistakes_are_said(monkeypatch, tmp_path, model_file):
    monkeypatch.setattr(load, "CONNECT_SECONDS", 0.3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(OSError, match=f"no server answers at {url}"):
            loads(url, model_file).run()
    inputs = keras.Input((WINDOW,), name="x", dtype="int32")
    x = keras.layers.Embedding(4, 6)(inputs)
    outputs = ct.CoSiMultiHeadAttention(WINDOW, 2, 3)(x, x)
    ct.Session(keras.Model(inputs, outputs)).save(tmp_path / "tokens.safetensors")
    np.save(tmp_path / "x.npy", np.zeros((3, 100, 7), "float32"))
    arguments = ["load", "--model-file", str(tmp_path / "tokens.safetensors")]
    for more, what in (
        ([], "the input x takes integers, and it is not known which: give recordings with --data"),
        (["--data", str(tmp_path / "x.npy")], "Expected recordings of x"),
    ):
        said = CliRunner().invoke(cli.main, [*arguments, *more])
        assert said.exit_code == 1
        assert what in said.output


def structured(x, places):
    """Return a model of these inputs, and of several outputs."""
    y = ct.CoSiMultiHeadAttention(WINDOW, 2, 3)(x, x)
    outputs = {"z": keras.layers.Dense(2)(y), "a": [keras.layers.Dense(3)(y), y]}
    return keras.Model(places, outputs)


def list_of_inputs():
    x, tokens = keras.Input((WINDOW, 3), name="x"), keras.Input((WINDOW,), name="t", dtype="int32")
    both = keras.layers.Concatenate()([x, keras.layers.Embedding(4, 2)(tokens)])
    return structured(both, [x, tokens])


def dict_of_inputs():
    x, y = keras.Input((WINDOW, 3), name="x"), keras.Input((WINDOW, 2), name="y")
    return structured(keras.layers.Concatenate()([x, y]), {"y": y, "x": x})


def one_in_a_dict():
    x = keras.Input((WINDOW, 3), name="x")
    return structured(x, {"x": x})


@pytest.mark.sampled(3, rest="slow")
@pytest.mark.parametrize("function", [list_of_inputs, dict_of_inputs, one_in_a_dict])
def test_any_model(tmp_path, random, function):
    """Recordings are sent, or random numbers, and all outputs are checked."""
    session = ct.Session(function())
    path = tmp_path / "any.safetensors"
    session.save(path)
    arguments = "--model-file", path, "--streams", 7, "--rows", 3, "--rate", 20, "--seconds", 0.5
    arrays = {
        spec.name: random.integers(0, 4, (2, 30, *spec.shape)).astype(spec.dtype)
        for spec in session.inputs
    }
    np.savez(tmp_path / "x.npz", **arrays)
    given = ["--data", tmp_path / "x.npz"]
    for more in [given] if function is list_of_inputs else [given, []]:
        figures, _ = run(*arguments, *more)
        assert figures["checked_steps"] >= 70
        assert figures["wrong_steps"] == figures["lost_streams"] == 0
        assert 0 <= figures["largest_difference"] <= load.TOLERANCE


def test_a_local_server_ends_with_its_block(model_file, tmp_path):
    local = program.LocalServer(model_file, ["--log-level", "debug"])
    with local as server, ct.serving.Client(server.url) as client:
        assert client.model == "small"
    assert server.returncode == 0
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(OSError, match=r"the server did not start: .*empty\.safetensors"):
        program.LocalServer(tmp_path / "empty.safetensors")


def test_every_stream_sends_other_samples():
    streams = 300
    samples = load.Samples(streams, [watch.held_out_samples()])
    steps = np.stack([samples.of_step(slice(0, streams), step)[0] for step in range(50)], axis=1)
    assert steps.shape == (streams, 50, len(watch.CHANNELS))
    np.testing.assert_array_equal(steps, samples.of_steps(slice(0, streams), 0, 50)[0])
    np.testing.assert_array_equal(steps[7:9, 5:20], samples.of_steps(slice(7, 9), 5, 20)[0])
    assert len(np.unique(steps.reshape(streams, -1), axis=0)) == streams
    first = watch.load_recordings(watch.HELD_OUT)[0].samples
    np.testing.assert_array_equal(steps[0], first[:50])


def test_the_demo_s_model_file(watch_file):
    session, expected = ct.Session.load(watch_file), ct.Session(trained_model())
    x = watch.held_out_samples()[:3]
    np.testing.assert_array_equal(session.step(x), expected.step(x))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="make has not installed .venv")
def test_make_serve():
    command = ["make", "serve", "GRPC_PORT=0", "HTTP_PORT=0", "SERVE_FLAGS=--log-level info"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    try:
        for line in process.stdout:
            said += line
            if line.startswith("{") and json.loads(line)["event"] == "ready":
                os.kill(json.loads(line)["pid"], signal.SIGTERM)
        assert process.wait(60) == 0, said
    finally:
        process.kill()
    command = re.search(r"^ +\S*/continual-transformers (load .*)$", said, re.MULTILINE)[1]
    assert (ROOT / command.split()[-1]).exists()
    assert {"load", "--url", "127.0.0.1:0", "--model-file"} <= set(command.split())
