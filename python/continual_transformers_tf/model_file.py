"""The contents of a model file (docs/model_file.md), read without TensorFlow or the weights."""

import collections
import ctypes
import dataclasses
import json
import math
import os
from typing import Any

from continual_transformers_tf import native

FORMAT = "continual-transformers"
FORMAT_VERSION = "1"

# A safetensors file begins with the length of its header: how many bytes that number has, and the
# longest header that is allowed.
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000

_DTYPES = {
    "F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16", "I32": "int32",
    "I64": "int64", "BOOL": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a model, for one step of one stream."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def size(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """The contents of a model file.

    Attributes:
        path: The file's path.
        bytes: The file's size.
        name: The model's name.
        producer: The program that wrote the file.
        compute_dtype: The dtype that a step computes in.
        cache_dtype: The dtype of the rings of keys and values.
        weights_dtype: The dtype of the kernels of dense products.
        receptive_field: How many steps an output depends on.
        goes_on: Whether it depends on all earlier steps, through a recurrent layer.
            `receptive_field` is then that of the other layers.
        delay: How many steps lie between an input and its output.
        inputs, outputs: The inputs and outputs of a step, in the model's order.
        nodes: How many nodes each op has, the most frequent first.
        weights: The tensors that nodes use.
    """

    path: str
    bytes: int
    name: str
    producer: str
    compute_dtype: str
    cache_dtype: str
    weights_dtype: str
    receptive_field: int
    goes_on: bool
    delay: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: dict[str, int]
    weights: tuple[StoredTensor, ...]

    @property
    def parameters(self) -> int:
        """How many elements all weights have together."""
        return sum(tensor.size for tensor in self.weights)

    @property
    def weights_bytes(self) -> dict[str, int]:
        """How many bytes of weights each dtype has, the largest count first."""
        counts: collections.Counter[str] = collections.Counter()
        for tensor in self.weights:
            counts[tensor.dtype] += tensor.bytes
        return dict(counts.most_common())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "ModelFile":
        """Read the header of a model file.

        This checks only what it reads. The library checks what a step needs when a session loads
        the file.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not a model file, is damaged, or has a newer version.
        """
        path = os.fspath(path)
        header, data_bytes = _read_header(path)
        try:
            metadata = header.get("__metadata__", {})
            _check_version(path, metadata)
            plan = json.loads(metadata["plan"])
            tensors = {
                name: _stored_tensor(path, name, entry, data_bytes)
                for name, entry in header.items()
                if name != "__metadata__"
            }
            names = [name for node in plan["nodes"] for name in node.get("weights", {}).values()]
            return cls(
                path=path,
                bytes=os.path.getsize(path),
                name=str(plan["name"]),
                producer=str(plan["producer"]),
                compute_dtype=str(plan["compute_dtype"]),
                cache_dtype=str(plan["cache_dtype"]),
                weights_dtype=str(plan["weights_dtype"]),
                receptive_field=int(plan["receptive_field"]),
                goes_on=any(
                    node["op"] == "recurrent" and node["attributes"]["goes_on"]
                    for node in plan["nodes"]
                ),
                delay=int(plan["delay"]),
                inputs=_ports(plan, "inputs"),
                outputs=_ports(plan, "outputs"),
                nodes=dict(collections.Counter(n["op"] for n in plan["nodes"]).most_common()),
                weights=tuple(tensors[name] for name in dict.fromkeys(names)),
            )
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(
                f"{path} is not a model file as docs/model_file.md describes it "
                f"({type(error).__name__}: {error}): it is damaged or was edited. Write it again"
            ) from error


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What the library reports about a model file that it has loaded.

    Attributes:
        plan_fingerprint, weights_fingerprint: The fingerprints that copies of streams contain.
        state_bytes: The size of a copy of one stream, in bytes.
    """

    plan_fingerprint: int
    weights_fingerprint: int
    state_bytes: int


def load(path: str | os.PathLike[str]) -> Loaded:
    """Load a model file with the library, as a session does, and return what the library reports.

    Raises:
        ImportError: If the library cannot be loaded.
        ValueError: If the library refuses the file.
    """
    library = native.core_library()
    try:
        for name in ("plan_fingerprint", "weights_fingerprint", "state_bytes"):
            function = getattr(library, f"ct_session_{name}")
            function.argtypes = [ctypes.c_void_p]
            function.restype = ctypes.c_int64 if name == "state_bytes" else ctypes.c_uint64
        library.ct_session_load.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
        library.ct_session_free.argtypes = [ctypes.c_void_p]
        library.ct_session_free.restype = None
        library.ct_last_error.restype = ctypes.c_char_p
    except AttributeError as error:
        raise ImportError(
            f"{native.CORE_LIBRARY_PATH} is from another version: {error}. {native.HOW_TO_BUILD}"
        ) from error
    session = ctypes.c_void_p()
    if library.ct_session_load(os.fsencode(path), None, ctypes.byref(session)) != 0:
        raise ValueError(library.ct_last_error().decode(errors="replace"))
    try:
        return Loaded(
            plan_fingerprint=library.ct_session_plan_fingerprint(session),
            weights_fingerprint=library.ct_session_weights_fingerprint(session),
            state_bytes=library.ct_session_state_bytes(session),
        )
    finally:
        library.ct_session_free(session)


def as_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is in a model file as plain data, which `json.dumps` takes.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a model file, is damaged, or has a newer version.
    """
    file = ModelFile.read(path)
    try:
        loaded = load(path)
    except ImportError:
        loaded = None
    return {
        **{k: x for k, x in dataclasses.asdict(file).items() if k != "weights"},
        "parameters": file.parameters,
        "weights_bytes": file.weights_bytes,
        "state_bytes": loaded and loaded.state_bytes,
        # In hexadecimal, because not every reader of JSON has integers of 64 bits.
        "plan_fingerprint": loaded and f"{loaded.plan_fingerprint:016x}",
        "weights_fingerprint": loaded and f"{loaded.weights_fingerprint:016x}",
    }


def describe(path: str | os.PathLike[str]) -> str:
    """Return the lines that `continual-transformers info MODEL` prints about a model file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a model file, is damaged, or has a newer version.
    """
    file = ModelFile.read(path)
    count = sum(file.nodes.values())
    rows = [
        ("model", file.name),
        ("written by", file.producer),
        *(("input" if i == 0 else "", str(port)) for i, port in enumerate(file.inputs)),
        *(("output" if i == 0 else "", str(port)) for i, port in enumerate(file.outputs)),
        ("receptive field", described_field(file.receptive_field, file.goes_on)),
        ("delay", _counted(file.delay, "step")),
        (
            "dtypes",
            f"computes in {file.compute_dtype}, keeps keys and values in {file.cache_dtype}, "
            f"kernels in {file.weights_dtype}",
        ),
        ("nodes", f"{count:,}: " + ", ".join(f"{n:,} {op}" for op, n in file.nodes.items())),
        ("parameters", f"{file.parameters:,} in {_counted(len(file.weights), 'tensor')}"),
        (
            "weights",
            ", ".join(f"{n:,} bytes of {dtype}" for dtype, n in file.weights_bytes.items())
            or "none",
        ),
        ("file", f"{file.bytes:,} bytes"),
    ]
    try:
        loaded = load(path)
    except ImportError as error:
        rows.append(("fingerprints", f"not computed: {error}"))
    else:
        rows += [
            ("copy of a stream", f"{loaded.state_bytes:,} bytes"),
            ("plan", f"fingerprint {loaded.plan_fingerprint:016x}"),
            ("weights", f"fingerprint {loaded.weights_fingerprint:016x}"),
        ]
    return "\n".join(f"{name:<17}{_printable(value)}" for name, value in rows)


def described_field(steps: int, goes_on: bool | None) -> str:
    """Return a receptive field as text.

    Args:
        steps: The receptive field.
        goes_on: Whether an output depends on all earlier steps, through a recurrent layer.
    """
    return "all earlier steps" if goes_on else _counted(steps, "step")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _printable(text: str) -> str:
    """Return the text without control characters, which names in a file may contain."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    """Return (the header of a safetensors file as a dict, how many bytes of data follow)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = file.read(_LENGTH_BYTES)
        if first.startswith(b"PK\x03\x04"):
            raise ValueError(
                f"{path} is a ZIP archive, perhaps a .keras file, and not a model file. To make a "
                "model file, run `continual-transformers pack model.keras model.safetensors`"
            )
        length = int.from_bytes(first, "little")
        if len(first) < _LENGTH_BYTES or length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path} is not a model file: it is not a safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(
            f"{path} is truncated, or not a safetensors file: its header has {length} bytes, but "
            f"only {len(text)} follow"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is not a JSON object")
    return header, size - _LENGTH_BYTES - length


def _check_version(path: str, metadata: dict[str, Any]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a model file: its metadata does not have "
            f'"format": "{FORMAT}"'
        )
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {metadata['format_version']!r}, but this version reads "
            f"{FORMAT_VERSION!r}. A newer continual-transformers-tf wrote it: upgrade to read it"
        )


def _stored_tensor(path: str, name: str, entry: dict[str, Any], data_bytes: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"{path} is damaged: tensor {name!r} lies at {begin} to {end}")
    if end > data_bytes:
        raise ValueError(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, which has only "
            f"{data_bytes}"
        )
    dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
    return StoredTensor(name, tuple(int(n) for n in entry["shape"]), dtype, end - begin)


def _ports(plan: dict[str, Any], kind: str) -> tuple[Port, ...]:
    ports = []
    for port in plan[kind]:
        value = plan["values"][port["value"]]
        shape = tuple(int(n) for n in value["shape"])
        ports.append(Port(str(port["name"]), shape, str(value["dtype"])))
    return tuple(ports)
