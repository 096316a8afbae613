"""Einsum products of a step with a fixed tensor, lowered to dense nodes."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import keras
import numpy as np

from continual_transformers_tf.models.lowering.plan_builder import (
    Array,
    CannotLower,
    PlanBuilder,
    Symbol,
)


def einsum(
    b: PlanBuilder,
    equation: str,
    x: Symbol,
    kernel: keras.Variable | keras.KerasTensor,
    lead: int,
    name: str,
    bias: keras.Variable | None = None,
) -> Symbol:
    """Lower `keras.ops.einsum(equation, x, kernel)`, plus a bias, for a step.

    Args:
        b: The `PlanBuilder`.
        equation: For example "abc,cde->abde"; it may have an ellipsis.
        x: A Symbol, Keras' first operand without its first axes.
        kernel: A `keras.Variable`, or a tensor.
        lead: How many axes Keras' operand has before those of the Symbol.
        name: The name of the kernel's tensor, if the kernel is not a variable.
        bias: A `keras.Variable` that broadcasts to Keras' output; None: no bias.
    """
    given, weights, output = letters(equation, len(x.shape) + lead)
    for part in (given, weights, output):
        if len(set(part)) != len(part):
            raise CannotLower(
                f"has the equation {equation!r}, which names an axis twice: no node takes diagonals"
            )
    if given[:lead] != output[:lead] or set(given[:lead]) & set(weights):
        raise CannotLower(f"has the equation {equation!r}, which mixes samples, or steps of time")
    given, output = given[lead:], output[lead:]
    sizes = dict(zip(weights, kernel.shape, strict=True)) | dict(zip(given, x.shape, strict=True))
    if any(letter not in sizes for letter in output):
        raise CannotLower(f"has the equation {equation!r}, with an axis that only its output has")

    summed = [a for a in given if a not in weights and a not in output]
    if summed:
        x = b.reduce(x, "sum", [given.index(a) for a in summed])
        given = [a for a in given if a not in summed]
    alone = [a for a in weights if a not in given and a not in output]
    batched = [a for a in given if a in weights and a in output]
    contracted = [a for a in weights if a in given and a not in output]
    free = [a for a in given if a not in weights]
    made = [a for a in output if a in weights and a not in given]

    def size(axes: Iterable[str]) -> int:
        return math.prod(sizes[a] for a in axes)

    # Bring x to [batched, free, contracted], and the kernel to [batched, contracted, made].
    x = b.transpose(b.cast(x, b.dtype), [given.index(a) for a in (*batched, *free, *contracted)])
    order = [*batched, *contracted, *made]

    def rows_of_kernel(array: Array, place: tuple[int, ...] = ()) -> Array:
        total = array.sum(tuple(weights.index(a) for a in alone)) if alone else array
        left = [a for a in weights if a not in alone]
        rows: Array = total.transpose([left.index(a) for a in order])[place]
        return rows

    plain = not alone and order == list(weights)
    if not batched:
        matrix = b.variable(
            kernel,
            (size(contracted), size(made)),
            transform=None if plain else rows_of_kernel,
            kernel=True,
            name=name,
        )
        vector = []
        if bias is not None and _is_of(bias, output, made, size(made)):
            vector, bias = [b.variable(bias, (-1,))], None
        y = b.dense(b.reshape(x, (*(sizes[a] for a in free), size(contracted))), matrix, *vector)
    else:
        x = b.reshape(x, (size(batched), size(free), size(contracted)))
        parts = []
        for i, place in enumerate(itertools.product(*(range(sizes[a]) for a in batched))):
            matrix = b.variable(
                kernel,
                (size(contracted), size(made)),
                transform=functools.partial(rows_of_kernel, place=place),
                kernel=True,
                name=name,
            )
            row = b.reshape(b.slice(x, 0, i, 1), x.shape[1:])
            parts.append(b.reshape(b.dense(row, matrix), (1, size(free), size(made))))
        y = b.concat(parts, 0)
    has = [*batched, *free, *made]
    y = b.reshape(y, [sizes[a] for a in has])
    y = b.transpose(y, [has.index(a) for a in output])
    return y if bias is None else _plus(b, y, bias)


def letters(equation: str, rank: int) -> tuple[list[str], list[str], list[str]]:
    """Return the letters of the first operand, of the second, and of the output, as lists."""
    match = re.fullmatch(r"([^,]*),([^,]*)->(.*)", equation.replace(" ", ""))
    if match is None:
        raise CannotLower(f"has the equation {equation!r}: expected two operands and an output")
    given, kernel, output = match.groups()
    if "..." in kernel:
        raise CannotLower(
            f"has the equation {equation!r}, with an ellipsis for the kernel: name its axes"
        )
    rest = "0123456789"[: rank - len(given.replace("...", ""))]  # The axes that are not named.
    given, output = (list(part.replace("...", rest)) for part in (given, output))
    if len(given) != rank:
        raise CannotLower(f"has the equation {equation!r}, but its input has {rank} axes")
    return given, list(kernel), output


def _is_of(bias: keras.Variable, output: Sequence[str], made: Iterable[str], size: int) -> bool:
    """Return whether a bias varies along exactly the axes that a product makes."""
    axes = output[len(output) - len(bias.shape) :] if len(bias.shape) <= len(output) else []
    varies = [a for a, n in zip(axes, bias.shape, strict=False) if n != 1]
    return math.prod(bias.shape) == size and set(varies) <= set(made)


def _plus(b: PlanBuilder, y: Symbol, bias: keras.Variable) -> Symbol:
    """Add a bias that varies along other axes than those that the product made."""
    array = np.asarray(bias.value).astype(b.dtype)
    if array.ndim > len(y.shape):
        array = array.reshape(array.shape[array.ndim - len(y.shape) :])
    return b.affine(y, 1, array)
