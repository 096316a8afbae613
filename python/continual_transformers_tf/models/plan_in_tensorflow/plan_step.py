"""A plan's step of one stream, as a function that TensorFlow traces."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from continual_transformers_tf.models.plan_in_tensorflow.op_table import (
    OPS,
    Node,
    Step,
    litert_dtype,
)
from continual_transformers_tf.models.problem import CannotStream, Problem

POSITION = "position"
MOST_STEPS = 2**31 - 1  # The largest position in int32.


class PlanStep:
    """One step of a plan, for one stream.

    Args:
        plan: The plan, as `docs/model_file.md` defines it.
        weights: Its tensors: arrays by name.
        gaps: Whether the caller may mark steps as gaps.

    Attributes:
        inputs, outputs, state: A `tf.TensorSpec` for each, by name. The shapes of inputs and
            outputs are those of the plan with the axis of streams before them, `[1, ...]`; inputs
            of a plan that takes a block of steps are `[1, block, ...]`. The state is "position"
            and entries such as "0_key": the entry "key" of the first node that has a state. A new
            stream's state is zeros. All are float32 or int32, with 0 and 1 for bools: LiteRT in
            browsers knows no int64 and no bool. Only the position is int64 if the rings of the
            plan do not come to their first rows together within 2^31 steps.

    Raises:
        CannotStream: If a node has no counterpart in LiteRT's ops: a line for each.
    """

    def __init__(
        self, plan: dict[str, Any], weights: Mapping[str, npt.NDArray[Any]], gaps: bool = False
    ) -> None:
        self._plan = plan
        self._nodes = [Node(plan, node, weights, gaps) for node in plan["nodes"]]
        problems = list(filter(None, map(_missing, self._nodes)))
        if problems:
            raise CannotStream(problems, f"{plan['name']} cannot be exported to LiteRT")
        self._names: list[dict[str, str]] = []  # For each node, the names of its entries.
        # The receptive field is in steps of the inputs.
        self._steps_to_ready = -(-plan["receptive_field"] // plan["block"])
        self._period = self._common_period()
        self.inputs = {port["name"]: self._spec(port) for port in plan["inputs"]}
        self.outputs = {port["name"]: self._spec(port) for port in plan["outputs"]}
        integer = tf.int32 if self._period else tf.int64
        self.state = {POSITION: tf.TensorSpec([1], integer, POSITION)}
        with_state = 0
        for node in self._nodes:
            entries = OPS[node.op].state(node)
            names = {entry: f"{with_state}_{entry}" for entry in entries}
            with_state += bool(entries)
            self._names.append(names)
            for entry, (shape, dtype) in entries.items():
                self.state[names[entry]] = tf.TensorSpec(shape, _outside(dtype), names[entry])

    def _spec(self, port: dict[str, Any]) -> tf.TensorSpec:
        value = self._plan["values"][port["value"]]
        return tf.TensorSpec([1, *value["shape"]], _outside(value["dtype"]), port["name"])

    def _common_period(self) -> int:
        """Return by how much the position may be lowered; 0: not at all, so it is an int64."""
        period, least = 1, self._steps_to_ready
        for node in self._nodes:
            rows = OPS[node.op].rows(node)
            period = math.lcm(period, rows)
            least = max(least, rows, OPS[node.op].beginning(node))
        return max(0, MOST_STEPS - least) // period * period

    def __call__(
        self,
        inputs: Mapping[str, tf.Tensor],
        state: Mapping[str, tf.Tensor],
        key_mask: tf.Tensor | None = None,
    ) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor], tf.Tensor]:
        """Trace one step.

        Args:
            inputs, state: Tensors by name.
            key_mask: int32 `[1]`; 0 marks a gap: no query attends to this step. None: no gap.

        Returns:
            (outputs by name, the state after the step by name, ready: int32 `[1]`).
        """
        has_key = None if key_mask is None else tf.reshape(key_mask, [1, 1]) != 0
        plan = self._plan
        values = {
            port["value"]: _to(plan["values"][port["value"]]["dtype"], inputs[port["name"]])
            for port in plan["inputs"]
        }
        position = state[POSITION]
        new_state = {POSITION: self._next(position)}
        for node, names in zip(self._nodes, self._names, strict=True):
            masks = {name: values[i] for name, i in node.masks.items()}
            dtypes = {entry: dtype for entry, (_, dtype) in OPS[node.op].state(node).items()}
            before = {entry: _to(dtypes[entry], state[name]) for entry, name in names.items()}
            step = Step(position, masks, _both(has_key, masks.get("key")), before)
            y = OPS[node.op].trace(node, step, *(values[i] for i in node.inputs))
            values[node.output] = tf.ensure_shape(y, [1, *node.shape])
            new_state |= {
                name: _to(_outside(dtypes[entry]), step.new_state[entry])
                for entry, name in names.items()
            }
        outputs = {
            port["name"]: _to(self.outputs[port["name"]].dtype.name, values[port["value"]])
            for port in plan["outputs"]
        }
        ready = new_state[POSITION] >= self._steps_to_ready
        return outputs, new_state, tf.cast(ready, tf.int32)

    def _next(self, position: tf.Tensor) -> tf.Tensor:
        """Return the position after a step. An int32 goes back by whole rounds of every ring."""
        if not self._period:
            return position + 1
        is_last = tf.cast(tf.equal(position, MOST_STEPS), tf.int32)
        return position - is_last * np.int32(self._period) + 1


def _outside(dtype: str) -> str:
    """Return the dtype of an input, output or state whose dtype in the plan is this one."""
    return "float32" if dtype.startswith("float") else "int32"


def _to(dtype: str, x: tf.Tensor) -> tf.Tensor:
    """Cast an input, output or state to a dtype of the plan, or back."""
    dtype = litert_dtype(dtype)
    return x != 0 if dtype == "bool" and x.dtype != tf.bool else tf.cast(x, dtype)


def _both(a: tf.Tensor | None, b: tf.Tensor | None) -> tf.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return tf.logical_and(a, b)


def _missing(node: Node) -> Problem | None:
    known = OPS.get(node.op)
    if known is not None and known.has(node):
        return None
    function = "" if known is None else f" {node.function!r}"
    return Problem(
        f"{node.name} ({node.op}{function}) cannot be expressed in LiteRT's built-in ops by this "
        "version: a ct.Session runs it"
    )
