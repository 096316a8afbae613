"""`ct.serving.Client`: its answers, and what it does when requests and answers are lost."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from guards import guards

import continual_transformers_tf as ct
from continual_transformers_tf.serving import messages

FEATURES, OUTPUTS = 6, 3


@pytest.fixture
def connect():
    """Return a function that makes clients; all of them are closed after the test."""
    made = []

    def function(url, **options):
        made.append(ct.serving.Client(url, **options))
        return made[-1]

    yield function
    for client in made:
        client.close()


@pytest.fixture
def connected(server, connect):
    return connect(server.grpc_url)


def test_a_stream_equals_a_session(connected, session, samples):
    assert connected.model == "small"
    one = session.open()
    with connected.open("equals") as stream:
        for x in samples(4, 1, FEATURES):
            expected = session.step(x, streams=[one])
            np.testing.assert_array_equal(stream.step(x[0]), expected[0])
        x = samples(1, FEATURES)
        np.testing.assert_array_equal(stream.step(x), session.step(x, streams=[one]))
        x = samples(7, FEATURES)
        np.testing.assert_array_equal(stream.steps(x), session.steps(x[None], streams=[one])[0])
        assert stream.steps(x[:0]).shape == (0, OUTPUTS)
        assert stream.next_step == 12
    assert stream.next_step == 0
    with pytest.raises(ct.serving.ServingError) as error:  # The server has no such stream now.
        connected.open("equals", next_step=12).step(samples(FEATURES))
    assert error.value.expected == {"equals": 0}


def test_a_stream_ends_with_its_last_step_and_begins_anew(connected, session, samples):
    stream = connected.open(17)
    for _ in range(2):
        x = samples(3, 1, FEATURES)
        one = session.open()
        for t in range(3):
            y = stream.step(x[t], end=t == 2)
            np.testing.assert_array_equal(y, session.step(x[t], streams=[one]))
        assert stream.next_step == 0
    stream.close()  # It is not open: nothing is sent.


def test_closing_takes_no_step(connect, proxy, samples):
    client = connect(proxy.url)
    with client.open("one step") as stream:
        stream.step(samples(FEATURES))
    step, close = map(messages.ModelInferRequest.FromString, proxy.requests)
    assert close.inputs[0].shape == [0, FEATURES]
    assert close.parameters["step"].int64_param == 1
    assert close.parameters["sequence_end"].bool_param
    assert "sequence_end" not in step.parameters
    stream.close()
    client.open("no step").close()
    assert len(proxy.requests) == 2  # There was nothing to end.


def test_an_address_is_no_url():
    with pytest.raises(ValueError, match=r'expected "host:port" .* without http://'):
        ct.serving.Client("http://127.0.0.1:8001")


def test_a_closed_stream_takes_no_steps(connected, samples):
    begun, new = connected.open("begun"), connected.open("new")
    begun.step(samples(FEATURES))
    for stream in (begun, new):
        stream.close()
        for call in (stream.step, lambda x, s=stream: s.steps(x[None])):
            with pytest.raises(ValueError, match=r"is closed: client.open\('\w+'\) begins it"):
                call(samples(FEATURES))
        stream.close()
    with connected.open("begun") as stream:
        stream.step(samples(FEATURES))


def test_a_stream_that_another_client_began_can_be_ended(connected, samples):
    connected.open("others").steps(samples(4, FEATURES))
    with pytest.raises(ct.serving.ServingError, match="expects step 4, got step 3") as error:
        connected.open("others", next_step=3).close()
    assert error.value.expected == {"others": 4}
    with connected.open("others", next_step=4):
        pass
    with pytest.raises(ct.serving.ServingError, match="is not open"):
        connected.open("others", next_step=4).step(samples(FEATURES))


def test_no_steps_begin_and_end_nothing_but_what_is_asked(connected, samples):
    stream, nothing = connected.open("none"), samples(0, FEATURES)
    stream.steps(samples(3, FEATURES))
    other = connected.open("none")
    assert other.steps(nothing).shape == other.steps(nothing, end=True).shape == (0, OUTPUTS)
    assert stream.steps(nothing).shape == (0, OUTPUTS)
    stream.step(samples(FEATURES))
    assert stream.steps(nothing, end=True).shape == (0, OUTPUTS)
    assert stream.next_step == 0
    with pytest.raises(ct.serving.ServingError, match="is not open"):
        connected.open("none", next_step=4).step(samples(FEATURES))


def test_many_streams_end_without_a_step(connected, samples):
    names = ["e1", "e2", "e3"]
    connected.steps(samples(3, 2, FEATURES), names, [0] * 3)
    with pytest.raises(ct.serving.ServingError) as error:
        connected.end(names, [2, 2, 1])
    assert error.value.expected == {"e3": 2}
    connected.end(names[:2], [2, 2])
    connected.end(names)
    connected.end(names)
    connected.end([])
    with pytest.raises(ct.serving.ServingError) as error:
        connected.step(samples(3, FEATURES), names, [2] * 3)
    assert error.value.expected == dict.fromkeys(names, 0)


def test_a_block_that_is_left_by_an_exception_leaves_the_stream_open(connected, session, samples):
    x = samples(2, FEATURES)

    def fail():
        with connected.open("left open") as stream:
            stream.step(x[0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    expected = session.steps(x[None], streams=[session.open()])[0, 1]
    y = connected.open("left open", next_step=1).step(x[1])
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("streams", [["a", "b", "c"], np.arange(50, 53)])
def test_many_streams(connected, session, samples, streams):
    ids = session.open(3)
    x = samples(3, FEATURES)
    y = connected.step(x, streams, [0, 0, 0], start=True)
    np.testing.assert_array_equal(y, session.step(x, streams=ids))
    x = samples(3, 4, FEATURES)
    np.testing.assert_array_equal(
        connected.steps(x, streams, [1, 1, 1]), session.steps(x, streams=ids)
    )
    x = samples(3, FEATURES)
    y = connected.step(x, streams, end=True)
    np.testing.assert_array_equal(y, session.step(x, streams=ids))
    with pytest.raises(ct.serving.ServingError) as error:
        connected.step(x, streams, [6, 0, 6])
    assert error.value.reason == "out_of_step"
    assert error.value.expected == {str(streams[0]): 0, str(streams[2]): 0}


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory):
    """A model of the inputs a [2] and b [3] and the outputs sum [4] and flag [4]."""
    inputs = [keras.Input((5, 2), name="a"), keras.Input((5, 3), name="b")]
    hidden = keras.layers.Concatenate()([keras.layers.Dense(2)(inputs[0]), inputs[1]])
    hidden = ct.CoSiMultiHeadAttention(5, 1, 4)(hidden, hidden)
    outputs = {"sum": keras.layers.Dense(4)(hidden), "flag": keras.layers.Dense(4)(hidden)}
    path = tmp_path_factory.mktemp("two") / "two.safetensors"
    ct.Session(keras.Model(inputs, outputs)).save(path)
    return path


def test_several_inputs_and_outputs(connect, start_server, two_by_two, samples):
    client = connect(start_server(two_by_two).grpc_url)
    session = ct.Session.load(two_by_two)
    a, b = samples(3, 2), samples(3, 3)
    ids = session.open(3)
    y = client.step([a, b], ["p", "q", "r"])
    expected = session.step([a, b], streams=ids)
    assert set(y) == {"sum", "flag"}
    for name in y:
        np.testing.assert_array_equal(y[name], expected[name])
    y = client.open("p", next_step=1).step({"b": b[0], "a": a[0]})
    expected = session.step([a[:1], b[:1]], streams=ids[:1])
    np.testing.assert_array_equal(y["sum"], expected["sum"][0])
    with pytest.raises(ValueError, match=r"got the inputs \['a'\], expected \['a', 'b'\]"):
        client.step({"a": a}, ["p", "q", "r"])
    with pytest.raises(ValueError, match="got 3 inputs, expected 2"):
        client.step([a, b, b], ["p", "q", "r"])


@pytest.mark.parametrize("shape", [(FEATURES + 1,), (2, 2, FEATURES), ()])
def test_a_shape_that_does_not_fit(connected, shape):
    expected = r"expected \(6,\) or \(1, 6\)"
    with pytest.raises(ValueError, match=expected):
        connected.open("shapes").step(np.zeros(shape, np.float32))


def test_a_dtype_that_does_not_fit(connected):
    with pytest.raises(TypeError, match="x has the dtype complex128, expected float32"):
        connected.open("dtypes").step(np.zeros(FEATURES, complex))
    assert connected.open("dtypes").step([0.5] * FEATURES).dtype == np.float32


def test_a_refusal_says_why_and_which_step_is_expected(connected, samples):
    stream = connected.open("refused")
    for x in samples(3, FEATURES):
        stream.step(x)
    ahead = connected.open("refused", next_step=7)
    with pytest.raises(ct.serving.ServingError, match="expects step 3, got step 7") as error:
        ahead.step(x)
    assert error.value.reason == "out_of_step"
    assert error.value.expected == {"refused": 3}
    assert ahead.next_step == 3
    ahead.step(x)
    with pytest.raises(ct.serving.ServingError, match="bytes, expected 1 to 256") as error:
        connected.open("x" * 300).step(x)
    assert error.value.reason == "invalid_argument"
    assert error.value.expected == {}


def test_a_refusal_of_many_streams_names_some_of_them(connected, samples):
    """All of them would be more than gRPC's clients accept."""
    names = [f"{i:03}{'x' * 70}" for i in range(100)]
    with pytest.raises(ct.serving.ServingError, match=r"; and \d+ more") as error:
        connected.step(samples(100, FEATURES), names, [5] * 100)
    assert error.value.reason == "out_of_step"
    assert f'"{names[0]}" is not open' in str(error.value)
    assert error.value.expected[names[0]] == 0
    assert set(error.value.expected.values()) == {0}


@pytest.mark.parametrize("fault", ["lose request", "lose answer", "busy", "unsaved"])
def test_numbered_steps_survive_faults(connect, proxy, session, samples, fault):
    client = connect(proxy.url)
    xs, one = samples(6, 1, FEATURES), session.open()
    stream = client.open(f"survives {fault}")
    for x in xs:
        proxy.faults = [fault, None]
        np.testing.assert_array_equal(stream.step(x), session.step(x, streams=[one]))
    assert len(proxy.requests) == 12
    proxy.faults = [fault]
    stream.close()
    streams, ids = [f"{fault} {i}" for i in range(3)], session.open(3)
    for t in range(3):
        x = samples(3, FEATURES)
        proxy.faults = [fault]
        y = client.step(x, streams, [t] * 3)
        np.testing.assert_array_equal(y, session.step(x, streams=ids))


def test_a_step_is_sent_again_when_no_answer_comes_in_time(connect, proxy, session, samples):
    client = connect(proxy.url, attempt_timeout=0.5)
    stream, one = client.open("late"), session.open()
    for x in samples(2, 1, FEATURES):
        proxy.faults = [2.0]
        np.testing.assert_array_equal(stream.step(x), session.step(x, streams=[one]))
    assert len(proxy.requests) >= 4


def test_attempts_are_bounded(connect, proxy, samples):
    client = connect(proxy.url, timeout=0.5)
    stream, x = client.open("bounded"), samples(FEATURES)
    stream.step(x)
    proxy.faults = ["lose request"] * 1000
    with pytest.raises(ct.serving.ServingError, match="the request is lost") as error:
        stream.step(x)
    assert error.value.reason == "unavailable"
    assert 2 < len(proxy.requests) < 100
    proxy.faults = []
    stream.step(x)
    assert stream.next_step == 2


@pytest.mark.parametrize("fault", ["lose request", "lose answer"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_stream_whose_last_answer_was_lost_can_be_ended(connect, proxy, samples, fault, steps):
    client = connect(proxy.url, timeout=0.3)
    stream = client.open(f"ended after {fault} {steps}")
    for x in samples(steps, FEATURES):
        stream.step(x)
    proxy.faults = [fault] * 1000
    with pytest.raises(ct.serving.ServingError, match="is lost"):
        stream.step(samples(FEATURES))
    proxy.faults = []
    stream.close()
    with pytest.raises(ct.serving.ServingError, match="is not open"):
        client.open(stream.name, next_step=9).step(samples(FEATURES))


def test_a_step_without_a_number_is_not_sent_again_unless_nothing_has_moved(
    connect, proxy, samples
):
    client = connect(proxy.url)
    x = samples(1, FEATURES)
    proxy.faults = ["busy"]
    client.step(x, ["no number"])
    assert len(proxy.requests) == 2
    proxy.faults = ["lose answer"]
    with pytest.raises(ct.serving.ServingError, match="the answer is lost"):
        client.step(x, ["no number"])
    assert len(proxy.requests) == 3
    proxy.faults = ["unsaved"]
    with pytest.raises(ct.serving.ServingError, match="could be lost"):
        client.step(x, ["no number"])
    assert len(proxy.requests) == 4


def test_a_client_of_a_server_that_forgot_everything(
    connect, proxy, start_server, model_file, session, samples
):
    """The new server knows none of the streams."""
    client = connect(proxy.url)
    xs = samples(30, FEATURES)
    kept, lost = client.open("kept", keep=20), client.open("lost", keep=5)
    expected = session.steps(xs[None], streams=[session.open()])[0]
    for stream in (kept, lost):
        for x in xs[:7]:
            stream.step(x)
        stream.steps(xs[7:20])
    proxy.target = start_server(model_file).grpc_url
    # Steps that are replayed together are computed together.
    np.testing.assert_allclose(kept.step(xs[20]), expected[20], atol=1e-6)
    np.testing.assert_allclose(kept.step(xs[21]), expected[21], atol=1e-6)
    with pytest.raises(ct.serving.ServingError) as error:
        lost.step(xs[20])
    assert error.value.reason == "out_of_step"
    assert error.value.expected == {"lost": lost.next_step} == {"lost": 0}
    for i in range(3):
        np.testing.assert_allclose(lost.step(xs[lost.next_step]), expected[i], atol=1e-6)
    proxy.target = start_server(model_file).grpc_url
    lost.close()  # There is nothing to end.
    assert lost.next_step == 0


def test_a_client_of_a_server_that_forgot_the_newest_steps(
    connect, proxy, start_server, model_file, session, samples, tmp_path
):
    """The new server has an older snapshot."""
    client = connect(proxy.url)
    xs = samples(40, FEATURES)
    expected = session.steps(xs[None], streams=[session.open()])[0]
    old = start_server(model_file, "--state-dir", tmp_path)
    proxy.target = old.grpc_url
    streams = [client.open(f"keep {keep}", keep=keep) for keep in (0, 3, 25)]
    for x in xs[:10]:
        for stream in streams:
            stream.step(x)
    assert old.stop() == 0
    # A server that is killed forgets what it has not written.
    killed = start_server(model_file, "--state-dir", tmp_path, "--snapshot-every", 10000)
    proxy.target = killed.grpc_url
    for x in xs[10:30]:
        for stream in streams:
            stream.step(x)
    killed.kill()
    proxy.target = start_server(model_file, "--state-dir", tmp_path).grpc_url
    for stream in streams[:2]:
        with pytest.raises(ct.serving.ServingError) as error:
            stream.step(xs[30])
        assert error.value.expected == {stream.name: 10}
        for t in range(10, 33):
            assert stream.next_step == t
            np.testing.assert_allclose(stream.step(xs[t]), expected[t], atol=1e-6)
    np.testing.assert_allclose(streams[2].step(xs[30]), expected[30], atol=1e-6)
    for stream in streams:
        stream.close()


def test_a_stream_whose_newest_steps_are_lost_is_ended_where_it_is(
    connect, proxy, start_server, model_file, samples, tmp_path
):
    client = connect(proxy.url)
    first = start_server(model_file, "--state-dir", tmp_path)
    proxy.target = first.grpc_url
    streams = [client.open("behind"), client.open("behind, kept", keep=9)]
    for stream in streams:
        stream.steps(samples(5, FEATURES))
    assert first.stop() == 0
    killed = start_server(model_file, "--state-dir", tmp_path, "--snapshot-every", 10000)
    proxy.target = killed.grpc_url
    for stream in streams:
        stream.steps(samples(2, FEATURES))
    killed.kill()
    proxy.target = start_server(model_file, "--state-dir", tmp_path).grpc_url
    for stream in streams:
        stream.close()
        with pytest.raises(ct.serving.ServingError, match="is not open"):
            client.open(stream.name, next_step=5).step(samples(FEATURES))


def test_which_model(connect, start_server, model_file, two_by_two, samples):
    server = start_server(model_file, f"other={model_file}")
    with pytest.raises(ValueError, match="has the models other, small: name one"):
        connect(server.grpc_url).open("a").step(samples(FEATURES))
    connect(server.grpc_url, model="other").open("a").step(samples(FEATURES))
    with pytest.raises(ct.serving.ServingError) as error:
        connect(server.grpc_url, model="none").open("a").step(samples(FEATURES))
    assert error.value.reason == "not_found"


def test_certificates_and_a_token(connect, start_server, model_file, certificates, samples):
    server = start_server(model_file, *guards(certificates))
    files = {"ca": certificates / "ca.pem"}
    own = {"certificate": certificates / "client.pem", "key": certificates / "client.key"}
    good = connect(server.grpc_url, token="a secret", **files, **own)
    assert good.open("a").step(samples(FEATURES)).shape == (OUTPUTS,)
    of_a_file = connect(server.grpc_url, token="a secret\n", **files, **own)
    assert of_a_file.open("b").step(samples(FEATURES)).shape == (OUTPUTS,)
    for options, reason in [
        ({"token": "another", **files, **own}, "unauthenticated"),
        ({**files, **own}, "unauthenticated"),
        ({"token": "a secret", **files}, "unavailable"),
        ({"token": "a secret"}, "unavailable"),
    ]:
        with pytest.raises(ct.serving.ServingError) as error:
            connect(server.grpc_url, timeout=1, **options).open("a").step(samples(FEATURES))
        assert error.value.reason == reason
    with pytest.raises(ValueError, match="got only one"):
        ct.serving.Client(server.grpc_url, certificate=certificates / "client.pem")
    with pytest.raises(ValueError, match="need ca too"):
        ct.serving.Client(server.grpc_url, **own)
    with pytest.raises(ValueError, match="a token is one line of printable ASCII"):
        ct.serving.Client(server.grpc_url, token="a\nsecret")


def test_the_messages_are_those_of_the_server(ours):
    """`python3 tools/server_packages.py descriptors` was called after the last change."""
    file = descriptor_pb2.FileDescriptorProto()
    messages.ModelInferRequest.DESCRIPTOR.file.CopyToProto(file)
    assert file.SerializeToString(deterministic=True) == ours.SerializeToString(deterministic=True)


IMPORTS = {
    "ours": "from continual_transformers_tf.serving import messages as a",
    "theirs": "from tritonclient.grpc import service_pb2 as b",
}


@pytest.mark.parametrize("order", [("ours", "theirs"), ("theirs", "ours")])
def test_the_messages_do_not_clash_with_those_of_another_client(order):
    program = (
        "\n".join(IMPORTS[name] for name in order)
        + """
request = a.ModelInferRequest(model_name="m")
request.parameters["step"].int64_param = 7
print(b.ModelInferRequest.FromString(request.SerializeToString()).parameters["step"].int64_param)
"""
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "7\n", run.stderr


def test_grpc_is_imported_when_the_client_is_used():
    program = """
import sys
import continual_transformers_tf as ct
names = dir(ct.serving)
print("grpc" in sys.modules, "numpy" in sys.modules, "Client" in names)
sys.modules["grpc"] = None
try:
    ct.serving.Client
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    first, second = run.stdout.splitlines()
    assert first == "False False True"
    assert "ct.serving.Client needs grpc, which is not installed" in second
    assert "pip install 'continual-transformers-tf[client]'" in second
