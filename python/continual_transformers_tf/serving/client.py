"""`Client`: streams on a server, over gRPC, from NumPy arrays to NumPy arrays."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
import numpy.typing as npt

from continual_transformers_tf.serving import messages

Array = npt.NDArray[Any]
Arrays = npt.ArrayLike | Sequence[npt.ArrayLike] | Mapping[str, npt.ArrayLike]
Outputs = Array | dict[str, Array]
PathLike = str | os.PathLike[str]

DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",  # NumPy knows it once ml_dtypes is imported.
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "INT32": "int32",
    "INT64": "int64",
}
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # Seconds between two attempts.
REPLAYED_BYTES = 1 << 20  # The most of one request when steps are sent again.

CHANNEL_OPTIONS = [
    # Answers may be long.
    ("grpc.max_receive_message_length", -1),
    # So may the sentence of a refusal that names many streams.
    ("grpc.max_metadata_size", 256 << 10),
    ("grpc.absolute_max_metadata_size", 256 << 10),
    # A server that was restarted is found soon, not after up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class ServingError(RuntimeError):
    """A request that the server refused, or that it did not answer.

    Attributes:
        reason: What the server says, such as "out_of_step", "ended", "queue_full",
            "too_many_streams" or "invalid_argument". If the server said nothing: gRPC's status,
            such as "unavailable" (no connection) or "deadline_exceeded" (no answer in time).
        expected: The streams that stood in the way, and the number of the step that each expects.
            No stream of the request has moved then.
    """

    def __init__(self, message: str, reason: str, expected: Mapping[str, int]) -> None:
        super().__init__(message)
        self.reason = reason
        self.expected = dict(expected)

    @classmethod
    def of(cls, error: grpc.RpcError) -> Self:
        """Return what a status of gRPC says."""
        metadata = dict(error.trailing_metadata() or ())
        reason = metadata.get("reason", error.code().name.lower())
        expected = json.loads(metadata.get("expected-steps-bin", b"{}"))
        return cls(f"{error.details()} ({reason})", reason, expected)


class _Tensor(NamedTuple):
    name: str
    datatype: str  # The protocol's: "FP32".
    shape: tuple[int, ...]  # Of one step of one stream.


class Client:
    """A connection to a server, and one model there.

    >>> with ct.serving.Client("127.0.0.1:8001") as client:
    ...     with client.open("a stream's name") as stream:
    ...         y = stream.step(x)  # (6,) -> (3,)

    Several threads may use a client. A numbered request is sent again if the connection breaks, if
    no answer comes in time, or if the server's queue is full. This is safe: the server answers the
    same step again, and moves nothing.

    Args:
        url: "host:port" of the server's gRPC port.
        model: The model's name; None: the only one that the server has.
        token: The server's bearer token (`--token-file`).
        ca: A PEM file with the certificates of the authorities that sign the server's certificate.
            It turns TLS on.
        certificate, key: PEM files, if the server wants to know its clients
            (`--tls-client-ca`).
        timeout: How many seconds a call may take, with all its attempts.
        attempt_timeout: How many seconds one attempt may take.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        token: str | None = None,
        ca: PathLike | None = None,
        certificate: PathLike | None = None,
        key: PathLike | None = None,
        timeout: float = 30.0,
        attempt_timeout: float = 5.0,
    ) -> None:
        if (certificate is None) != (key is None):
            raise ValueError(
                "a client's certificate needs both certificate= and key=, got only one"
            )
        if certificate is not None and ca is None:
            raise ValueError("certificate= and key= need ca= too, which turns TLS on")
        if ca is None:
            self._channel = grpc.insecure_channel(url, CHANNEL_OPTIONS)
        else:
            files = [path and Path(path).read_bytes() for path in (ca, key, certificate)]
            credentials = grpc.ssl_channel_credentials(*files)
            self._channel = grpc.secure_channel(url, credentials, CHANNEL_OPTIONS)
        self._url, self._model = url, model
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        self.timeout, self.attempt_timeout = timeout, attempt_timeout
        self._calls: dict[str, Any] = {}
        self._inputs: tuple[_Tensor, ...] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Streams stay open on the server."""
        self._channel.close()

    @property
    def model(self) -> str:
        """The model's name.

        Raises:
            ValueError: If no name was given and the server has not exactly one model.
        """
        if self._model is None:
            models = self._call("RepositoryIndex", messages.RepositoryIndexRequest(), True).models
            if len(models) != 1:
                names = ", ".join(sorted(model.name for model in models)) or "none"
                raise ValueError(f"the server at {self._url} has the models {names}: name one")
            self._model = models[0].name
        return self._model

    def open(self, name: str | int, *, next_step: int = 0, keep: int = 0) -> Stream:
        """Return a stream of the server. Nothing is sent before its first step.

        Args:
            name: The stream's name: text, or a number, which is the same as its digits.
            next_step: The number of the next step. 0 begins the stream anew, even if the server has
                an open stream of this name. Another number goes on with that one.
            keep: How many of the newest inputs the stream keeps. If the server lost the newest
                steps, for example in a restart, they are sent again from here.
        """
        return Stream(self, str(name), next_step, keep)

    def step(
        self,
        x: Arrays,
        streams: Sequence[str | int] | npt.NDArray[np.int64],
        steps: Sequence[int] | npt.NDArray[np.int64] | None = None,
        *,
        start: bool = False,
        end: bool = False,
    ) -> Outputs:
        """Take one step of each of many streams: all, or none if one of them is refused.

        Args:
            x: An array `(M, ...)`. For a model of several inputs a list of arrays in the model's
                order, or a dictionary by their names.
            streams: M names, all different.
            steps: The number of each stream's step, from 0; None: the steps have no numbers. Then
                a request is not sent again when it is unknown whether the streams have moved.
            start: The streams begin anew with this step.
            end: The streams end after this step.

        Returns:
            An array `(M, ...)`, or for a model of several outputs a dictionary of them.

        Raises:
            ServingError: If the request was refused, or not answered in time.
        """
        return self._many(x, streams, steps, ("M",), start, end)

    def steps(
        self,
        x: Arrays,
        streams: Sequence[str | int] | npt.NDArray[np.int64],
        steps: Sequence[int] | npt.NDArray[np.int64] | None = None,
        *,
        start: bool = False,
        end: bool = False,
    ) -> Outputs:
        """Take T steps of each of many streams: `(M, T, ...)` -> `(M, T, ...)`.

        Args:
            x, streams, start, end: As in `step`.
            steps: The number of each stream's first step, from 0; None: as in `step`.
        """
        return self._many(x, streams, steps, ("M", "T"), start, end)

    def _many(
        self,
        x: Arrays,
        streams: Sequence[str | int] | npt.NDArray[np.int64],
        steps: Sequence[int] | npt.NDArray[np.int64] | None,
        axes: tuple[str, ...],
        start: bool,
        end: bool,
    ) -> Outputs:
        request = self._request(self._arrays(x, [axes]))
        names = [str(name).encode() for name in np.asarray(streams, object).ravel()]
        packed = b"".join(len(name).to_bytes(4, "little") + name for name in names)
        _add(request, "streams", "BYTES", (len(names),), packed)
        if steps is not None:
            numbers = np.asarray(steps, np.int64)
            _add(request, "step", "INT64", numbers.shape, numbers.tobytes())
        for flag, value in (("start", start), ("end", end)):
            if value:
                request.parameters[flag].bool_param = True
        return self._outputs(self._call("ModelInfer", request, steps is not None))

    def _step_stream(self, arrays: Sequence[Array], name: str, step: int, end: bool) -> Outputs:
        """Take the steps of one stream; the first has the number `step`."""
        request = self._request(arrays)
        request.parameters["sequence_id"].string_param = name
        request.parameters["step"].int64_param = step
        for flag, value in (("sequence_start", step == 0), ("sequence_end", end)):
            if value:
                request.parameters[flag].bool_param = True
        return self._outputs(self._call("ModelInfer", request, True))

    def _model_inputs(self) -> tuple[_Tensor, ...]:
        if self._inputs is None:
            request = messages.ModelMetadataRequest(name=self.model)
            tensors = self._call("ModelMetadata", request, True).inputs
            self._inputs = tuple(_Tensor(t.name, t.datatype, tuple(t.shape[1:])) for t in tensors)
        return self._inputs

    def _arrays(self, x: Arrays, leading: Sequence[tuple[str, ...]]) -> list[Array]:
        """Return the model's inputs, checked. They begin with one of these kinds of axes."""
        inputs = self._model_inputs()
        names = [tensor.name for tensor in inputs]
        given: list[Any]
        if isinstance(x, Mapping):
            if set(x) != set(names):
                raise ValueError(f"got the inputs {sorted(x)}, expected {names}")
            given = [x[name] for name in names]
        else:
            given = [x] if len(inputs) == 1 else list(x)  # type: ignore[arg-type]
            if len(given) != len(inputs):
                raise ValueError(f"got {len(given)} inputs, expected {len(inputs)}: {names}")
        arrays = [_array(value, tensor) for value, tensor in zip(given, inputs, strict=True)]
        for array, tensor in zip(arrays, inputs, strict=True):
            axes = array.ndim - len(tensor.shape)
            if array.shape[max(axes, 0) :] != tensor.shape or axes not in map(len, leading):
                expected = " or ".join(_shown((*axes, *tensor.shape)) for axes in leading)
                raise ValueError(
                    f"the input {tensor.name} has the shape {array.shape}, expected {expected}"
                )
        return arrays

    def _request(self, arrays: Sequence[Array]) -> Any:
        request = messages.ModelInferRequest(model_name=self.model)
        for array, tensor in zip(arrays, self._model_inputs(), strict=True):
            _add(request, tensor.name, tensor.datatype, array.shape, array.tobytes())
        return request

    def _outputs(self, response: Any) -> Outputs:
        outputs = {
            output.name: np.frombuffer(bytearray(raw), _dtype(output.datatype)).reshape(
                output.shape
            )
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        return outputs if len(outputs) != 1 else next(iter(outputs.values()))

    def _call(self, method: str, request: Any, repeatable: bool) -> Any:
        """Call a method of the service, as often as it takes.

        Args:
            repeatable: Whether the request may be sent again when it is not known whether the
                server has acted on it.
        """
        with self._lock:
            if method not in self._calls:
                self._calls[method] = self._channel.unary_unary(
                    f"{messages.SERVICE}/{method}",
                    type(request).SerializeToString,
                    getattr(
                        messages, type(request).__name__.replace("Request", "Response")
                    ).FromString,
                )
        end = time.monotonic() + self.timeout
        pause = FIRST_PAUSE
        while True:
            remaining = max(end - time.monotonic(), 0.001)
            try:
                return self._calls[method](
                    request,
                    timeout=min(self.attempt_timeout, remaining),
                    metadata=self._metadata,
                )
            except grpc.RpcError as error:
                again = _may_repeat(error, repeatable)
                if not again or time.monotonic() + pause >= end:
                    raise ServingError.of(error) from error
            # At different times, so that not all clients of a server come back at once.
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)


class Stream:
    """A stream of the server, stepped by one thread at a time. `Client.open` makes it.

    Its steps are numbered, so each is taken exactly once, however often it is sent. A `with` block
    ends the stream. If it is left by an exception, the stream stays open on the server, and
    `client.open(name, next_step=...)` goes on with it.

    Attributes:
        name: The stream's name.
        next_step: The number of the next step. After a `ServingError` that says which step the
            server expects, it is that step: go on with the input of that number.
    """

    def __init__(self, client: Client, name: str, next_step: int, keep: int) -> None:
        self._client = client
        self.name, self.next_step = name, next_step
        self._kept: deque[list[Array]] = deque(maxlen=keep)  # Of steps up to next_step - 1.
        self._last: tuple[int, list[Array]] | None = None  # The newest request.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()

    def step(self, x: Arrays, *, end: bool = False) -> Outputs:
        """Take one step: `(...)` -> `(...)`, or `(1, ...)` -> `(1, ...)`.

        Args:
            x: An array. For a model of several inputs a list of arrays in the model's order, or a
                dictionary by their names.
            end: The stream ends after this step.

        Returns:
            An array, or for a model of several outputs a dictionary of them.

        Raises:
            ServingError: If the step was refused, or not answered in time. If it is not known
                whether the step was taken, take it again: it has the same number.
        """
        arrays = self._client._arrays(x, [(), ("1",)])
        return self._take(arrays, 1, end)

    def steps(self, x: Arrays, *, end: bool = False) -> Outputs:
        """Take T steps in one request: `(T, ...)` -> `(T, ...)`. The rest is as in `step`."""
        arrays = self._client._arrays(x, [("T",)])
        return self._take(arrays, len(arrays[0]), end)

    def close(self) -> None:
        """End the stream on the server.

        It sends the newest step again, as the stream's last. Nothing is sent if the stream has
        taken no steps or has ended. A stream that the server does not have any more is no error.
        """
        if self._last is None:
            return
        number, arrays = self._last
        try:
            self._send(arrays, number, self.next_step - number, True)
        except ServingError as error:
            if error.expected.get(self.name) != 0:
                raise
        self._forget()

    def _take(self, arrays: list[Array], count: int, end: bool) -> Outputs:
        if count == 0:
            return self._client._step_stream(arrays, self.name, self.next_step, False)
        answer = self._send(arrays, self.next_step, count, end)
        self._last = (self.next_step, [array.copy() for array in arrays])
        self.next_step += count
        shapes = [tensor.shape for tensor in self._client._model_inputs()]
        rows = [a.reshape(count, *shape) for a, shape in zip(arrays, shapes, strict=True)]
        for t in range(max(0, count - (self._kept.maxlen or 0)), count):
            self._kept.append([row[t].copy() for row in rows])
        if end:
            self._forget()
        return answer

    def _send(self, arrays: Sequence[Array], number: int, count: int, end: bool) -> Outputs:
        """Send steps. If the server expects older ones that are kept, send these first."""
        for _ in range(3):  # The server may be restarted meanwhile.
            try:
                return self._client._step_stream(arrays, self.name, number, end)
            except ServingError as error:
                expected = error.expected.get(self.name)
                if expected is None:
                    raise
                if not self._replay(expected, number):
                    self._go_on_at(expected)
                    raise
        return self._client._step_stream(arrays, self.name, number, end)

    def _replay(self, expected: int, number: int) -> bool:
        """Send the steps from `expected` to before `number`. Return whether they were kept."""
        first_kept = self.next_step - len(self._kept)
        if not first_kept <= expected < number:
            return False
        steps = list(self._kept)[expected - first_kept : number - first_kept]
        step_bytes = sum(array.nbytes for array in steps[0])
        most = max(1, REPLAYED_BYTES // max(1, step_bytes))
        for begin in range(0, len(steps), most):
            part = steps[begin : begin + most]
            arrays = [np.stack(values) for values in zip(*part, strict=True)]
            try:
                self._client._step_stream(arrays, self.name, expected + begin, False)
            except ServingError as error:
                if self.name not in error.expected:
                    raise
                return True  # The caller learns anew what is expected.
        return True

    def _go_on_at(self, expected: int) -> None:
        """Accept that the server's stream is at another step."""
        if expected > self.next_step:
            self._kept.clear()
        for _ in range(min(self.next_step - expected, len(self._kept))):
            self._kept.pop()
        self.next_step = expected
        self._last = None

    def _forget(self) -> None:
        """Begin anew with the next step: the stream has ended."""
        self.next_step = 0
        self._kept.clear()
        self._last = None


def _add(request: Any, name: str, datatype: str, shape: Sequence[int], data: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(data)


def _dtype(datatype: str) -> np.dtype[Any]:
    if datatype == "BF16":
        import ml_dtypes  # noqa: F401
    return np.dtype(DTYPES[datatype])


def _array(value: Any, tensor: _Tensor) -> Array:
    """Return a contiguous array of the tensor's dtype."""
    array, dtype = np.asarray(value), _dtype(tensor.datatype)
    if array.dtype != dtype and not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(f"the input {tensor.name} has the dtype {array.dtype}, expected {dtype}")
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _shown(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _may_repeat(error: grpc.RpcError, repeatable: bool) -> bool:
    """Return whether to send a request again."""
    if dict(error.trailing_metadata() or ()).get("reason") == "queue_full":
        return True  # Nothing has moved. ("unavailable" also stands for steps that were not saved.)
    codes = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # By a server that is ending.
    )
    return repeatable and error.code() in codes
