"""`Session`: a whole model's step as one native call.

Neither TensorFlow nor Keras is imported here. `Session(model)` imports them to lower a Keras model;
`Session.load` reads a model file without them.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, overload

import numpy as np

from continual_transformers_tf.native import HOW_TO_BUILD

try:
    from continual_transformers_tf import _session
    from continual_transformers_tf._session import (
        ModelFileError,
        OtherModelError,
        TooManyStreamsError,
        UnknownStreamError,
    )
except ImportError as error:
    raise ImportError(
        "continual_transformers_tf.Session needs the package's native libraries, which could not "
        f"be loaded: {error}. Install a wheel of continual-transformers-tf that fits this Python "
        f"and machine. {HOW_TO_BUILD}"
    ) from error

if TYPE_CHECKING:
    import keras
    import numpy.typing as npt
    import tensorflow as tf

    from continual_transformers_tf._session import ManyStreams, Streams

__all__ = [
    "ArraySpec",
    "Memory",
    "ModelFileError",
    "OtherModelError",
    "Profile",
    "ProfileRow",
    "Session",
    "TooManyStreamsError",
    "UnknownStreamError",
]

CACHE_DTYPES = ("float32", "float64", "bfloat16", "float16", "int8")
WEIGHTS_DTYPES = ("float32", "float64", "bfloat16", "int8")
DEVICE = re.compile(r"cpu|cuda:\d{1,4}")
MOST_THREADS = 1024


class _Options(TypedDict):
    """The options of the native session, checked."""

    streams: int
    threads: int
    cache_dtype: str | None
    weights_dtype: str | None
    device: str


class ArraySpec(NamedTuple):
    """An input or output of a model.

    Attributes:
        name: The name in the model. An only output is "y", several in a list are "y_0", "y_1", ...
        shape: The shape for one step of one stream. `Session.step` takes `(M, *shape)`,
            `Session.steps` takes `(M, T, *shape)`.
        dtype: The NumPy dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype}"


class Memory(NamedTuple):
    """The memory that a session holds, in bytes.

    Attributes:
        weights: The weights, packed for the kernels.
        model_file: The model file: a copy of it in memory, or its mapped pages. The system reads
            mapped pages on demand and may drop them.
        streams: Room for the states of streams. The system provides its pages when a stream takes
            its first step.
        streams_overhead: Everything else that is kept for each stream: ids, positions, locks.
        arenas: The scratch memory of steps in progress.
    """

    weights: int
    model_file: int
    streams: int
    streams_overhead: int
    arenas: int

    @property
    def total(self) -> int:
        """The sum of all fields, in bytes."""
        return sum(self)

    def __str__(self) -> str:
        rows = [*self._asdict().items(), ("total", self.total)]
        return "\n".join(f"{name:<17}{count:>16,} bytes" for name, count in rows)


class ProfileRow(NamedTuple):
    """The time of one part of a step.

    Attributes:
        name: The names of the plan's nodes that this part runs, joined by " + ".
        op: The ops of these nodes, joined in the same way.
        seconds: The mean time of this part in one step, in seconds.
    """

    name: str
    op: str
    seconds: float


class Profile(tuple[ProfileRow, ...]):
    """The times of all parts of a step: a tuple of `ProfileRow`, which prints as a table.

    Attributes:
        streams: How many streams the step had.
        repeat: How many steps were taken.
    """

    streams: int
    repeat: int

    def __new__(cls, rows: Iterable[ProfileRow], streams: int, repeat: int) -> Profile:
        profile = super().__new__(cls, rows)
        profile.streams = streams
        profile.repeat = repeat
        return profile

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.streams, self.repeat

    @property
    def seconds(self) -> float:
        """The time of all parts of a step together, in seconds."""
        return sum(row.seconds for row in self)

    def __str__(self) -> str:
        total = self.seconds
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        lines = [
            f"a step of {streams}: {total * 1e6:.2f} us, the mean of {self.repeat} steps",
            f"{'us':>10} {'share':>6}  part",
        ]
        lines += [
            f"{row.seconds * 1e6:>10.2f} {row.seconds / (total or 1):>6.1%}  {row.name} ({row.op})"
            for row in self
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


class Session(_session.NativeSession):
    """A model and its streams. Native code steps them, on NumPy arrays.

    A step takes the newest input of M streams and returns the model's output for it. The numbers
    are those of `StreamingModel`, within rounding, but TensorFlow is not used. The session keeps a
    stream's past (rings of keys and values, delays, the position) in one block. The stream's id
    names this block.

    ```python
    session = ct.Session(model, streams=1000)
    a, b = session.open(2)
    y = session.step(x, streams=[a, b])  # (2, ...) -> (2, ...)
    ```

    Several threads may call any method at once. Steps of different streams run side by side, and
    calls that name the same stream run one after the other. After an error every stream is as it
    was before the call.

    A session works after `fork`, in both processes; from then on their streams are independent.
    On a GPU it works only in the process that made it.
    Pickles and copies hold the model, its weights and the options, but no streams: `get_state`
    copies those.

    Args:
        model: A functional or sequential Keras model, a `StreamingModel`, or one layer of this
            package. Its weights are copied. Or the path of a `.keras` file with such a model.
        streams: How many streams may be open at once; None: no limit.
        threads: How many threads a step of many rows may use; 1: only the caller's.
        weights_dtype: The dtype of the kernels of dense products: "float32", "bfloat16", "int8"
            with a scale for each output, or "float64"; None: what the model's layers ask for.
        cache_dtype: The dtype of the keys and values of past steps: "float32", "bfloat16",
            "float16", "int8" with a scale for each step, or "float64"; None: what the model's
            layers ask for.
        device: "cpu", or "cuda:0" for the first GPU. The states of streams, the weights and the
            steps are then on the GPU. Inputs and outputs are NumPy arrays, or arrays there.
        seq_len: The window, in steps, of every `keras.layers.MultiHeadAttention` inside. It is
            needed if the length of the model's time axis is None.

    Attributes:
        release_gil: Whether a step lets other Python threads run. True: every step. False: no step.
            None: every step on a GPU, and on the CPU only a step that takes longer than about
            0.1 ms, by an estimate. Taking Python's global lock back from a thread that computes
            takes 0.08 ms on average and up to 5 ms, too much for a shorter step. With False on a
            GPU, a step must not wait for a Python function that was put on the default stream.

    Raises:
        ValueError: If the model cannot run step by step (the message lists each layer in the way
            and the reason), or if an option does not fit.
    """

    def __init__(
        self,
        model: keras.layers.Layer | str | bytes | os.PathLike[Any],
        *,
        streams: int | None = None,
        threads: int = 1,
        weights_dtype: str | None = None,
        cache_dtype: str | None = None,
        device: str = "cpu",
        seq_len: int | None = None,
    ) -> None:
        options = _checked_options(streams, threads, weights_dtype, cache_dtype, device)
        data = _lowered(model, seq_len, options["cache_dtype"], options["weights_dtype"])
        super().__init__(data, is_path=False, **options)

    @classmethod
    def load(
        cls,
        path: str | bytes | os.PathLike[Any],
        *,
        streams: int | None = None,
        threads: int = 1,
        weights_dtype: str | None = None,
        cache_dtype: str | None = None,
        device: str = "cpu",
    ) -> Session:
        """Return a session of a model file. It needs neither TensorFlow nor Keras.

        The file is mapped into memory and must not change while the session lives. To replace it,
        write another file and rename it, as `save` does.

        Args:
            path: A model file that `save` or `continual-transformers pack` wrote.
            streams, threads, device: As in the constructor.
            weights_dtype, cache_dtype: As in the constructor; None: the file's.

        Raises:
            OSError: If the file cannot be read.
            ModelFileError: A ValueError, if it is not a model file, is damaged, or has a newer
                format version.
            ValueError: If an option does not fit.
        """
        options = _checked_options(streams, threads, weights_dtype, cache_dtype, device)
        return cls._make(_checked_path(path), True, options)

    @classmethod
    def _make(cls, model: bytes | str, is_path: bool, options: _Options) -> Session:
        """Return a session of a model file, given as its path or its bytes."""
        session = cls.__new__(cls)
        _session.NativeSession.__init__(session, model, is_path=is_path, **options)
        return session

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model file: the plan and the weights, but no streams.

        The file appears whole or not at all. If `load` made this session, its `cache_dtype` and
        `weights_dtype` are not written: the new file is the same as the one that was loaded.

        Args:
            path: The path to write to. It ends in ".safetensors" by convention.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the path ends in ".keras": what has that ending is read as a Keras model.
        """
        if os.fsdecode(path).endswith(".keras"):
            raise ValueError(
                f"the path {os.fsdecode(path)!r} has the ending of a Keras model, expected another "
                "one for a model file, for example model.safetensors"
            )
        self._save(os.fspath(path))

    def load_weights(
        self,
        model: keras.layers.Layer | str | bytes | os.PathLike[Any],
        *,
        seq_len: int | None = None,
    ) -> None:
        """Replace the weights by those of another model of the same architecture.

        Steps in progress end with the old weights, later steps use the new ones. Streams keep their
        state: the keys and values in their rings still come from the old weights.

        Args:
            model: A Keras model of the same architecture, or the path of a model file or of a
                `.keras` file.
            seq_len: As in the constructor; None: the window of this session's attention.

        Raises:
            OtherModelError: A ValueError, if the model has another architecture.
            OSError, ModelFileError: As in `load`.
        """
        if isinstance(model, (str, bytes, os.PathLike)) and not _is_keras_file(model):
            self._load_weights_path(_checked_path(model))
            return
        plan = json.loads(self._plan_json)
        if seq_len is None:
            windows = {node["attributes"].get("window") for node in plan["nodes"]} - {None}
            seq_len = windows.pop() if len(windows) == 1 else None
        data = _lowered(model, seq_len, plan["cache_dtype"], plan["weights_dtype"])
        self._load_weights_bytes(data)

    @overload
    def open(self) -> int: ...
    @overload
    def open(self, count: int) -> npt.NDArray[np.int64]: ...
    def open(self, count: int | None = None) -> int | npt.NDArray[np.int64]:
        """Open new streams, with empty states.

        Args:
            count: How many streams; None: one.

        Returns:
            With None the stream's id, an int; otherwise ids, an int64 array `(count,)`. An id is
            never used twice.

        Raises:
            TooManyStreamsError: A RuntimeError, if there is no room for all of them. Then none is
                opened.
        """
        return self._open(count)

    def close(self, streams: Streams | None = None) -> None:
        """Forget streams and free their room. Their ids are refused from then on.

        This waits for steps in progress on these streams.

        Args:
            streams: An id, a list or tuple of ids, or an int64 array `(M,)`; None: the default
                streams.

        Raises:
            ValueError: If a stream is named twice; `UnknownStreamError`, a ValueError, if one is
                not open. Then none is closed.
        """
        self._close(streams)

    @overload
    def ready(self, streams: int | np.integer[Any]) -> bool: ...
    @overload
    def ready(self, streams: ManyStreams | None = None) -> npt.NDArray[np.bool_]: ...
    def ready(self, streams: Streams | None = None) -> bool | npt.NDArray[np.bool_]:
        """Return which streams have taken at least `receptive_field` steps.

        Args:
            streams: An id, a list or tuple of ids, or an int64 array `(M,)`; None: the default
                streams.

        Returns:
            A bool for an id, otherwise a bool array `(M,)`.

        Raises:
            UnknownStreamError: A ValueError, if a stream is not open.
        """
        return self._ready(streams)

    @overload
    def position(self, streams: int | np.integer[Any]) -> int: ...
    @overload
    def position(self, streams: ManyStreams | None = None) -> npt.NDArray[np.int64]: ...
    def position(self, streams: Streams | None = None) -> int | npt.NDArray[np.int64]:
        """Return how many steps streams have taken.

        This does not wait: a step in progress is not counted.

        Args:
            streams: As in `ready`.

        Returns:
            An int for an id, otherwise an int64 array `(M,)`.

        Raises:
            UnknownStreamError: A ValueError, if a stream is not open.
        """
        return self._position(streams)

    def clean_state(self, streams: Streams | None = None) -> None:
        """Forget what streams have seen. They stay open, with the same ids.

        Args:
            streams: As in `ready`, but None means every open stream.

        Raises:
            ValueError: As in `close`. Then no stream is changed.
        """
        self._clean_state(streams)

    def get_state(self, streams: Streams | None = None) -> list[bytes]:
        """Return copies of streams' states.

        A copy says which model and which weights it belongs to. Its format is the same on every
        machine.

        Args:
            streams: As in `ready`.

        Returns:
            A list of bytes, one for each stream (also for a single id).

        Raises:
            UnknownStreamError: A ValueError, if a stream is not open.
        """
        return self._get_state(streams)

    def set_state(
        self,
        states: Sequence[Any] | Mapping[str, Any] | npt.NDArray[Any] | tf.Tensor,
        streams: Streams | None = None,
        *,
        other_weights: bool = False,
    ) -> None:
        """Put copies of states into streams, which continue from there.

        Args:
            states: The result of `get_state`, from this or another session of the same model with
                the same `cache_dtype`, from its SavedModel (a string tensor or array), or the
                result of the Keras model's `get_state`.
            streams: As in `ready`, as many as there are states.
            other_weights: Also accept copies from the same model with other weights.

        Raises:
            OtherModelError: A ValueError, if a copy is of another model, or of other weights.
            ValueError: If there are too few or too many states, or one is not a whole copy of a
                stream; also as in `close`. Then no stream is changed. There is no checksum: keep
                copies where they are not changed.
        """
        copies: Any = states
        if isinstance(states, (bytes, bytearray, memoryview)):
            copies = [states]
        elif hasattr(states, "numpy") or isinstance(states, np.ndarray):
            # A SavedModel gives its copies as a string tensor.
            copies = np.asarray(states).tolist()
        elif not _is_sequence_of_bytes(states):
            copies = self._states_from_keras(states)
        self._set_state(copies, streams, other_weights)

    def _states_from_keras(self, state: Any) -> list[bytes]:
        from continual_transformers_tf.models.keras_state import blocks_from_keras_state

        blocks, positions = blocks_from_keras_state(
            json.loads(self._plan_json), self._state_entries(), state
        )
        return [self._make_state(block, p) for block, p in zip(blocks, positions, strict=True)]

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def inputs(self) -> tuple[ArraySpec, ...]:
        """Names, shapes and dtypes of the model's inputs, in Keras' order."""
        return tuple(ArraySpec(*spec) for spec in self._inputs)

    @property
    def outputs(self) -> tuple[ArraySpec, ...]:
        """Names, shapes and dtypes of the model's outputs, in Keras' order."""
        return tuple(ArraySpec(*spec) for spec in self._outputs)

    @property
    def receptive_field(self) -> int:
        """How many steps an output depends on."""
        return self._receptive_field

    @property
    def delay(self) -> int:
        """How many steps later than its input an output comes."""
        return self._delay

    @property
    def block(self) -> int:
        """How many steps of its inputs a step takes at once: the product of the model's strides."""
        return self._block

    @property
    def goes_on(self) -> bool:
        """Whether outputs depend on all earlier steps of a stream, through a recurrent layer.

        `receptive_field` is then that of the other layers.
        """
        return self._goes_on

    @property
    def open_streams(self) -> int:
        """How many streams are open."""
        return self._open_streams

    @property
    def streams(self) -> int | None:
        """How many streams may be open at once; None: no limit."""
        return self._limit or None

    @property
    def threads(self) -> int:
        """How many threads a step of many rows may use."""
        return self._threads

    @property
    def weights_dtype(self) -> str:
        """The dtype of the kernels of dense products in memory."""
        return self._weights_dtype

    @property
    def cache_dtype(self) -> str:
        """The dtype of the keys and values of past steps in memory."""
        return self._cache_dtype

    @property
    def device(self) -> str:
        """Where steps run: "cpu", "cuda:0" and so on."""
        return self._device

    @property
    def state_bytes(self) -> int:
        """The size of one copy that `get_state` gives, in bytes."""
        return self._state_bytes

    def memory(self) -> Memory:
        """Return how much memory the session holds, in bytes."""
        return Memory(**self._memory())

    def profile(self, streams: int = 1, repeat: int = 100) -> Profile:
        """Measure the time of each part of a step.

        It opens streams for this measurement and steps them on zeros, with full windows. Other
        calls may run meanwhile, and disturb the measurement.

        Args:
            streams: How many streams each step has.
            repeat: How many steps to take.

        Returns:
            A `Profile`, which prints as a table: a row for each part, with its mean time.
        """
        streams = _whole("streams", streams, 1)
        repeat = _whole("repeat", repeat, 1)
        rows = self._profile(streams, repeat)
        return Profile(
            (ProfileRow(name, op, seconds / repeat) for name, op, seconds in rows), streams, repeat
        )

    def __reduce__(self) -> tuple[Any, ...]:
        options: _Options = {
            "streams": self._limit,
            "threads": self._threads,
            "cache_dtype": self._cache_dtype,
            "weights_dtype": self._weights_dtype,
            "device": self._device,
        }
        arguments = (type(self), self._model_bytes(), options, self.release_gil)
        return _unpickle, arguments, self.__dict__ or None  # A subclass may have attributes.

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        outputs = ", ".join(map(str, self.outputs))
        limit = f" of {self.streams}" if self.streams else ""
        return (
            f"<Session {self.name!r}: {inputs} -> {outputs}; receptive field "
            f"{self.receptive_field}, delay {self.delay}; {self.open_streams}{limit} streams open, "
            f"caches {self.cache_dtype}, weights {self.weights_dtype}, threads {self.threads}"
            f"{'' if self.device == 'cpu' else f', on {self.device}'}>"
        )


def _unpickle(
    cls: type[Session], data: bytes, options: _Options, release_gil: bool | None
) -> Session:
    # Pickles of versions without sessions on a GPU have no device.
    session = cls._make(data, False, {"device": "cpu", **options})
    session.release_gil = release_gil
    return session


def _is_sequence_of_bytes(states: Any) -> bool:
    return isinstance(states, (list, tuple)) and all(
        isinstance(state, (bytes, bytearray, memoryview)) for state in states
    )


def _is_keras_file(path: str | bytes | os.PathLike[Any]) -> bool:
    return os.fsdecode(path).endswith(".keras")


def _lowered(
    model: keras.layers.Layer | str | bytes | os.PathLike[Any],
    seq_len: int | None,
    cache_dtype: str | None,
    weights_dtype: str | None,
) -> bytes:
    """Return the model file of a Keras model, as bytes."""
    if isinstance(model, (str, bytes, os.PathLike)):
        if not _is_keras_file(model):
            raise TypeError(
                "Expected a Keras model, or the path of a .keras file, but got "
                f"{model!r}. Session.load({model!r}) reads a model file"
            )
        from continual_transformers_tf.models.packing import load_model

        model = load_model(_checked_path(model))
    from continual_transformers_tf.models.lowering import lower

    return lower(model, seq_len, cache_dtype, weights_dtype).to_bytes()


def _whole(name: str, number: Any, least: int, most: int = 2**31 - 1) -> int:
    try:
        whole = number.__index__()
    except AttributeError:
        raise TypeError(f"Expected {name} to be an int, but got {number!r}") from None
    if isinstance(number, bool) or not least <= whole <= most:
        raise ValueError(
            f"Expected {name} to be an int of {least} or more, at most {most}, but got {number!r}"
        )
    return whole


def _dtype_name(name: str, dtype: Any, known: tuple[str, ...]) -> str | None:
    if dtype is None:
        return None
    text = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    if text is None and isinstance(dtype, type):
        text = dtype.__name__
    if text not in known:
        raise ValueError(f"Expected {name} to be None or one of {known}, but got {dtype!r}")
    return text


def _checked_options(
    streams: int | None,
    threads: int,
    weights_dtype: str | None,
    cache_dtype: str | None,
    device: str,
) -> _Options:
    """Check the options and return them as the native session takes them."""
    if not isinstance(device, str) or not DEVICE.fullmatch(device):
        raise ValueError(
            f"Expected device to be 'cpu', or 'cuda:0' for the first GPU, but got {device!r}"
        )
    return {
        "streams": 0 if streams is None else _whole("streams", streams, 1),
        "threads": _whole("threads", threads, 1, MOST_THREADS),
        "cache_dtype": _dtype_name("cache_dtype", cache_dtype, CACHE_DTYPES),
        "weights_dtype": _dtype_name("weights_dtype", weights_dtype, WEIGHTS_DTYPES),
        "device": device,
    }


def _checked_path(path: str | bytes | os.PathLike[Any]) -> str:
    path = os.fsdecode(path)
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "There is no such model file", path)
    return path
