"""A plan and its weights, and the model file made of them."""

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "continual-transformers"
FORMAT_VERSION = "1"

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "bool": "BOOL",
}  # fmt: skip
# The tensors begin at a multiple of this in the file, so that they are aligned when it is mapped.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Lowered:
    """One step of a model as a plan and its tensors, as `docs/model_file.md` defines them.

    Attributes:
        plan: The plan, a dict.
        weights: NumPy arrays by name.
    """

    plan: dict[str, Any]
    weights: dict[str, npt.NDArray[Any]]

    @classmethod
    def from_bytes(cls, data: bytes) -> "Lowered":
        """Return the contents of a model file that a session has loaded, and so checked."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        plan = json.loads(header.pop("__metadata__")["plan"])
        dtypes = {name: np.dtype(dtype) for dtype, name in _NAMES.items()}
        weights = {}
        for name, entry in header.items():
            start, end = (8 + length + place for place in entry["data_offsets"])
            dtype = dtypes[entry["dtype"]]
            weights[name] = np.frombuffer(data[start:end], dtype).reshape(entry["shape"])
        return cls(plan, weights)

    def to_bytes(self) -> bytes:
        """Return the model file: safetensors, with the plan in its metadata."""
        header: dict[str, Any] = {
            "__metadata__": {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "plan": json.dumps(self.plan, separators=(",", ":"), allow_nan=False),
            }
        }
        # Tensors with wide elements come first, so each lies at a multiple of its element's size.
        order = sorted(self.weights, key=lambda name: -self.weights[name].dtype.itemsize)
        end, data = 0, []
        for name in order:
            array = self.weights[name]
            start, end = end, end + array.nbytes
            header[name] = {
                "dtype": _NAMES[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [start, end],
            }
            little = array.dtype.newbyteorder("<") if array.dtype.kind in "fiu" else array.dtype
            data.append(np.ascontiguousarray(array, little).tobytes())
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return b"".join([len(text).to_bytes(8, "little"), text, *data])
