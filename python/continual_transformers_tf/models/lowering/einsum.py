"""Einsum products: with a fixed tensor, lowered to dense nodes; of two values, to their sums."""

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.models.lowering.plan_builder import (
    Array,
    CannotLower,
    PlanBuilder,
    Symbol,
    contiguous_strides,
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


def einsum_of_several(
    b: PlanBuilder, equation: str, operands: Sequence[Any], lead: int, name: str
) -> Symbol:
    """Lower `keras.ops.einsum(equation, *operands)` for a step.

    Args:
        b: The `PlanBuilder`.
        equation: For example "abij,abjk->abik"; it may have ellipses.
        operands: At least one Symbol, and any fixed tensors.
        lead: How many axes Keras' operands have before those of a Symbol.
        name: The name of a fixed tensor that is not a variable.
    """
    parts, output = _letters_of_each(equation, operands, lead)
    sizes: dict[str, int] = {}
    for part, x in zip(parts, operands, strict=True):
        for letter, n in zip(part, x.shape, strict=True):
            sizes[letter] = max(n, sizes.get(letter, 1))
    if any(letter not in sizes for letter in output):
        raise CannotLower(f"has the equation {equation!r}, with an axis that only its output has")
    terms = [
        _term(b, x, part, sizes) if isinstance(x, Symbol) else (x, part)
        for x, part in zip(operands, parts, strict=True)
    ]
    terms.sort(key=lambda term: not isinstance(term[0], Symbol))  # Symbols first.
    (x, given), *others = terms
    for i, (y, second) in enumerate(others, 1):
        needed = {*output, *(letter for _, part in terms[i + 1 :] for letter in part)}
        kept = [a for a in dict.fromkeys([*given, *second]) if a in needed]
        kept = output if i == len(others) else kept
        if isinstance(y, Symbol):
            x = product(b, x, given, y, second, kept)
        else:
            x = einsum(b, f"{''.join(given)},{''.join(second)}->{''.join(kept)}", x, y, 0, name)
        given = kept
    x, given = _summed(b, x, given, output)
    return b.transpose(x, [given.index(a) for a in output]).with_mask(None)


def _letters_of_each(
    equation: str, operands: Sequence[Any], lead: int
) -> tuple[list[list[str]], list[str]]:
    """Return the letters of each operand and of the output, without the first ones of a Symbol."""
    given, arrow, rest = equation.replace(" ", "").partition("->")
    texts = given.split(",")
    if not arrow or len(texts) != len(operands):
        raise CannotLower(
            f"has the equation {equation!r}: expected {len(operands)} operands and an output"
        )
    ranks = [len(x.shape) + (lead if isinstance(x, Symbol) else 0) for x in operands]
    unnamed = [r - len(t.replace("...", "")) for r, t in zip(ranks, texts, strict=True)]
    names = "0123456789"[: max(0, *unnamed)]  # The axes of an ellipsis, aligned at the last.
    parts = [
        list(t.replace("...", names[len(names) - max(0, n) :]))
        for t, n in zip(texts, unnamed, strict=True)
    ]
    output = list(rest.replace("...", names))
    steps = output[:lead]
    for i, (part, rank, x) in enumerate(zip(parts, ranks, operands, strict=True)):
        if len(part) != rank:
            raise CannotLower(f"has the equation {equation!r}, but an operand of {rank} axes")
        own = part[lead:] if isinstance(x, Symbol) else part
        if set(steps) & set(own) or (isinstance(x, Symbol) and part[:lead] != steps):
            raise CannotLower(f"has the equation {equation!r}, which mixes samples, or steps")
        parts[i] = own
    return parts, output[lead:]


def _term(
    b: PlanBuilder, x: Symbol, part: Sequence[str], sizes: Mapping[str, int]
) -> tuple[Symbol, list[str]]:
    """Return x with each letter once, and without axes of size 1 that are broadcast."""
    strides: dict[str, int] = {}
    for letter, n, stride in zip(part, x.shape, contiguous_strides(x.shape), strict=True):
        if n == sizes[letter]:
            strides[letter] = strides.get(letter, 0) + stride
    kept = list(strides)
    return _view(b, b.cast(x, b.dtype), [sizes[a] for a in kept], list(strides.values())), kept


def _view(b: PlanBuilder, x: Symbol, shape: Sequence[int], strides: Sequence[int]) -> Symbol:
    """Return elements of x; a reshape, if they are all of them in their order."""
    varies = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1]
    same = [s for _, s in varies] == contiguous_strides([n for n, _ in varies])
    if same and math.prod(shape) == x.size:
        return b.reshape(x, shape)
    return b.strided(x, shape, strides)


def _summed(
    b: PlanBuilder, x: Symbol, part: Sequence[str], needed: Collection[str]
) -> tuple[Symbol, list[str]]:
    """Return x, summed over the axes that nothing needs, and the letters of the others."""
    alone = [i for i, a in enumerate(part) if a not in needed]
    return b.reduce(x, "sum", alone) if alone else x, [a for a in part if a in needed]


def product(
    b: PlanBuilder,
    x: Symbol,
    first: Sequence[str],
    y: Symbol,
    second: Sequence[str],
    output: Sequence[str],
) -> Symbol:
    """Lower an einsum of two Symbols to a product of matrices, or of elements.

    Args:
        b: The `PlanBuilder`.
        x, y: Symbols.
        first, second, output: The letters of their axes, and of those of the result. No operand
            has a letter twice.
    """
    x, first = _summed(b, x, first, {*second, *output})
    y, second = _summed(b, y, second, {*first, *output})
    sizes = dict(zip(first, x.shape, strict=True)) | dict(zip(second, y.shape, strict=True))
    contracted = [a for a in first if a not in output]
    if not contracted:
        return b.binary("multiply", _in_order(b, x, first, output), _in_order(b, y, second, output))
    batched = [a for a in output if a in first and a in second]
    rows = [a for a in output if a not in second]
    columns = [a for a in output if a not in first]

    def size(axes: Iterable[str]) -> int:
        return math.prod(sizes[a] for a in axes)

    x = _in_order(b, x, first, [*batched, *rows, *contracted])
    y = _in_order(b, y, second, [*batched, *contracted, *columns])
    x = b.reshape(x, (size(batched), size(rows), size(contracted)))
    y = b.reshape(y, (size(batched), size(contracted), size(columns)))
    z = b.node("matmul", [x, y], (size(batched), size(rows), size(columns)), name="matmul")
    order = [*batched, *rows, *columns]
    z = b.reshape(z, [sizes[a] for a in order])
    return b.transpose(z, [order.index(a) for a in output])


def _in_order(b: PlanBuilder, x: Symbol, part: Sequence[str], order: Sequence[str]) -> Symbol:
    """Return x with its axes in an order. Axes that it does not have get the size 1."""
    x = b.transpose(x, [part.index(a) for a in order if a in part])
    sizes = iter(x.shape)
    return b.reshape(x, [next(sizes) if a in part else 1 for a in order])


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
