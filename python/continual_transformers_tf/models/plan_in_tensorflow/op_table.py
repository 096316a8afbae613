"""The table of a plan's ops in TensorFlow, and what its functions are given."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

Array = npt.NDArray[Any]


def litert_dtype(dtype: str) -> str:
    """Return the dtype here of a value of the plan. LiteRT's ops have no float64."""
    return "float32" if dtype == "float64" else dtype


class Node:
    """A node of a plan.

    Args:
        plan, node: The plan, and the node as the plan has it.
        weights: The plan's tensors by name.
        gaps: Whether the caller may mark a step as a gap.

    Attributes:
        op, name: The names of the op and of the node.
        inputs, output, masks: The places of its values in the plan. Masks are by name.
        attributes: Its attributes. Those that the plan leaves out are missing.
        weights: Its arrays by the node's names for them. Floats are float32.
        input_shapes, shape: The shapes of its inputs and of its output, without the axis of
            streams.
        dtype: The dtype of its output: `litert_dtype`.
        has_gaps: Whether some steps may have no key.
    """

    def __init__(
        self, plan: dict[str, Any], node: dict[str, Any], weights: Mapping[str, Array], gaps: bool
    ) -> None:
        values = plan["values"]
        self.op: str = node["op"]
        self.name: str = node["name"]
        self.inputs: list[int] = node["inputs"]
        (self.output,) = node["outputs"]
        self.masks: dict[str, int] = node.get("masks", {})
        self.attributes: dict[str, Any] = node.get("attributes", {})
        self.weights = {k: _as_float32(weights[w]) for k, w in node.get("weights", {}).items()}
        self.input_shapes = [tuple(values[i]["shape"]) for i in self.inputs]
        self.shape: tuple[int, ...] = tuple(values[self.output]["shape"])
        self.dtype = litert_dtype(values[self.output]["dtype"])
        self.has_gaps = gaps or "key" in self.masks

    @property
    def function(self) -> str | None:
        """Which of the op's functions it computes; None if the op has only one."""
        return self.attributes.get("function")


def _as_float32(array: Array) -> Array:
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


@dataclasses.dataclass
class Step:
    """The step of a stream, as a node sees it while it is traced.

    Attributes:
        position: How many steps the stream took before this one: an integer tensor `[1]`. For ops
            that say their `rows` it may be less, by a multiple of all their rows, but it is never
            less than the rows themselves once so many steps were taken.
        masks: The node's masks by name: bool tensors `[1, 1]`, or `[1, R]` if the step has several
            rows there.
        has_key: Whether this step, or each of its rows, has a key: a bool tensor of the same shape;
            None: it has.
        state: The node's state before this step: tensors by entry.
        new_state: The node's state after this step. The op sets every entry.
    """

    position: tf.Tensor
    masks: dict[str, tf.Tensor]
    has_key: tf.Tensor | None
    state: dict[str, tf.Tensor]
    new_state: dict[str, tf.Tensor] = dataclasses.field(default_factory=dict)

    def of_row(self, i: int, each: int, rows: int) -> "Step":
        """Return row i of a step of several rows as a step of its own.

        Args:
            i: Which row.
            each: How many rows a step has.
            rows: How many rows the op's ring has. The position of the row is right modulo this
                number, and if it is less than this number.
        """
        # Far into a stream the product with the position could overflow. A whole ring earlier, the
        # row is the same.
        near = tf.math.floormod(self.position, rows)
        near = tf.where(self.position < rows, near, near + rows)
        masks = {name: mask[:, i : i + 1] for name, mask in self.masks.items()}
        has_key = self.has_key
        if has_key is not None and has_key.shape[1] > 1:
            has_key = has_key[:, i : i + 1]
        return Step(near * each + i, masks, has_key, {**self.state, **self.new_state})

    def row(self, rows: int) -> tf.Tensor:
        """Return the row of a ring that this step writes: an integer tensor `[1]`."""
        return tf.math.floormod(self.position, rows)

    def ages(self, rows: int) -> tf.Tensor:
        """Return how many steps ago each row of a ring was written: integers `[rows]`.

        The row that this step writes has age 0. A row that was never written has an age above the
        position.
        """
        number = tf.range(rows, dtype=self.position.dtype)
        return tf.math.floormod(self.position - number, rows)

    def are_taken(self, n: int, rows: int = 1, first: int | None = None) -> tf.Tensor:
        """Return which of n rows are of steps that were taken: bool `[n]`.

        Row i has the number `position * rows + first + i`, which is below 0 before the stream.

        Args:
            n: How many rows.
            rows: How many rows each step has.
            first: The number of the first row at position 0. None: the last row is that of the
                newest step.
        """
        first = 1 - n if first is None else first
        # The position at which each is taken, because a product with the position could overflow.
        taken_at = [max(0, -((first + i) // rows)) for i in range(n)]
        return tf.constant(taken_at, self.position.dtype) <= self.position

    def put(self, entry: str, update: tf.Tensor) -> tf.Tensor:
        """Write this step's row `[1, ...]` into a ring, and return the ring `[rows, ...]`."""
        ring = self.state[entry]
        rows = ring.shape[0]
        if rows == 1:
            ring = update
        else:
            rest = tf.zeros([len(ring.shape) - 1], self.position.dtype)
            starts = tf.concat([self.row(rows), rest], 0)
            # LiteRT's DYNAMIC_UPDATE_SLICE: a NaN that was in the row leaves no trace.
            ring = keras.ops.slice_update(ring, starts, update)
        self.new_state[entry] = ring
        return ring


# The shape and dtype of each entry of a state.
State = dict[str, tuple[tuple[int, ...], str]]


@dataclasses.dataclass(frozen=True)
class Op:
    """How one op of a plan runs in TensorFlow, and the state that it keeps.

    Attributes:
        trace: A function of (node, step, *inputs), tensors `[1, ...]`, that returns the output.
        state: A function of a node that returns the shape and dtype of each entry of its state.
            A new stream's state is zeros.
        rows: A function of a node that returns how many rows its ring or table has. Once so many
            steps were taken, its output must only depend on the position modulo this number.
        beginning: A function of a node that returns after how many steps, or that many rows if
            they are more, its output no longer depends on the position otherwise.
        functions: The values of the attribute "function" that it has; None: the op has none.
    """

    trace: Callable[..., tf.Tensor]
    state: Callable[[Node], State]
    rows: Callable[[Node], int]
    beginning: Callable[[Node], int]
    functions: frozenset[str] | None

    def has(self, node: Node) -> bool:
        """Whether it can compute a node of this op."""
        return self.functions is None or node.function in self.functions


OPS: dict[str, Op] = {}

Trace = Callable[..., tf.Tensor]


def op(
    name: str,
    state: Callable[[Node], State] = lambda node: {},
    rows: Callable[[Node], int] = lambda node: 1,
    beginning: Callable[[Node], int] = lambda node: 0,
    functions: Mapping[str, Any] | None = None,
) -> Callable[[Trace], Trace]:
    """Add the decorated function to the table. The arguments are the attributes of `Op`."""

    def add(trace: Trace) -> Trace:
        names = None if functions is None else frozenset(functions)
        OPS[name] = Op(trace, state, rows, beginning, names)
        return trace

    return add
