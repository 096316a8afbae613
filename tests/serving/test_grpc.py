"""The server over gRPC, with tritonclient and with the protocol's own messages."""

import json
import queue
import re

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from kserve import infer, tensor
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

FEATURES, OUTPUTS = 6, 3


def refused(error):
    """Return (status, sentence) of a refusal."""
    return error.value.status().removeprefix("StatusCode."), error.value.message()


def test_health_and_descriptions(client, session):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("small")
    assert client.is_model_ready("small", "1")
    assert client.get_server_metadata().name == "continual-transformers-server"
    metadata = client.get_model_metadata("small")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("x", "FP32", [-1, FEATURES])
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("y", "FP32", [-1, OUTPUTS])
    ]
    config = client.get_model_config("small").config
    assert config.HasField("sequence_batching")
    assert config.parameters["receptive_field"].string_value == str(session.receptive_field)
    (model,) = client.get_model_repository_index().models
    assert (model.name, model.state) == ("small", "READY")


@pytest.mark.parametrize("sequence_id", [7, "a stream's name", "naïve ☃", 2**62])
def test_a_sequence_equals_a_session(client, session, samples, sequence_id):
    stream = session.open()
    for t in range(13):
        x = samples(1, FEATURES)
        y = infer(client, x, sequence_id=sequence_id, sequence_start=t == 0, sequence_end=t == 12)
        np.testing.assert_array_equal(y, session.step(x, streams=[stream]))


@pytest.mark.parametrize("leading", [(), (1,), (4,), (1, 4)])
def test_the_axes_before_a_step(client, session, samples, leading):
    """None: one step. [T] or [1, T]: T steps of the stream."""
    x = samples(*leading, FEATURES)
    y = infer(client, x, sequence_id=11, sequence_start=True)
    assert y.shape == (*leading, OUTPUTS)
    expected = session.steps(x.reshape(1, -1, FEATURES), streams=[session.open()])
    np.testing.assert_array_equal(y.reshape(expected.shape), expected)


def test_an_id_that_is_a_number_or_its_digits_is_the_same_stream(client, session, samples):
    stream, xs = session.open(), samples(3, 1, FEATURES)
    ids = [31, "31", 31]
    for x, sequence_id in zip(xs, ids, strict=True):
        y = infer(client, x, sequence_id=sequence_id)
        np.testing.assert_array_equal(y, session.step(x, streams=[stream]))


@pytest.mark.parametrize("names", ["integers", "strings"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_many_streams(client, session, samples, names, steps):
    count = 33
    streams = np.arange(1000, 1000 + count)
    if names == "strings":
        streams = [f"{names} {steps} {i}" for i in streams]
    ids = session.open(count)
    for part in range(3):
        # In another order, and a part of them.
        order = np.random.default_rng(part).permutation(count)[: count - part]
        x = samples(len(order), steps, FEATURES)
        y = infer(client, x, np.asarray(streams)[order], parameters={"start": part == 0})
        np.testing.assert_allclose(y, session.steps(x, streams=ids[order]), atol=1e-6)


def test_no_streams_and_no_steps(client):
    x = np.zeros((0, FEATURES), np.float32)
    assert infer(client, x, np.zeros(0, np.int64)).shape == (0, OUTPUTS)
    assert infer(client, x, sequence_id=77).shape == (0, OUTPUTS)
    x = np.zeros((2, 0, FEATURES), np.float32)
    assert infer(client, x, [1, 2]).shape == (2, 0, OUTPUTS)


def test_a_repeat_of_the_last_step_gives_its_answer_again(client, session, samples):
    stream = session.open()
    for t in range(8):
        x = samples(1, FEATURES)
        expected = session.step(x, streams=[stream])
        for _ in range(3):
            y = infer(client, x, sequence_id="repeats", step=t)
            np.testing.assert_array_equal(y, expected)


def test_a_gap_or_an_older_step_is_refused_with_the_step_that_is_expected(client, samples):
    for t in range(4):
        last = infer(client, samples(1, FEATURES), sequence_id="gaps", step=t)
    for step in (0, 2, 5, 2**60):
        with pytest.raises(InferenceServerException) as error:
            infer(client, samples(1, FEATURES), sequence_id="gaps", step=step)
        status, sentence = refused(error)
        assert status == "FAILED_PRECONDITION"
        assert f'"gaps" expects step 4, got step {step}' in sentence
    again = infer(client, samples(1, FEATURES), sequence_id="gaps", step=3)
    np.testing.assert_array_equal(again, last)


def test_many_streams_are_taken_whole_or_refused_whole(client, session, samples):
    streams, ids = ["whole a", "whole b", "whole c"], session.open(3)
    x = samples(3, 2, FEATURES)
    y = infer(client, x, streams, step=[0, 0, 0])
    np.testing.assert_array_equal(y, session.steps(x, streams=ids))
    with pytest.raises(InferenceServerException) as error:
        infer(client, samples(3, 2, FEATURES), streams, step=[2, 7, 1])
    status, sentence = refused(error)
    assert status == "FAILED_PRECONDITION"
    assert 'stream "whole b" expects step 2, got step 7' in sentence
    assert 'stream "whole c" expects step 2, got step 1' in sentence
    assert "whole a" not in sentence
    x = samples(3, 2, FEATURES)
    y = infer(client, x, streams, step=[2, 2, 2])
    np.testing.assert_array_equal(y, session.steps(x, streams=ids))
    # Some rows are repeats: the others move.
    moved = samples(1, 2, FEATURES)
    infer(client, moved, streams[:1], step=[4])
    expected_first = session.steps(moved, streams=ids[:1])
    x = np.concatenate([moved, samples(2, 2, FEATURES)])
    y = infer(client, x, streams, step=[4, 4, 4])
    np.testing.assert_array_equal(y[:1], expected_first)
    np.testing.assert_array_equal(y[1:], session.steps(x[1:], streams=ids[1:]))


def test_the_metadata_of_a_refusal_has_the_expected_steps(server, samples):
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = request_of(samples(2, FEATURES), typed=False)
        request.parameters.clear()
        add_input(request, "streams", "INT64", np.asarray([901, 902]))
        add_input(request, "step", "INT64", np.asarray([3, 0]))
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(request)
    metadata = dict(error.value.trailing_metadata())
    assert metadata["reason"] == "out_of_step"
    assert metadata["expected-steps-bin"] == b'{"901":0}'


@pytest.mark.parametrize("size", [0, 60, 240])
def test_a_refusal_of_many_streams_is_short_enough_for_every_client(client, samples, size):
    """gRPC's clients accept 8 KiB of metadata, in which bytes that are not ASCII are escaped."""
    streams = [f"{i}{'é' * (size // 2)}" for i in range(1000, 2000)]
    with pytest.raises(InferenceServerException) as error:
        infer(client, samples(1000, FEATURES), streams, step=np.full(1000, 9))
    status, sentence = refused(error)
    assert status == "FAILED_PRECONDITION"
    assert "expects step 0, got step 9" in sentence
    assert re.search(r"and \d+ more", sentence)


def test_the_end_of_a_stream_and_a_repeat_of_it(client, session, samples):
    x = samples(3, 1, FEATURES)
    infer(client, x[0], sequence_id="ends", step=0)
    last = infer(client, x[1], sequence_id="ends", step=1, sequence_end=True)
    again = infer(client, x[1], sequence_id="ends", step=1, sequence_end=True)
    np.testing.assert_array_equal(again, last)
    with pytest.raises(InferenceServerException, match="expects step 0, got step 2"):
        infer(client, x[2], sequence_id="ends", step=2)
    y = infer(client, x[2], sequence_id="ends", step=0)
    np.testing.assert_array_equal(y, session.step(x[2], streams=[session.open()]))


@pytest.mark.parametrize("shape", [(0, FEATURES), (1, 0, FEATURES)])
@pytest.mark.parametrize("numbered", [True, False])
def test_a_stream_begins_and_ends_without_a_step(client, session, samples, shape, numbered):
    name, nothing = f"no step {shape} {numbered}", np.zeros(shape, np.float32)

    def number(step):
        return {"step": step} if numbered else {}

    infer(client, samples(1, FEATURES), sequence_id=name)
    y = infer(client, nothing, sequence_id=name, sequence_start=True, **number(0))
    assert y.shape == (*shape[:-1], OUTPUTS)
    x = samples(2, FEATURES)
    y = infer(client, x, sequence_id=name, **number(0))
    np.testing.assert_array_equal(y, session.steps(x[None], streams=[session.open()])[0])
    if numbered:
        with pytest.raises(InferenceServerException, match="expects step 2, got step 1"):
            infer(client, nothing, sequence_id=name, sequence_end=True, step=1)
    for _ in range(2):  # The answer may be lost.
        y = infer(client, nothing, sequence_id=name, sequence_end=True, **number(2))
        assert y.shape == (*shape[:-1], OUTPUTS)
    with pytest.raises(InferenceServerException, match="is not open"):
        infer(client, samples(1, FEATURES), sequence_id=name, step=2)


def test_many_streams_begin_and_end_without_a_step(client, session, samples):
    names, nothing = ["none a", "none b", "none c"], np.zeros((3, 0, FEATURES), np.float32)
    infer(client, nothing, names, step=[0, 0, 0], parameters={"start": True})
    x = samples(3, FEATURES)
    y = infer(client, x, names, step=[0, 0, 0])
    np.testing.assert_array_equal(y, session.step(x, streams=session.open(3)))
    with pytest.raises(InferenceServerException, match='"none b" expects step 1, got step 7'):
        infer(client, nothing, names, step=[1, 7, 1], parameters={"end": True})
    infer(client, samples(3, FEATURES), names, step=[1, 1, 1])  # None has ended.
    for _ in range(2):
        y = infer(client, nothing, names, step=[2, 2, 2], parameters={"end": True})
        assert y.shape == (3, 0, OUTPUTS)
    with pytest.raises(InferenceServerException, match='"none a" is not open'):
        infer(client, samples(3, FEATURES), names, step=[2, 0, 0])


def test_a_start_begins_anew_and_its_repeat_does_not(client, session, samples):
    x = samples(4, 1, FEATURES)
    for t in range(2):
        infer(client, x[t], sequence_id="anew", step=t)
    stream = session.open()
    expected = session.step(x[2], streams=[stream])
    for _ in range(2):
        y = infer(client, x[2], sequence_id="anew", step=0, sequence_start=True)
        np.testing.assert_array_equal(y, expected)
    y = infer(client, x[3], sequence_id="anew", step=1)
    np.testing.assert_array_equal(y, session.step(x[3], streams=[stream]))
    # Another input with the same number is another start.
    y = infer(client, x[0], sequence_id="anew", step=0, sequence_start=True)
    np.testing.assert_array_equal(y, session.step(x[0], streams=[session.open()]))


def add_input(request, name, datatype, array):
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())


def request_of(x, typed, sequence_id=5):
    request = messages.ModelInferRequest(model_name="small", id="an id")
    request.parameters["sequence_id"].int64_param = sequence_id
    if typed:
        tensor = request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        tensor.contents.fp32_contents.extend(x.ravel())
    else:
        add_input(request, "x", "FP32", x)
    return request


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.grpc_url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def test_typed_contents_are_answered_with_typed_contents(stub, session, samples):
    x = samples(1, FEATURES)
    expected = session.step(x, streams=[session.open()])
    typed = stub.ModelInfer(request_of(x, True, sequence_id=501))
    raw = stub.ModelInfer(request_of(x, False, sequence_id=502))
    assert typed.id == raw.id == "an id"
    assert not typed.raw_output_contents
    np.testing.assert_array_equal(typed.outputs[0].contents.fp32_contents, expected[0])
    assert raw.raw_output_contents == [expected.tobytes()]
    assert typed.parameters["next_step"].int64_param == 1


def no_sequence(request):
    del request.parameters["sequence_id"]


def id_zero(request):
    request.parameters["sequence_id"].int64_param = 0


def id_bool(request):
    request.parameters["sequence_id"].bool_param = True


def id_long(request):
    request.parameters["sequence_id"].string_param = "x" * 257


def start_text(request):
    request.parameters["sequence_start"].string_param = "yes"


def step_text(request):
    request.parameters["step"].string_param = "1"


def step_negative(request):
    request.parameters["step"].int64_param = -1


def step_twice(request):
    request.parameters["step"].int64_param = 0
    add_input(request, "step", "INT64", np.zeros(1, np.int64))


def other_model(request):
    request.model_name = "large"


def other_version(request):
    request.model_version = "2"


def input_unknown(request):
    request.inputs[0].name = "z"


def input_missing(request):
    request.ClearField("inputs")
    request.ClearField("raw_input_contents")


def input_twice(request):
    add_input(request, "x", "FP32", np.zeros((1, FEATURES), np.float32))


def datatype_other(request):
    request.inputs[0].datatype = "FP64"


def datatype_unknown(request):
    request.inputs[0].datatype = "COMPLEX\x00"


def shape_other(request):
    request.inputs[0].shape[1] = FEATURES + 1


def shape_negative(request):
    request.inputs[0].shape[0] = -1


def shape_huge(request):
    request.inputs[0].shape[:] = [2**62, 2**62, FEATURES]


def shape_deep(request):
    request.inputs[0].shape[:] = [1, 1, 1, FEATURES]


def rows_of_one_stream(request):
    request.inputs[0].shape[:] = [2, 1, FEATURES]
    request.raw_input_contents[0] *= 2


def bytes_cut(request):
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]


def bytes_more(request):
    request.raw_input_contents[0] += b"\0"


def raw_more(request):
    request.raw_input_contents.append(b"")


def raw_and_typed(request):
    request.inputs[0].contents.fp32_contents.append(1)


def typed_other(request):
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp64_contents.extend([0.0] * FEATURES)


def streams_float(request):
    no_sequence(request)
    add_input(request, "streams", "FP32", np.zeros(1, np.float32))


def streams_and_sequence(request):
    add_input(request, "streams", "INT64", np.zeros(1, np.int64))


def streams_many(request):
    no_sequence(request)
    add_input(request, "streams", "INT64", np.arange(2))


def streams_twice(request):
    no_sequence(request)
    request.inputs[0].shape[0] = 2
    request.raw_input_contents[0] *= 2
    add_input(request, "streams", "INT64", np.ones(2, np.int64))


def streams_matrix(request):
    no_sequence(request)
    add_input(request, "streams", "INT64", np.zeros((1, 1), np.int64))


def streams_cut(request):
    no_sequence(request)
    request.inputs.add(name="streams", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\xff\xff\xff\xffname")


def streams_few_texts(request):
    no_sequence(request)
    request.inputs.add(name="streams", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"")


def streams_empty_name(request):
    no_sequence(request)
    request.inputs.add(name="streams", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\0\0\0\0")


def output_unknown(request):
    request.outputs.add(name="z")


def output_twice(request):
    request.outputs.add(name="y")
    request.outputs.add(name="y")


def output_classes(request):
    request.outputs.add(name="y").parameters["classification"].int64_param = 2


def output_shared(request):
    request.outputs.add(name="y").parameters["shared_memory_region"].string_param = "r"


def input_shared(request):
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"


WRONG = {
    no_sequence: ("INVALID_ARGUMENT", "which stream"),
    id_zero: ("INVALID_ARGUMENT", "which stream"),
    id_bool: ("INVALID_ARGUMENT", "neither an integer nor a string"),
    id_long: ("INVALID_ARGUMENT", "257 bytes, expected 1 to 256"),
    start_text: ("INVALID_ARGUMENT", "sequence_start is not a bool"),
    step_text: ("INVALID_ARGUMENT", "step is not an int64"),
    step_negative: ("INVALID_ARGUMENT", "got step -1, expected 0 or more"),
    step_twice: ("INVALID_ARGUMENT", "expected one of them"),
    other_model: ("NOT_FOUND", 'no model "large": it has "small"'),
    other_version: ("NOT_FOUND", 'no version "2"'),
    input_unknown: ("INVALID_ARGUMENT", 'no input "z": its inputs are "x"'),
    input_missing: ("INVALID_ARGUMENT", 'the input "x" is missing'),
    input_twice: ("INVALID_ARGUMENT", 'the input "x" is there twice'),
    datatype_other: ("INVALID_ARGUMENT", '"FP64", expected FP32'),
    datatype_unknown: ("INVALID_ARGUMENT", '"COMPLEX?", expected FP32'),
    shape_other: ("INVALID_ARGUMENT", "has 24 bytes of data"),
    shape_negative: ("INVALID_ARGUMENT", "cannot have the shape [-1, 6]"),
    shape_huge: ("INVALID_ARGUMENT", "cannot have the shape"),
    shape_deep: ("INVALID_ARGUMENT", "at most two axes before it"),
    rows_of_one_stream: ("INVALID_ARGUMENT", "the request is about one stream"),
    bytes_cut: ("INVALID_ARGUMENT", "has 23 bytes of data, and FP32 of the shape [1, 6] has 24"),
    bytes_more: ("INVALID_ARGUMENT", "has 25 bytes"),
    raw_more: ("INVALID_ARGUMENT", "1 inputs and 2 raw_input_contents"),
    raw_and_typed: ("INVALID_ARGUMENT", "expected one of them"),
    typed_other: ("INVALID_ARGUMENT", "has 0 bytes of data"),
    streams_float: ("INVALID_ARGUMENT", "expected INT64 or BYTES"),
    streams_and_sequence: ("INVALID_ARGUMENT", "expected one of them"),
    streams_many: ("INVALID_ARGUMENT", "names 2 streams, expected [2] or [2, T]"),
    streams_twice: ("INVALID_ARGUMENT", 'the stream "1" is twice'),
    streams_matrix: ("INVALID_ARGUMENT", "expected [M]"),
    streams_cut: ("INVALID_ARGUMENT", "is cut off"),
    streams_few_texts: ("INVALID_ARGUMENT", "has 0 elements"),
    streams_empty_name: ("INVALID_ARGUMENT", "0 bytes, expected 1 to 256"),
    output_unknown: ("INVALID_ARGUMENT", 'no output "z"'),
    output_twice: ("INVALID_ARGUMENT", "wanted twice"),
    output_classes: ("UNIMPLEMENTED", "does not sort outputs into classes"),
    output_shared: ("UNIMPLEMENTED", "shared memory"),
    input_shared: ("UNIMPLEMENTED", "shared memory"),
}


@pytest.mark.parametrize("breaks", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_request_gets_a_sentence_and_moves_nothing(stub, session, samples, breaks):
    x, stream = samples(2, 1, FEATURES), session.open()
    start = request_of(x[0], False)
    start.parameters["sequence_start"].bool_param = True
    stub.ModelInfer(start)
    session.step(x[0], streams=[stream])
    wrong = request_of(x[1], False)
    breaks(wrong)
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(wrong)
    status, sentence = WRONG[breaks]
    assert error.value.code().name == status
    assert sentence in error.value.details()
    y = stub.ModelInfer(request_of(x[1], False)).raw_output_contents[0]
    assert y == session.step(x[1], streams=[stream]).tobytes()


def test_a_request_that_is_not_a_message(server):
    with grpc.insecure_channel(server.grpc_url) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for garbage in (b"\xff" * 100, b"\x0a\xff", b"\x00"):
            with pytest.raises(grpc.RpcError):
                call(garbage)
        unknown = channel.unary_unary("/inference.GRPCInferenceService/Nothing")
        with pytest.raises(grpc.RpcError) as error:
            unknown(b"")
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_streaming_inference(server, session, samples):
    """Requests of several sequences on one bidirectional call, with one that is wrong."""
    answers = queue.Queue()
    count, steps = 5, 20
    xs, ids = samples(steps, count, 1, FEATURES), session.open(count)
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for t in range(steps):
            for i in range(count):
                client.async_stream_infer(
                    "small",
                    [tensor("x", xs[t, i])],
                    request_id=f"{t} {i}",
                    sequence_id=2000 + i,
                    sequence_start=t == 0,
                    sequence_end=t == steps - 1,
                )
        client.async_stream_infer("small", [tensor("x", xs[0, 0])], request_id="wrong")
        got = [answers.get(timeout=60) for _ in range(steps * count + 1)]
        client.stop_stream()
    (error,) = [error for _, error in got if error is not None]
    assert "which stream" in str(error)
    by_id = {r.get_response().id: r.as_numpy("y") for r, error in got if error is None}
    for t in range(steps):
        for i in range(count):
            expected = session.step(xs[t, i], streams=[ids[i]])
            np.testing.assert_allclose(by_id[f"{t} {i}"], expected, atol=1e-6)


def test_requests_of_one_stream_are_taken_in_order(stub, session, samples):
    """Many are on the way on one call. They have no numbers, so a wrong order is a wrong answer."""
    count = 400
    for call in range(30):
        xs = samples(count, 1, FEATURES)
        requests = [request_of(x, False, sequence_id=2200 + call) for x in xs]
        for t, request in enumerate(requests):
            request.id = str(t)
        answers = {int(a.infer_response.id): a for a in stub.ModelStreamInfer(iter(requests))}
        stream = session.open()
        for t in range(count):
            assert not answers[t].error_message
            (y,) = answers[t].infer_response.raw_output_contents
            expected = session.step(xs[t], streams=[stream])[0]
            np.testing.assert_allclose(np.frombuffer(y, np.float32), expected, atol=1e-5)
        session.close(stream)


def test_refusals_on_a_stream_of_requests(stub, start_server, model_file, tmp_path, samples):
    """Programs learn from an answer why it is an error, and which steps are expected."""
    wrong, late = (request_of(samples(1, FEATURES), True, sequence_id=i) for i in (2100, 2101))
    no_sequence(wrong)
    wrong.id = "wrong"
    late.id = "late"
    late.parameters["step"].int64_param = 5
    answers = {a.infer_response.id: a for a in stub.ModelStreamInfer(iter([wrong, late]))}
    assert "which stream" in answers["wrong"].error_message
    parameters = answers["wrong"].infer_response.parameters
    assert {name: p.string_param for name, p in parameters.items()} == {
        "reason": "invalid_argument"
    }
    assert answers["late"].error_message
    parameters = answers["late"].infer_response.parameters
    assert parameters["reason"].string_param == "out_of_step"
    assert json.loads(parameters["expected_steps"].string_param) == {"2101": 0}

    (tmp_path / "token").write_text("secret")
    guarded = start_server(model_file, "--token-file", tmp_path / "token")
    with grpc.insecure_channel(guarded.grpc_url) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([late]))
        with pytest.raises(grpc.RpcError) as error:
            next(call)
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert ("reason", "unauthenticated") in error.value.trailing_metadata()


def test_a_deadline_that_has_passed_moves_nothing(stub, session, samples):
    """The server's clock decides: a timeout of one microsecond is over when its turn comes."""
    x, stream = samples(2, 1, FEATURES), session.open()
    start = request_of(x[0], False, sequence_id=601)
    stub.ModelInfer(start)
    session.step(x[0], streams=[stream])
    late = request_of(x[1], False, sequence_id=601)
    late.parameters["timeout"].int64_param = 1
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(late)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    y = stub.ModelInfer(request_of(x[1], False, sequence_id=601)).raw_output_contents[0]
    assert y == session.step(x[1], streams=[stream]).tobytes()


def test_statistics_count_what_was_done(start_server, model_file, samples):
    server = start_server(model_file)
    with triton.InferenceServerClient(server.grpc_url) as client:
        for _ in range(3):
            infer(client, samples(2, FEATURES), [1, 2])
        with pytest.raises(InferenceServerException):
            infer(client, samples(2, FEATURES), [1, 1])
        (stats,) = client.get_inference_statistics("small").model_stats
    assert (stats.inference_count, stats.execution_count) == (6, 3)
    assert stats.inference_stats.success.count == 3
    assert stats.inference_stats.fail.count == 1


def test_the_health_service_and_reflection(server):
    """gRPC's own, with their messages written by hand: no package for them is needed."""
    with grpc.insecure_channel(server.grpc_url) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"") == b"\x08\x01"  # status: SERVING
        service = b"inference.GRPCInferenceService"
        assert check(b"\x0a" + bytes([len(service)]) + service) == b"\x08\x01"
        info = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        (answer,) = info(iter([b"\x3a\x00"]))  # list_services
        assert service in answer


def test_steps_of_a_request_are_limited(start_server, model_file, samples):
    server = start_server(model_file, "--max-steps", 10)
    with triton.InferenceServerClient(server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="--max-steps") as error:
            infer(client, samples(11, FEATURES), sequence_id=1)
        assert refused(error)[0] == "INVALID_ARGUMENT"
        assert infer(client, samples(10, FEATURES), sequence_id=1, step=0).shape == (10, OUTPUTS)


def test_a_start_that_fails_is_no_crash(start_server, model_file, tmp_path, samples):
    """Streams without step numbers go on after it."""
    state = ("--state-dir", tmp_path / "state")
    server = start_server(model_file, *state)
    with triton.InferenceServerClient(server.grpc_url) as client:
        infer(client, samples(1, FEATURES), sequence_id="plain", sequence_start=True)
    assert server.stop() == 0
    with pytest.raises(AssertionError, match=r"missing\.safetensors"):
        start_server(model_file, tmp_path / "missing.safetensors", *state)
    server = start_server(model_file, *state)
    with triton.InferenceServerClient(server.grpc_url) as client:
        infer(client, samples(1, FEATURES), sequence_id="plain")
