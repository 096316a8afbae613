"""`Client`: streams on servers, over gRPC, from NumPy arrays to NumPy arrays."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import grpc
import numpy as np
import numpy.typing as npt

from continual_transformers_tf.serving import messages
from continual_transformers_tf.serving.channels import Access, Channels, PathLike

Array = npt.NDArray[Any]
Arrays = npt.ArrayLike | Sequence[npt.ArrayLike] | Mapping[str, npt.ArrayLike]
Outputs = Array | dict[str, Array]

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


class ServingError(RuntimeError):
    """A request that the server refused, or that it did not answer.

    Attributes:
        reason: What the server says, such as "out_of_step", "ended", "queue_full",
            "too_many_streams" or "invalid_argument". If the server said nothing: gRPC's status,
            such as "unavailable" (no connection) or "deadline_exceeded" (no answer in time).
        expected: The streams that stood in the way, and the number of the step that each expects.
            No stream of the request has moved then. With a cluster this holds for the part of the
            request that went to the same server.
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
        said = f"{error.details()} ({reason})"
        if reason == "unavailable":
            said += ". Is the server running, and is this the address of its gRPC port?"
        return cls(said, reason, expected)

    @classmethod
    def of_parts(cls, errors: Sequence[grpc.RpcError]) -> Self:
        """Return what the statuses of parts of a request say. The first one gives the reason."""
        parts = [cls.of(error) for error in errors]
        for part in parts[1:]:
            parts[0].expected.update(part.expected)
        return parts[0]


class _Tensor(NamedTuple):
    name: str
    datatype: str  # The protocol's: "FP32".
    shape: tuple[int, ...]  # Of one step of one stream.


@dataclasses.dataclass
class _Steps:
    """Steps of streams, which may be sent in parts.

    Attributes:
        numbers: That of each stream's first step; None: they have none.
        parameters: Those that are true.
        alone: Whether it is the request about one stream.
    """

    model: str
    inputs: Sequence[_Tensor]
    arrays: Sequence[Array]
    names: Sequence[bytes]
    numbers: Array | None
    parameters: Sequence[str]
    alone: bool = False

    def request(self, rows: Sequence[int]) -> Any:
        """Return the message about some of the streams."""
        request = messages.ModelInferRequest(model_name=self.model)
        whole = len(rows) == len(self.names)
        for array, tensor in zip(self.arrays, self.inputs, strict=True):
            part = array if whole else array[rows]
            _add(request, tensor.name, tensor.datatype, part.shape, part.tobytes())
        if self.alone:
            request.parameters["sequence_id"].string_param = self.names[0].decode()
            if self.numbers is not None:
                request.parameters["step"].int64_param = int(self.numbers[0])
        else:
            names = [self.names[row] for row in rows]
            packed = b"".join(len(name).to_bytes(4, "little") + name for name in names)
            _add(request, "streams", "BYTES", (len(names),), packed)
            if self.numbers is not None:
                numbers = self.numbers if whole else self.numbers[rows]
                _add(request, "step", "INT64", numbers.shape, numbers.tobytes())
        for parameter in self.parameters:
            request.parameters[parameter].bool_param = True
        return request


class Client:
    """A connection to a server, or to all servers of a cluster, and one model there.

    ```python
    with ct.serving.Client("127.0.0.1:8001") as client:
        with client.open("a stream's name") as stream:
            y = stream.step(x)  # (6,) -> (3,)
    ```

    Several threads may use a client. A numbered request is sent again if the connection breaks, if
    no answer comes in time, or if the server's queue is full. This is safe: the server answers the
    same step again, and moves nothing.

    A server of a cluster refuses streams that another one has, and sends the table of who has which
    (docs/many_machines.md). The client then sends each step to the right one.

    Args:
        url: "host:port" of the server's gRPC port, or a list of them: any servers of a cluster.
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
        url: str | Sequence[str],
        model: str | None = None,
        *,
        token: str | None = None,
        ca: PathLike | None = None,
        certificate: PathLike | None = None,
        key: PathLike | None = None,
        timeout: float = 30.0,
        attempt_timeout: float = 5.0,
    ) -> None:
        access = Access(token, ca, certificate, key)
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ValueError('got no url, expected "host:port" of a server')
        for one in urls:
            if "://" in one:
                raise ValueError(
                    f'got the url {one!r}, expected "host:port" of the server\'s gRPC port, '
                    f"without {one.split('://')[0]}://"
                )
        self._channels = Channels(urls, access)
        self._url, self._model = ", ".join(urls), model
        self.timeout, self.attempt_timeout = timeout, attempt_timeout
        self._inputs: tuple[_Tensor, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Streams stay open on the servers."""
        self._channels.close()

    @property
    def model(self) -> str:
        """The model's name.

        Raises:
            ValueError: If no name was given and the server has not exactly one model.
        """
        if self._model is None:
            models = self._call("RepositoryIndex", messages.RepositoryIndexRequest()).models
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

        With a cluster, each server gets the part of its streams, and takes it all or not at all. If
        one part is refused, the others may have been taken. Number the steps: then the same request
        may be sent again, and what was taken is answered again and moves nothing.

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

    def end(
        self,
        streams: Sequence[str | int] | npt.NDArray[np.int64],
        steps: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        """End many streams, without a step. A stream that is not open is no error.

        Args:
            streams: M names, all different.
            steps: The number of each stream's next step. If a stream is at another one, all are
                refused. None: the streams end wherever they are.

        Raises:
            ServingError: If the request was refused, or not answered in time. It may be sent again.
        """
        names = np.asarray(streams, object).ravel()
        self.steps(self._no_steps(len(names)), names, steps, end=True)

    def _many(
        self,
        x: Arrays,
        streams: Sequence[str | int] | npt.NDArray[np.int64],
        steps: Sequence[int] | npt.NDArray[np.int64] | None,
        axes: tuple[str, ...],
        start: bool,
        end: bool,
    ) -> Outputs:
        arrays = self._arrays(x, [axes])
        names = [str(name).encode() for name in np.asarray(streams, object).ravel()]
        numbers = None if steps is None else np.asarray(steps, np.int64)
        rows = {len(array) for array in arrays} | ({numbers.size} if numbers is not None else set())
        if rows != {len(names)}:
            raise ValueError(
                f"got {len(names)} streams, and inputs or step numbers of "
                f"{' and '.join(map(str, sorted(rows)))}, expected as many of each"
            )
        parameters = [flag for flag, value in (("start", start), ("end", end)) if value]
        return self._take(
            _Steps(self.model, self._model_inputs(), arrays, names, numbers, parameters)
        )

    def _no_steps(self, *streams: int) -> dict[str, Array]:
        """Return the model's inputs of no steps, by their names."""
        inputs = self._model_inputs()
        return {t.name: np.empty((*streams, 0, *t.shape), _dtype(t.datatype)) for t in inputs}

    def _step_stream(
        self,
        arrays: Sequence[Array],
        name: str,
        step: int,
        *,
        start: bool = False,
        end: bool = False,
    ) -> Outputs:
        """Take the steps of one stream; the first has the number `step`."""
        flags = (("sequence_start", start), ("sequence_end", end))
        parameters = [flag for flag, value in flags if value]
        number = np.array([step])
        return self._take(
            _Steps(
                self.model, self._model_inputs(), arrays, [name.encode()], number, parameters, True
            )
        )

    def _model_inputs(self) -> tuple[_Tensor, ...]:
        if self._inputs is None:
            request = messages.ModelMetadataRequest(name=self.model)
            tensors = self._call("ModelMetadata", request).inputs
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

    def _take(self, steps: _Steps) -> Outputs:
        """Send steps to the servers of their streams, as often as it takes."""
        patience = _Patience(self.timeout)
        answers: list[tuple[list[int], Any]] = []
        waiting = list(range(len(steps.names)))
        while True:
            failed = []
            for url, rows, result in self._attempt(steps, waiting, patience):
                if isinstance(result, grpc.RpcError):
                    failed.append((url, rows, result))
                else:
                    answers.append((rows, result))
            if not failed:
                return _gathered(answers, len(steps.names))
            for_good = [e for _, _, e in failed if not _may_repeat(e, steps.numbers is not None)]
            if for_good:
                raise ServingError.of_parts(for_good) from for_good[0]
            learned = [self._learn(url, error) for url, _, error in failed]
            if not patience.wait(at_once=any(learned)):
                raise ServingError.of_parts([e for _, _, e in failed]) from failed[0][2]
            waiting = sorted(row for _, rows, _ in failed for row in rows)

    def _attempt(
        self, steps: _Steps, rows: list[int], patience: _Patience
    ) -> list[tuple[str, list[int], Any]]:
        """Send some streams' steps once. Return (address, rows, answer or error) of each part."""
        parts: dict[str, list[int]] = {}
        table = self._channels.table
        if table is None or not rows:
            parts[self._channels.any_url()] = rows
        else:
            for row in rows:
                parts.setdefault(self._channels.url_of(steps.names[row]), []).append(row)
        seconds = patience.seconds(self.attempt_timeout)
        requests = [steps.request(part) for part in parts.values()]
        if table is not None:
            for request in requests:
                request.parameters["shard_epoch"].int64_param = table.epoch
        results: list[Any] = []
        if len(parts) == 1:  # Without threads of gRPC.
            (url,) = parts
            results.append(
                _result(lambda: self._channels.call(url, "ModelInfer", requests[0], seconds))
            )
        else:
            futures = [
                self._channels.begin(url, "ModelInfer", request, seconds)
                for url, request in zip(parts, requests, strict=True)
            ]
            results += [_result(future.result) for future in futures]
        return [(*part, result) for part, result in zip(parts.items(), results, strict=True)]

    def _learn(self, url: str, error: grpc.RpcError) -> bool:
        """Look for a newer table after a failure. Return whether there is one."""
        if self._channels.learn(error):
            return True
        if _reason(error) in ("wrong_server", "queue_full"):
            return False  # It is the right server, and will know so soon.
        if self._channels.table is None:
            self._channels.go_round(url)
        return self._channels.ask(silent=url)

    def _call(self, method: str, request: Any) -> Any:
        """Call a method that every server answers, and that moves nothing."""
        patience = _Patience(self.timeout)
        while True:
            url = self._channels.any_url()
            try:
                return self._channels.call(
                    url, method, request, patience.seconds(self.attempt_timeout)
                )
            except grpc.RpcError as error:
                self._channels.go_round(url)
                if not _may_repeat(error, True) or not patience.wait():
                    raise ServingError.of(error) from error


class _Patience:
    """How long to try, and the pauses between attempts.

    Args:
        timeout: In seconds, from now on.
    """

    def __init__(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout
        self._pause = FIRST_PAUSE

    def seconds(self, most: float) -> float:
        """Return how long the next attempt may take."""
        return min(most, max(self._end - time.monotonic(), 0.001))

    def wait(self, at_once: bool = False) -> bool:
        """Wait before the next attempt. Return False if there is no time for it."""
        pause = 0.0 if at_once else self._pause
        if time.monotonic() + pause >= self._end:
            return False
        # At different times, so that not all clients of a server come back at once.
        time.sleep(pause * random.uniform(0.5, 1))
        if not at_once:
            self._pause = min(2 * pause, LONGEST_PAUSE)
        return True


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
        self._sent = 0  # The server may be at this step, if its newest answer was lost.
        self._closed = False

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
            end: The stream ends after this step. The next step begins it anew.

        Returns:
            An array, or for a model of several outputs a dictionary of them.

        Raises:
            ServingError: If the step was refused, or not answered in time. If it is not known
                whether the step was taken, take it again: it has the same number.
            ValueError: If the stream is closed, or the array does not fit the model.
        """
        arrays = self._client._arrays(x, [(), ("1",)])
        return self._take(arrays, 1, end)

    def steps(self, x: Arrays, *, end: bool = False) -> Outputs:
        """Take T steps in one request: `(T, ...)` -> `(T, ...)`. The rest is as in `step`."""
        arrays = self._client._arrays(x, [("T",)])
        return self._take(arrays, len(arrays[0]), end)

    def close(self) -> None:
        """End the stream on the server, without a step. This object takes no more steps.

        Nothing is sent if the stream has not begun or has ended. A stream that the server does not
        have any more is no error. One whose newest steps the server has lost ends where it is.

        Raises:
            ServingError: If the server was not reached, or if it expects a later step: then another
                client has taken steps of the stream.
        """
        self._end()
        self._closed = True

    def _end(self) -> None:
        newest = max(self.next_step, self._sent)
        if newest == 0:
            return
        nothing, number = [*self._client._no_steps().values()], self.next_step
        for attempts_left in (2, 1, 0):  # The server may be restarted meanwhile.
            try:
                self._client._step_stream(nothing, self.name, number, end=True)
                break
            except ServingError as error:
                expected = error.expected.get(self.name)
                if expected is None or expected > newest or not attempts_left:
                    raise
                number = expected
        self._forget()

    def _take(self, arrays: list[Array], count: int, end: bool) -> Outputs:
        if self._closed:
            raise ValueError(
                f"the stream {self.name!r} is closed: client.open({self.name!r}) begins it anew"
            )
        if count == 0:
            if end:
                self._end()
            return self._client._step_stream(arrays, self.name, self.next_step)
        self._sent = self.next_step + count
        answer = self._send(arrays, self.next_step, end)
        self.next_step += count
        shapes = [tensor.shape for tensor in self._client._model_inputs()]
        rows = [a.reshape(count, *shape) for a, shape in zip(arrays, shapes, strict=True)]
        for t in range(max(0, count - (self._kept.maxlen or 0)), count):
            self._kept.append([row[t].copy() for row in rows])
        if end:
            self._forget()
        return answer

    def _send(self, arrays: Sequence[Array], number: int, end: bool) -> Outputs:
        """Send steps. If the server expects older ones that are kept, send these first."""
        send = functools.partial(
            self._client._step_stream, arrays, self.name, number, start=number == 0, end=end
        )
        for _ in range(3):  # The server may be restarted meanwhile.
            try:
                return send()
            except ServingError as error:
                expected = error.expected.get(self.name)
                if expected is None:
                    raise
                if not self._replay(expected, number):
                    self._go_on_at(expected)
                    raise
        return send()

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
            number = expected + begin
            try:
                self._client._step_stream(arrays, self.name, number, start=number == 0)
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

    def _forget(self) -> None:
        """Begin anew with the next step: the stream has ended."""
        self.next_step = self._sent = 0
        self._kept.clear()


def _result(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error of gRPC that it raises."""
    try:
        return call()
    except grpc.RpcError as error:
        return error


def _gathered(answers: Sequence[tuple[list[int], Any]], streams: int) -> Outputs:
    """Return the outputs of a request that was answered in parts."""
    outputs: dict[str, Array] = {}
    for rows, response in answers:
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            array = np.frombuffer(bytearray(raw), _dtype(output.datatype)).reshape(output.shape)
            if len(answers) == 1:
                outputs[output.name] = array
                continue
            whole = outputs.setdefault(
                output.name, np.empty((streams, *array.shape[1:]), array.dtype)
            )
            whole[rows] = array
    return outputs if len(outputs) != 1 else next(iter(outputs.values()))


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


def _reason(error: grpc.RpcError) -> str | None:
    return dict(error.trailing_metadata() or ()).get("reason")


def _may_repeat(error: grpc.RpcError, repeatable: bool) -> bool:
    """Return whether to send a request again."""
    if _reason(error) in ("queue_full", "wrong_server"):
        return True  # Nothing has moved. ("unavailable" also stands for steps that were not saved.)
    codes = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # By a server that is ending.
    )
    return repeatable and error.code() in codes
