# The native module behind session.py, built from cc/python. Only `step`, `steps`, `release_gil` and
# the exceptions are public: users reach them through `Session` and its module. Their docstrings are
# for the docs site, which reads sources only.

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

class GpuArray(Protocol):
    """An array of another library, which a session on a GPU takes if it is there."""

    def __dlpack__(self, *, stream: int | None = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

OneArray = npt.NDArray[Any] | GpuArray
Arrays = OneArray | Sequence["Arrays"] | Mapping[str, "Arrays"]
OutArrays = OneArray | Sequence["OutArrays | None"] | Mapping[str, "OutArrays | None"]
KeyMask = npt.NDArray[np.bool_] | Sequence[bool | np.bool_ | Sequence[bool | np.bool_]]
ManyStreams = Sequence[int] | npt.NDArray[np.int64]
Streams = int | np.integer[Any] | ManyStreams

class UnknownStreamError(ValueError):
    """A stream id that was never given out, or was closed."""

class TooManyStreamsError(RuntimeError):
    """There is no room for another stream: the limit `streams=`, or memory."""

class ModelFileError(ValueError):
    """A model file that is truncated, of another kind, of a newer version, or corrupt."""

class OtherModelError(ValueError):
    """State or weights of another model, or state of another training."""

class NativeSession:
    release_gil: bool | None
    def __init__(
        self,
        model: bytes | str,
        *,
        is_path: bool,
        streams: int,
        threads: int,
        cache_dtype: str | None,
        weights_dtype: str | None,
        device: str,
    ) -> None: ...
    # Any: the result has the structure of the model's outputs, often that of one array.
    def step(
        self,
        x: Arrays,
        streams: Streams | None = None,
        *,
        out: OutArrays | None = None,
        key_mask: KeyMask | None = None,
    ) -> Any:
        """Take one step of M streams.

        Several threads may call one session. Calls that name the same stream run one after the
        other. A short step on the CPU keeps Python's global lock, and others release it; see
        `release_gil`. After an error every stream is as it was before the call.

        Args:
            x: The model's inputs without the time axis: one NumPy array `(M, ...)`, or, if the
                model has layers with strides, its block of steps, `(M, block, ...)`; several in the
                model's own structure (a list, or a dict by name; for a list of named inputs also a
                dict). `inputs` has shapes and dtypes. Dtypes must be exact; an array that is not
                C-contiguous is copied. On a GPU, arrays of numbers that are no indices may lie
                there: anything with `__dlpack__`, contiguous.
            streams: The stream of each row: a list or tuple of ids, an int64 array `(M,)`, or one
                id if M = 1. None: row i is the session's i-th default stream, which the first such
                step opens.
            out: Arrays to write the outputs to, in the structure of the returned outputs. None,
                here or inside the structure: a new NumPy array. Arrays must be C-contiguous, with
                the exact shape and dtype, and share no memory with the inputs. On a GPU they may
                lie there.
            key_mask: bool `(M,)`, an array or a list; False marks a gap of all inputs: no query
                attends to that step, now or later.

        Returns:
            The model's outputs for the newest step, or for the step `delay` steps before it:
            `(M, ...)`, in the model's own structure (a tuple becomes a list). Until a stream's
            receptive field is full (see `ready`), they are computed from the steps seen so far.

        Raises:
            TypeError: If an argument has a type that is not listed above.
            ValueError: If a shape, dtype, index or mask does not fit, or a stream is named twice.
            UnknownStreamError: A ValueError, if a stream is not open.
            TooManyStreamsError: A RuntimeError, if there is no room for the default streams.
        """
    def steps(
        self,
        x: Arrays,
        streams: Streams | None = None,
        *,
        out: OutArrays | None = None,
        key_mask: KeyMask | None = None,
    ) -> Any:
        """Take T steps of M streams: the same outputs and state as T calls of `step`.

        Args:
            x: As in `step`, with the time axis: `(M, T, ...)`. If the model has layers with
                strides, T is a multiple of its `block`; or it is `(M, T / block, block, ...)`.
            streams: As in `step`.
            out: As in `step`, `(M, T / block, ...)`.
            key_mask: bool `(M, T / block)`, as in `step`.

        Returns:
            The model's outputs for each of the steps, `(M, T / block, ...)`.

        Raises:
            TypeError, ValueError, UnknownStreamError, TooManyStreamsError: As in `step`.
        """
    def _open(self, count: int | None) -> int | npt.NDArray[np.int64]: ...
    def _close(self, streams: Streams | None) -> None: ...
    def _position(self, streams: Streams | None) -> int | npt.NDArray[np.int64]: ...
    def _ready(self, streams: Streams | None) -> bool | npt.NDArray[np.bool_]: ...
    def _clean_state(self, streams: Streams | None) -> None: ...
    def _get_state(self, streams: Streams | None) -> list[bytes]: ...
    def _set_state(
        self, states: Sequence[bytes], streams: Streams | None, other_weights: bool
    ) -> None: ...
    def _make_state(self, block: bytes, position: int) -> bytes: ...
    def _state_entries(self) -> list[tuple[int, str, str, tuple[int, ...], int, int]]: ...
    def _model_bytes(self) -> bytes: ...
    def _save(self, path: str) -> None: ...
    def _memory(self) -> dict[str, int]: ...
    def _profile(self, streams: int, repeat: int) -> list[tuple[str, str, float]]: ...
    def _load_weights_bytes(self, model: bytes) -> None: ...
    def _load_weights_path(self, path: str) -> None: ...
    @property
    def _plan_json(self) -> str: ...
    @property
    def _name(self) -> str: ...
    @property
    def _inputs(self) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]: ...
    @property
    def _outputs(self) -> list[tuple[str, tuple[int, ...], np.dtype[Any]]]: ...
    @property
    def _receptive_field(self) -> int: ...
    @property
    def _delay(self) -> int: ...
    @property
    def _block(self) -> int: ...
    @property
    def _goes_on(self) -> bool: ...
    @property
    def _open_streams(self) -> int: ...
    @property
    def _state_bytes(self) -> int: ...
    @property
    def _cache_dtype(self) -> str: ...
    @property
    def _weights_dtype(self) -> str: ...
    @property
    def _device(self) -> str: ...
    @property
    def _limit(self) -> int: ...
    @property
    def _threads(self) -> int: ...
