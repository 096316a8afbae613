"""cc/server/inference.proto is the protocol that tritonclient speaks."""

import pytest
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2


@pytest.fixture(scope="module")
def theirs():
    files = [descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()]
    for module, file in zip((service_pb2, model_config_pb2), files, strict=True):
        module.DESCRIPTOR.CopyToProto(file)
    return files


def fields_of(messages, prefix=""):
    """Return {(message, field number): what the wire and a client see of it}."""
    found = {}
    for message in messages:
        name = f"{prefix}{message.name}"
        for field in message.field:
            found[name, field.number] = (field.name, field.type, field.label, field.type_name)
        found.update(fields_of(message.nested_type, f"{name}."))
    return found


def test_every_field_is_one_of_the_protocol(ours, theirs):
    known = fields_of([message for file in theirs for message in file.message_type])
    own = fields_of(ours.message_type)
    assert len(own) > 100
    assert {key: known.get(key) for key in own} == own


def test_requests_and_responses_have_every_field(ours, theirs):
    """A field that is left out would be dropped silently."""
    own = fields_of(ours.message_type)
    for key, field in fields_of(theirs[0].message_type).items():
        if key[0].split(".")[0] in ("ModelInferRequest", "ModelInferResponse", "InferParameter"):
            assert own[key] == field


def test_enumerators_have_their_numbers(ours, theirs):
    known = {
        value.name: value.number
        for file in theirs
        for enum in file.enum_type
        for value in enum.value
    }
    for enum in ours.enum_type:
        for value in enum.value:
            assert known[value.name] == value.number


def test_the_calls_are_those_of_the_protocol(ours, theirs):
    known = {method.name: method for file in theirs for s in file.service for method in s.method}
    (service,) = ours.service
    assert f"{ours.package}.{service.name}" == "inference.GRPCInferenceService"
    for method in service.method:
        for fact in ("input_type", "output_type", "client_streaming", "server_streaming"):
            assert getattr(method, fact) == getattr(known[method.name], fact)
    left_out = {name for name in known if name not in {m.name for m in service.method}}
    assert all("SharedMemory" in n or n in ("TraceSetting", "LogSettings") for n in left_out)
