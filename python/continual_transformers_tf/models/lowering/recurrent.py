"""Lowering of recurrent layers."""

from typing import Any

import keras
import numpy as np

from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.models.lowering.activations import NUMBERS
from continual_transformers_tf.models.lowering.continual_layers import (
    CONTINUAL,
    POSITION,
    State,
    StateOf,
    window_of,
)
from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder, Symbol
from continual_transformers_tf.ops.step import ALL_ROWS, Rows

# The functions that a `recurrent` node knows: those without numbers, and plain relu.
_FUNCTIONS = {
    getattr(keras.activations, name): name
    for name in (
        "exponential", "hard_sigmoid", "linear", "relu", "relu6", "selu", "sigmoid", "silu",
        "softplus", "softsign", "tanh",
    )
    if name in NUMBERS
}  # fmt: skip


def co_recurrent(
    b: PlanBuilder,
    layer: Any,
    x: Symbol,
    given: Rows = ALL_ROWS,
    rows: int = 1,
    mask: Symbol | None = None,
) -> tuple[Symbol, State]:
    """Lower a step of a `CoRecurrent` layer.

    Args:
        b: The `PlanBuilder`.
        layer: The layer.
        x: Its input, `[F]`, or `[rows, F]` if a step has several rows.
        given: The `Rows` of its input.
        rows: How many rows of its input a step has.
        mask: A mask of the step's rows, or None.
    """
    inner, window = layer.layer, layer.window
    cells = getattr(inner.cell, "cells", [inner.cell])
    x = b.cast(x, b.dtype)
    state: dict[str, State] = {"position": POSITION}
    if rows > 1 and window:
        raise CannotLower(
            f"has {rows} rows in each step, and a window: a plan has a node for such rows only "
            'where the state goes on, with recurrence="stream"'
        )
    if window and given.lag > 0:
        raise CannotLower(
            f"has a window, and no row in the first {given.lag} steps of a stream: give the layers "
            'before it padding="causal"'
        )
    if window:
        x = window_of(b, x, window, "window")
        state["steps"] = StateOf(x.index, "ring")
    number = 0
    for i, cell in enumerate(cells):
        with b.within(f"cell_{i}") if len(cells) > 1 else b.within("cell"):
            x = _cell(b, cell, x, goes_on=window is None, mask=mask, first=-given.lag)
        if window is None:
            entries = ["state", "memory"] if isinstance(cell, keras.layers.LSTMCell) else ["state"]
            for entry in entries:
                state[f"state_{number}"] = StateOf(x.index, entry)
                number += 1
    if window and inner.return_sequences:
        return b.node("zero_untaken", [x], x.shape, name="taken"), state
    if x.shape[:-1] and not inner.return_sequences:
        x = b.slice(x, 0, x.shape[0] - 1, 1)
        x = b.reshape(x, x.shape[1:])
    return x, state


CONTINUAL[CoRecurrent] = co_recurrent


def _cell(
    b: PlanBuilder, cell: Any, x: Symbol, goes_on: bool, mask: Symbol | None, first: int
) -> Symbol:
    """Lower one cell, and return its output.

    `first` is the number in the sequence of the row of a stream's first step.
    """
    units, bias = cell.units, cell.bias
    again: str | None = None
    gate = getattr(cell, "recurrent_activation", cell.activation)
    if type(cell) is keras.layers.SimpleRNNCell:
        function = "simple"
    elif type(cell) is keras.layers.LSTMCell:
        function = "lstm"
    elif type(cell) is keras.layers.GRUCell:
        function = "gru" if cell.reset_after else "gru_reset_before"
    else:
        raise CannotLower(
            f"has a cell of its own, {type(cell).__name__}: a plan has nodes for GRUCell, LSTMCell "
            "and SimpleRNNCell"
        )
    kernel = b.variable(cell.kernel, kernel=True)
    of_input: str | None = None
    if bias is not None and function == "gru":
        array = np.asarray(bias.value)
        of_input, again = (b.derived(f"bias_{i}", array[i]) for i in (0, 1))
    elif bias is not None:
        of_input = b.variable(bias)
    products = b.dense(x, kernel, of_input, name="input")
    weights = {"kernel": b.variable(cell.recurrent_kernel, kernel=True)}
    if again is not None:
        weights["bias"] = again
    return b.node(
        "recurrent",
        [products],
        (*x.shape[:-1], units),
        weights=weights,
        masks={"step": mask},
        name="state",
        function=function,
        activation=_named(cell.activation),
        gate=_named(gate),
        goes_on=goes_on,
        first=first,
    )


def _named(function: Any) -> str:
    name = _FUNCTIONS.get(function)
    if name is None:
        raise CannotLower(
            f"has the activation {getattr(function, '__name__', function)!r} in its cell: expected "
            f"one of {', '.join(sorted(_FUNCTIONS.values()))}"
        )
    return name
