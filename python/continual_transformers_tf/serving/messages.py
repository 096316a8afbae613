"""The protocol's messages as Python classes, such as `messages.ModelInferRequest`.

They are made from `inference.binpb`, which protoc made from `cc/server/inference.proto`:
`python3 tools/server_packages.py descriptors`. They have a pool of their own, because other clients
of the protocol define messages of the same names, and a pool takes each name once.
"""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"/{PACKAGE}.GRPCInferenceService"

(_file,) = descriptor_pb2.FileDescriptorSet.FromString(
    Path(__file__).with_name("inference.binpb").read_bytes()
).file
_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file)
_classes = message_factory.GetMessageClassesForFiles([_file.name], _pool)


def __getattr__(name: str) -> Any:
    try:
        return _classes[f"{PACKAGE}.{name}"]
    except KeyError:
        raise AttributeError(f"the protocol has no message {name}") from None
