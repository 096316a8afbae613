"""The load test of a server: streams at the rate at which they would come.

Each request has one step of each of some streams, which always come together: a group. Latency
counts from the moment at which a request is due, whether or not it could be sent then. So a server
that stalls is charged for every request that should have come meanwhile, not only for one
("coordinated omission").
"""

from __future__ import annotations

import heapq
import json
import os
import queue
import signal
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

import continual_transformers_tf as ct
from continual_transformers_tf.demo import watch
from continual_transformers_tf.recordings import read_recordings
from continual_transformers_tf.serving import messages
from continual_transformers_tf.serving.channels import Access
from continual_transformers_tf.serving.client import DTYPES, ServingError
from continual_transformers_tf.session import ArraySpec

CHANNELS = 4
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
ATTEMPT_SECONDS = 5.0
CONNECT_SECONDS = 5.0
GRACE_SECONDS = 5.0  # For the last answers.
PROGRESS_SECONDS = 0.25
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0  # Seconds, before a request is sent again.
TEMPORARY = {"cancelled", "deadline", "deadline_exceeded", "queue_full", "unavailable"}
# Answers that are kept, to be checked at the end. Beyond it, fewer and fewer groups keep theirs.
MOST_KEPT_STEPS = 500_000
CHECKED_AT_ONCE = 64  # Steps of a group.
# The largest difference over the largest output. The server's answer and the one that it is
# compared with are each within 5e-6 of the exact one.
TOLERANCE = 1e-5
# The same for rings of 8 or 16 bits. There a difference in the last bit, as between batches of two
# sizes, may round a number the other way.
NARROW_TOLERANCE = 1e-2

DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}
RANDOM_STEPS = 10_000

Arrays = list[npt.NDArray[Any]]


class Options(NamedTuple):
    """What to send.

    Attributes:
        streams: How many streams.
        rate: Steps a second of each stream; 0: the next step as soon as the last one is answered.
        rows: How many streams a request has.
        seconds: How long.
    """

    streams: int
    rate: float
    rows: int
    seconds: float


class Result(NamedTuple):
    """What was measured.

    Attributes:
        options: What was sent.
        seconds: How long the measurement took.
        latency: Of each answered request, in seconds: from when it was due.
        answered_at: When each of them was answered, in seconds since the start.
        lateness: How late a request was sent that did not have to wait for an answer, in seconds:
            what this program adds to latency.
        steps: How many steps were answered in time, of all streams together.
        unanswered: How many steps were due and were not answered in that time.
        refused: How many requests were refused or failed, by reason. They were sent again if that
            could help.
        first_refused: What the first of them said.
        lost: How many streams could not go on.
        checked: How many answers were compared with those of a `Session`.
        tolerance: How much they may differ: the largest difference, over the largest output.
        wrong: How many of them differ by more.
        first_wrong: The first of them, as a sentence.
        difference: The largest difference, over the largest output.
        core: How much of a core this program took.
        interrupted: Whether Ctrl-C ended it.
    """

    options: Options
    seconds: float
    latency: npt.NDArray[np.float64]
    answered_at: npt.NDArray[np.float64]
    lateness: npt.NDArray[np.float64]
    steps: int
    unanswered: int
    refused: dict[str, int]
    first_refused: str
    lost: int
    checked: int
    tolerance: float
    wrong: int
    first_wrong: str
    difference: float
    core: float
    interrupted: bool


# A function of the seconds passed, the steps answered, and the latency of the newest requests.
OnProgress = Callable[[float, int, "array[float]"], None]


class Samples:
    """What the streams send: recordings, each stream from another sample on, again and again.

    Args:
        streams: How many streams.
        recordings: An array `(steps, ...)` for each input of the model.
    """

    def __init__(self, streams: int, recordings: Arrays) -> None:
        self._recordings, self._length = recordings, len(recordings[0])
        self._begin = np.arange(streams) * max(1, self._length // streams)

    def of_step(self, streams: slice, step: int) -> Arrays:
        """Return what these streams send in a step: an array `(M, ...)` for each input."""
        at = (self._begin[streams] + step) % self._length
        return [x[at] for x in self._recordings]

    def of_steps(self, streams: slice, first: int, end: int) -> Arrays:
        """Return what these streams send in their steps first ... end - 1: `(M, T, ...)`."""
        at = (self._begin[streams][:, np.newaxis] + np.arange(first, end)) % self._length
        return [x[at] for x in self._recordings]


def recordings_for(session: ct.Session, data: Path | None) -> Arrays:
    """Return what to send to a model: an array `(steps, ...)` for each input.

    Args:
        session: A session of the model.
        data: A file of recordings; None: the demo's, if the model takes them, otherwise random
            numbers.

    Raises:
        ValueError: If the recordings do not fit the model, or if it takes integers and there are no
            recordings.
    """
    if data is not None:
        return [x.reshape(-1, *x.shape[2:]) for x in read_recordings(data, session)]
    (spec, *more) = session.inputs
    if not more and spec.shape == (len(watch.CHANNELS),) and spec.dtype == np.float32:
        return [watch.held_out_samples()]
    random = np.random.default_rng(0)
    recordings = []
    for spec in session.inputs:
        if spec.dtype.kind == "i":
            raise ValueError(
                f"the input {spec.name} takes integers, and it is not known which: give recordings "
                "with --data"
            )
        recordings.append(random.standard_normal((RANDOM_STEPS, *spec.shape)).astype(spec.dtype))
    return recordings


class Group:
    """The streams of one request, and their next step.

    Args:
        index: The group's number.
        model: The model's name.
        inputs: The model's inputs.
        names: The streams' names.
        streams: Which streams they are.
    """

    def __init__(
        self,
        index: int,
        model: str,
        inputs: Sequence[ArraySpec],
        names: list[str],
        streams: slice,
    ) -> None:
        self.index, self.names, self.streams = index, names, streams
        count = len(names)
        request = messages.ModelInferRequest(model_name=model)
        request.inputs.add(name="streams", datatype="BYTES", shape=[count])
        for spec in inputs:
            datatype = DATATYPES[spec.dtype.name]
            request.inputs.add(name=spec.name, datatype=datatype, shape=[count, *spec.shape])
        request.inputs.add(name="step", datatype="INT64", shape=[count])
        encoded = [name.encode() for name in names]
        request.raw_input_contents.append(
            b"".join(len(name).to_bytes(4, "little") + name for name in encoded)
        )
        # What all requests begin with. A message may be cut into parts.
        self._begin = request.SerializeToString()
        self.step = 0
        self.due = 0.0
        self.pause = FIRST_PAUSE
        self.pending: tuple[bytes, bool] | None = None  # The request, and whether it is the last.
        self.answers: list[bytes] = []
        self.keeps_answers = True
        self.done = self.lost = False

    def request(self, samples: Samples, end: bool) -> bytes:
        """Return the request for the next step. The first begins the streams, `end` ends them."""
        step = np.full(len(self.names), self.step, np.int64)
        arrays = [*samples.of_step(self.streams, self.step), step]
        rest = messages.ModelInferRequest(raw_input_contents=[x.tobytes() for x in arrays])
        if self.step == 0:
            rest.parameters["start"].bool_param = True
        if end:
            rest.parameters["end"].bool_param = True
        return self._begin + rest.SerializeToString()


class Load:
    """A load test of one server.

    Args:
        url: "host:port" of the server's gRPC port.
        model: The model's name.
        model_file: The file of that model, to which answers are compared.
        options: What to send.
        on_progress: A function that is told how it goes.
        access: What the server wants to see; None: nothing.
        data: A file of recordings to send; None: see `recordings_for`.

    Raises:
        ValueError: If there are no recordings for the model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        model_file: Path,
        options: Options,
        on_progress: OnProgress | None = None,
        access: Access | None = None,
        data: Path | None = None,
    ) -> None:
        self._session = ct.Session.load(model_file)
        self._url, self._options, self._on_progress = url, options, on_progress
        is_narrow = self._session.cache_dtype not in ("float32", "float64")
        self._tolerance = NARROW_TOLERANCE if is_narrow else TOLERANCE
        self._samples = Samples(options.streams, recordings_for(self._session, data))
        # Other runs may use the same server.
        run = f"load-{os.urandom(4).hex()}"
        self._groups = [
            Group(
                begin // options.rows,
                model,
                self._session.inputs,
                [f"{run}-{i}" for i in range(begin, min(begin + options.rows, options.streams))],
                slice(begin, min(begin + options.rows, options.streams)),
            )
            for begin in range(0, options.streams, options.rows)
        ]
        own = ("grpc.use_local_subchannel_pool", 1)  # A connection for each channel.
        self._access = access or Access()
        self._channels = [
            self._access.channel(url, [own]) for _ in range(min(CHANNELS, len(self._groups)))
        ]
        # Bytes, which are read at the end.
        self._calls = [
            channel.unary_unary(f"{messages.SERVICE}/ModelInfer") for channel in self._channels
        ]
        self._answers: queue.SimpleQueue[tuple[float, Group, Any] | None] = queue.SimpleQueue()
        self._agenda: list[tuple[float, int]] = []  # (when, group): what is sent next.
        self._in_flight = 0
        self._latency, self._answered_at, self._lateness = array("d"), array("d"), array("d")
        self._refused: Counter[str] = Counter()
        self._first_refused = ""
        self._steps = self._kept_steps = 0
        self._interrupted = False

    def run(self) -> Result:
        """Send everything, and check the answers. Ctrl-C ends it early, with what there is.

        Raises:
            OSError: If there is no server.
        """
        for channel in self._channels:
            try:
                grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
            except grpc.FutureTimeoutError as error:
                self._close()
                raise OSError(f"no server answers at {self._url}") from error
        # Calls that stay open. In gRPC's Python, a channel without a call has no thread, and the
        # next request would wait until it has started one.
        watches = [channel.unary_stream(HEALTH_WATCH)(b"") for channel in self._channels]
        cpu = time.process_time()
        self._start = time.perf_counter()
        self._end = self._start + self._options.seconds
        of_others = None
        if threading.current_thread() is threading.main_thread():
            of_others = signal.signal(signal.SIGINT, self._interrupt)
        try:
            self._measure()
        finally:
            if of_others is not None:
                signal.signal(signal.SIGINT, of_others)
        seconds = self._end - self._start
        core = (time.process_time() - cpu) / seconds
        due = self._due_steps(seconds)
        unanswered = max(0, due - self._steps) if self._options.rate else 0
        self._end_streams()
        for call in watches:
            call.cancel()
        self._close()
        checked, wrong, first_wrong, difference = self._check()
        return Result(
            options=self._options,
            seconds=seconds,
            latency=np.array(self._latency),
            answered_at=np.array(self._answered_at),
            lateness=np.array(self._lateness),
            steps=self._steps,
            unanswered=unanswered,
            refused=dict(self._refused),
            first_refused=self._first_refused,
            lost=sum(len(group.names) for group in self._groups if group.lost),
            checked=checked,
            tolerance=self._tolerance,
            wrong=wrong,
            first_wrong=first_wrong,
            difference=difference,
            core=core,
            interrupted=self._interrupted,
        )

    def _close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        self._end = time.perf_counter()
        self._answers.put(None)  # Wake up.

    def _measure(self) -> None:
        rate = self._options.rate
        for group in self._groups:
            # Groups take turns, as streams do that know nothing of each other.
            group.due = self._start + (group.index / len(self._groups) / rate if rate else 0)
            self._agenda.append((group.due, group.index))
        next_progress = self._start
        while (now := time.perf_counter()) < self._end:
            self._send_what_is_due(now)
            if self._on_progress is not None and now >= next_progress:
                self._on_progress(now - self._start, self._steps, self._latency[-1000:])
                next_progress = now + PROGRESS_SECONDS
            until = min(self._end, self._agenda[0][0] if self._agenda else self._end)
            if self._on_progress is not None:
                until = min(until, next_progress)
            for answered, group, future in self._next_answers(until):
                if self._take(answered, group, future) and answered <= self._end:
                    self._latency.append(answered - group.due)
                    self._answered_at.append(answered - self._start)
                    self._steps += len(group.names)
                    group.due = group.due + 1 / rate if rate else answered
                    heapq.heappush(self._agenda, (max(group.due, answered), group.index))

    def _end_streams(self) -> None:
        """Send every stream's last step, and wait for all answers, but not for ever."""
        again = [entry for entry in self._agenda if self._groups[entry[1]].pending]
        self._agenda = again + [
            (0.0, g.index) for g in self._groups if g.step and not (g.pending or g.lost)
        ]
        heapq.heapify(self._agenda)
        give_up = time.perf_counter() + GRACE_SECONDS
        while (self._in_flight or self._agenda) and (now := time.perf_counter()) < give_up:
            self._send_what_is_due(now, end=True)
            until = min(give_up, self._agenda[0][0] if self._agenda else give_up)
            for answered, group, future in self._next_answers(until):
                if self._take(answered, group, future) and not group.done:
                    heapq.heappush(self._agenda, (0.0, group.index))
        for group in self._groups:
            group.lost |= group.step > 0 and not group.done

    def _send_what_is_due(self, now: float, end: bool = False) -> None:
        while self._agenda and self._agenda[0][0] <= now:
            when, i = heapq.heappop(self._agenda)
            group = self._groups[i]
            if group.pending is None:
                group.pending = (group.request(self._samples, end), end)
                if not end:
                    self._lateness.append(time.perf_counter() - when)
            future = self._calls[i % len(self._calls)].future(
                group.pending[0], timeout=ATTEMPT_SECONDS, metadata=self._access.metadata
            )
            self._in_flight += 1
            # gRPC's thread calls it.
            future.add_done_callback(
                lambda future, group=group: self._answers.put((time.perf_counter(), group, future))
            )

    def _next_answers(self, until: float) -> list[tuple[float, Group, Any]]:
        """Return the answers that are there. If there are none, wait for one until then."""
        answers = []
        try:
            answers.append(self._answers.get(timeout=max(0.0, until - time.perf_counter())))
            while True:
                answers.append(self._answers.get_nowait())
        except queue.Empty:
            return [answer for answer in answers if answer is not None]

    def _take(self, answered: float, group: Group, future: Any) -> bool:
        """Take the end of a call. Return whether the streams have moved."""
        self._in_flight -= 1
        if future.code() == grpc.StatusCode.OK:
            if group.keeps_answers:
                group.answers.append(future.result())
                self._kept_steps += len(group.names)
                if self._kept_steps > MOST_KEPT_STEPS:
                    self._keep_less()
            assert group.pending is not None
            group.done = group.pending[1]
            group.pending, group.pause = None, FIRST_PAUSE
            group.step += 1
            return True
        error = ServingError.of(future)
        reason = error.reason
        self._refused[reason] += 1
        self._first_refused = self._first_refused or str(error)
        if reason in TEMPORARY:
            heapq.heappush(self._agenda, (answered + group.pause, group.index))
            group.pause = min(2 * group.pause, LONGEST_PAUSE)
        else:
            group.lost = True
        return False

    def _keep_less(self) -> None:
        """Have half of the groups that keep their answers forget them."""
        keeping = [group for group in self._groups if group.keeps_answers]
        for group in keeping[1::2]:
            group.answers, group.keeps_answers = [], False
        if len(keeping) == 1:
            keeping[0].keeps_answers = False  # It has enough.
        self._kept_steps = sum(len(g.answers) * len(g.names) for g in self._groups)

    def _due_steps(self, seconds: float) -> int:
        """Return how many steps were due by then."""
        rate, count = self._options.rate, len(self._groups)
        if not rate:
            return self._steps
        return sum(
            len(group.names) * max(0, int(np.ceil((seconds - i / count / rate) * rate)))
            for i, group in enumerate(self._groups)
        )

    def _check(self) -> tuple[int, int, str, float]:
        """Compare answers with those of a session: of each step, all outputs together."""
        plan = json.loads(self._session._plan_json)
        checked = wrong = 0
        first_wrong, difference = "", 0.0
        for group in self._groups:
            steps = len(group.answers)
            if not steps:
                continue
            answers = [messages.ModelInferResponse.FromString(raw) for raw in group.answers]
            rows = steps, len(group.names), -1
            got = np.concatenate(
                [
                    np.frombuffer(
                        b"".join(answer.raw_output_contents[i] for answer in answers), spec.dtype
                    ).reshape(rows)
                    for i, spec in enumerate(self._session.outputs)
                ],
                axis=-1,
            )
            ids = self._session.open(len(group.names))
            parts = []
            for first in range(0, steps, CHECKED_AT_ONCE):
                end = min(first + CHECKED_AT_ONCE, steps)
                arrays = self._samples.of_steps(group.streams, first, end)
                outputs = self._session.steps(packed(plan["input_structure"], arrays), ids)
                in_order = flattened(plan["output_structure"], outputs)
                parts.append([y.swapaxes(0, 1).reshape(end - first, *rows[1:]) for y in in_order])
            self._session.close(ids)
            outputs = [np.concatenate(of_one) for of_one in zip(*parts, strict=True)]
            right = np.concatenate(outputs, axis=-1)
            error = np.abs(got - right).max(-1) / np.abs(right).max()
            error[np.isnan(error)] = np.inf
            checked += error.size
            wrong += int((error > self._tolerance).sum())
            difference = max(difference, float(error.max()))
            if wrong and not first_wrong:
                step, row = np.argwhere(error > self._tolerance)[0]
                first_wrong = (
                    f"step {step} of {group.names[row]}: got {got[step, row]}, "
                    f"expected {right[step, row]}"
                )
        return checked, wrong, first_wrong, difference


def packed(structure: Any, arrays: Arrays) -> Any:
    """Put arrays into a structure of a model file: lists and dicts of places."""
    if isinstance(structure, int):
        return arrays[structure]
    if isinstance(structure, list):
        return [packed(child, arrays) for child in structure]
    return {key: packed(child, arrays) for key, child in structure.items()}


def flattened(structure: Any, nested: Any) -> Arrays:
    """Take arrays out of such a structure, in the order of their places."""
    places: dict[int, npt.NDArray[Any]] = {}

    def visit(structure: Any, nested: Any) -> None:
        if isinstance(structure, int):
            places[structure] = nested
            return
        keys = range(len(structure)) if isinstance(structure, list) else structure
        for key in keys:
            visit(structure[key], nested[key])

    visit(structure, nested)
    return [places[place] for place in sorted(places)]


def quantiles(latency: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return quantiles of latencies, in milliseconds."""
    if not latency.size:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    values = np.quantile(latency, list(shares.values()), method="higher")
    return {name: float(1000 * value) for name, value in zip(shares, values, strict=True)}
