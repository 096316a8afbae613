"""Comparisons, conditions and masks of keras.ops as nodes of a plan."""

import keras
import numpy as np

from continual_transformers_tf.models.lowering.keras_ops import (
    Call,
    arithmetic,
    cast,
    floats,
    op,
)
from continual_transformers_tf.models.lowering.plan_builder import (
    Array,
    CannotLower,
    PlanBuilder,
    Symbol,
    broadcast_shapes,
)

# The function of a plan, and whether it takes the operands in the other order.
_COMPARISONS = {
    "Equal": ("equal", False),
    "Greater": ("greater", False),
    "GreaterEqual": ("greater_equal", False),
    "Less": ("greater", True),
    "LessEqual": ("greater_equal", True),
    "NotEqual": ("not_equal", False),
}


@op(*_COMPARISONS)
def _compare(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x, y = call.operand(0, "x1", b), call.operand(1, "x2", b)
    for one, other in ((x, y), (y, x)):
        _check_exact(b, one, other)
    function, swapped = _COMPARISONS[type(op).__name__]
    return _is(b, function, *((y, x) if swapped else (x, y)))


def _check_exact(b: PlanBuilder, x: Symbol | Array, y: Symbol | Array) -> None:
    """Raise CannotLower if x has integers that floats cannot tell from those of y."""
    if not isinstance(x, Symbol) or x.dtype not in ("int32", "int64"):
        return
    most = 2 ** (24 if b.dtype == "float32" else 53)  # All whole numbers up to here are floats.
    if isinstance(y, Symbol) or not (np.abs(y) < most).all():
        raise CannotLower(
            "compares integers with each other, or with a large one: a plan compares floats, which "
            "are not exact"
        )


def _is(b: PlanBuilder, function: str, x: Symbol | Array, y: Symbol | Array) -> Symbol:
    return b.cast(arithmetic(b, function, floating(b, x), floating(b, y)), "bool")


def floating(b: PlanBuilder, x: Symbol | Array) -> Symbol | Array:
    """Return a Symbol as floats, and an array as it is."""
    return b.cast(x, b.dtype) if isinstance(x, Symbol) else x


def is_nan(b: PlanBuilder, x: Symbol) -> Symbol:
    """Return where x is NaN: only NaN differs from itself."""
    return b.cast(b.binary("not_equal", x, x), "bool")


@op("Isnan")
def _isnan(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    return is_nan(b, call.symbols[0])


@op("Isinf", "Isposinf", "Isneginf", "Isfinite")
def _isinf(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    name, x = type(op).__name__, b.cast(call.symbols[0], b.dtype)
    infinity = np.asarray(-np.inf if name == "Isneginf" else np.inf)
    if name in ("Isinf", "Isfinite"):
        x = b.activation(x, "absolute")
    return _is(b, "greater", infinity, x) if name == "Isfinite" else _is(b, "equal", x, infinity)


@op("Isclose")
def _isclose(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if op.equal_nan:
        raise CannotLower("has equal_nan=True: leave it out")
    x, y = (floating(b, call.operand(i, f"x{i + 1}", b)) for i in (0, 1))
    near, least = float(call.argument(2, "rtol", 1e-5)), float(call.argument(3, "atol", 1e-8))
    distance = b.activation(arithmetic(b, "subtract", x, y), "absolute")
    size = b.activation(y, "absolute") if isinstance(y, Symbol) else np.abs(y)
    bound = b.affine(size, near, least) if isinstance(size, Symbol) else size * near + least
    return b.logical(
        "maximum", _is(b, "greater_equal", bound, distance), _is(b, "equal", x, y)
    )  # Equal infinities are close.


@op("LogicalAnd", "LogicalOr", "LogicalXor")
def _logical(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    functions = {"LogicalAnd": "minimum", "LogicalOr": "maximum", "LogicalXor": "not_equal"}
    x, y = (_condition(b, call.operand(i, f"x{i + 1}", b)) for i in (0, 1))
    return b.logical(functions[type(op).__name__], x, y)


def _condition(b: PlanBuilder, x: Symbol | Array) -> Symbol:
    return b.cast(x if isinstance(x, Symbol) else b.constant(x), "bool")


@op("LogicalNot")
def _logical_not(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    return b.mask_not(b.cast(call.symbols[0], "bool"))


@op("Any", "All")
def _any(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    function = "max" if type(op).__name__ == "Any" else "min"
    return b.cast(b.reduce(b.cast(x, "bool"), function, call.axes(op.axis, x), op.keepdims), "bool")


@op("CountNonzero")
def _count_nonzero(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    x = call.symbols[0]
    return cast(b, b.reduce(b.cast(x, "bool"), "sum", call.axes(op.axis, x)), call.dtype)


# Selections.


def select(b: PlanBuilder, condition: Symbol, x: Symbol | Array, y: Symbol | Array) -> Symbol:
    """Return x where a condition is true, y elsewhere, all broadcast to each other."""
    operands = [z if isinstance(z, Symbol) else np.asarray(z) for z in (x, y)]
    shape = broadcast_shapes(condition.shape, *(z.shape for z in operands))
    x, y = (
        b.broadcast(b.cast(z, b.dtype), shape)
        if isinstance(z, Symbol)
        else b.constant(np.broadcast_to(z, shape))
        for z in operands
    )
    condition = b.broadcast(b.cast(condition, "bool"), shape)
    return b.node("where", [condition, x, y], shape, name="where")


def select_rows(b: PlanBuilder, mask: Symbol, x: Symbol, y: Symbol | Array) -> Symbol:
    """Return x where a mask is true, y elsewhere. It selects, so a NaN does not spread.

    The mask is `[1]`; or `[rows]`, for x `[rows, ...]`.
    """
    shape = (*mask.shape, *[1] * len(x.shape))[: len(x.shape)]
    return select(b, b.reshape(mask, shape), x, y)


@op("Where")
def _where(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    if call.argument(1, "x1") is None:
        raise CannotLower("returns the places of what is true, whose number no step knows")
    floats(call)
    condition, x, y = (call.operand(i, name, b) for i, name in enumerate(("condition", "x1", "x2")))
    return select(b, _condition(b, condition), x, y)


@op("Select")
def _select(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    conditions, choices = call.argument(0, "condlist"), call.argument(1, "choicelist")
    result: Symbol | Array = call.operand(2, "default", b) if len(call.args) > 2 else np.zeros(())
    for condition, choice in reversed(list(zip(conditions, choices, strict=True))):
        result = select(b, _condition(b, condition), choice, result)
    assert isinstance(result, Symbol)
    return result


@op("Heaviside")
def _heaviside(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x, at_zero = call.operand(0, "x1", b), call.operand(1, "x2", b)
    if not isinstance(x, Symbol):
        x = b.constant(x)
    # As Keras: NaN is neither smaller nor greater than 0.
    greater = select(b, _is(b, "greater", x, np.zeros(())), np.ones(()), at_zero)
    return select(b, _is(b, "greater", np.zeros(()), x), np.zeros(()), greater)


@op("DivideNoNan")
def _divide_no_nan(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x, y = call.operand(0, "x1", b), call.operand(1, "x2", b)
    if not isinstance(y, Symbol):
        y = b.constant(y)
    zero = _is(b, "equal", y, np.zeros(()))
    return select(b, zero, np.zeros(()), arithmetic(b, "divide", x, y))


@op("Fmax", "Fmin")
def _but_nan(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x, y = (
        z if isinstance(z, Symbol) else b.constant(z)
        for z in (call.operand(0, "x1", b), call.operand(1, "x2", b))
    )
    function = "maximum" if type(op).__name__ == "Fmax" else "minimum"
    of_both = b.binary(function, x, y)
    return select(b, is_nan(b, x), y, select(b, is_nan(b, y), x, of_both))


@op("NanToNum")
def _nan_to_num(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = call.symbols[0]
    limits = np.finfo(b.dtype)
    y = select(b, is_nan(b, x), np.asarray(op.nan), x)
    for infinity, given, limit in (
        (np.inf, op.posinf, limits.max),
        (-np.inf, op.neginf, limits.min),
    ):
        there = _is(b, "equal", x, np.asarray(infinity))
        y = select(b, there, np.asarray(limit if given is None else given), y)
    return y


# Reductions that leave NaN out: its place in a sum, and so on.
_WITHOUT_NAN = {
    "Nansum": ("sum", 0.0),
    "Nanmean": ("sum", 0.0),
    "Nanprod": ("product", 1.0),
    "Nanmax": ("max", -np.inf),
    "Nanmin": ("min", np.inf),
}


@op(*_WITHOUT_NAN)
def _without_nan(b: PlanBuilder, op: keras.Operation, call: Call) -> Symbol:
    floats(call)
    x = call.symbols[0]
    name, axes, keepdims = type(op).__name__, call.axes(op.axis, x), op.keepdims
    function, instead = _WITHOUT_NAN[name]
    nan = is_nan(b, x)
    y = b.reduce(select(b, nan, np.asarray(instead), x), function, axes, keepdims)
    if name == "Nanmean":
        return b.binary("divide", y, b.reduce(b.mask_not(nan), "sum", axes, keepdims))
    if name in ("Nanmax", "Nanmin"):
        only_nan = b.cast(b.reduce(nan, "min", axes, keepdims), "bool")
        return select(b, only_nan, np.asarray(np.nan), y)
    return y
