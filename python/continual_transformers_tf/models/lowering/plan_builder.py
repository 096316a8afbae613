"""A builder of plans: values, nodes and weights, as `docs/model_file.md` defines them."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A value of the plan, with its Keras mask while a model is lowered.

    Its shape is that of one step of one stream, without the axes of streams and steps.
    """

    index: int  # Its place in the plan's values.
    shape: tuple[int, ...]
    dtype: str
    # Keras' mask of the step, a Symbol of dtype bool and shape [1], or [rows] of several rows; None
    # if there is none.
    mask: "Symbol | None" = None

    @property
    def size(self) -> int:
        """How many elements a step has."""
        return math.prod(self.shape)

    def with_mask(self, mask: "Symbol | None") -> "Symbol":
        """Return the same value with another mask."""
        return dataclasses.replace(self, mask=mask)


class CannotLower(Exception):
    """The error for a part of a layer that has no node. Its message continues "the layer ..."."""


class PlanBuilder:
    """A plan under construction.

    Args:
        compute_dtype: "float32" or "float64".

    Attributes:
        dtype: The compute dtype.
        scope: The beginning of new nodes' names; it changes from layer to layer.
        weights: The plan's tensors by name.
    """

    def __init__(self, compute_dtype: str) -> None:
        self.dtype = compute_dtype
        self.scope = ""
        self.values: list[dict[str, Any]] = []
        self.nodes: list[dict[str, Any]] = []
        self.weights: dict[str, Array] = {}
        self.kernels: set[str] = set()  # Names of the weights that are kernels of dense nodes.
        self._names: dict[
            str, int
        ] = {}  # Name of each node -> how many other nodes have asked for that name.
        # What was stored -> (its name, the variable, which must stay alive for its id).
        self._tensors: dict[tuple[Any, ...], tuple[str, Any]] = {}
        self._masks: dict[tuple[int, float], Symbol] = {}  # (index of a value, number) -> the mask.
        # (The turns of a step, how many rows it has) -> their angles.
        self._angles: dict[tuple[bytes, int], Symbol] = {}
        # Index of a value that was only scaled -> (scaled Symbol, scale).
        self._affine_of: dict[int, tuple[Symbol, Array]] = {}
        # Index of a reshaped value -> the Symbol that was reshaped.
        self._unshaped: dict[int, Symbol] = {}

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Add a name to the scope within a `with` block."""
        outer = self.scope
        self.scope = f"{outer}/{name}" if outer else name
        try:
            yield
        finally:
            self.scope = outer

    # Values and nodes.

    def add_value(self, shape: Iterable[int], dtype: str | None = None) -> Symbol:
        """Add a value to the plan, and return its Symbol. dtype None: the compute dtype."""
        self.values.append({"shape": [int(n) for n in shape], "dtype": dtype or self.dtype})
        return Symbol(len(self.values) - 1, tuple(int(n) for n in shape), dtype or self.dtype)

    def node(
        self,
        op: str,
        inputs: Iterable[Symbol],
        shape: Iterable[int],
        dtype: str | None = None,
        *,
        name: str | None = None,
        weights: dict[str, str] | None = None,
        masks: Mapping[str, Symbol | None] | None = None,
        **attributes: Any,
    ) -> Symbol:
        """Add a node, and return the Symbol of its output.

        Args:
            op: The op's name.
            inputs: Symbols.
            shape, dtype: Of the output; None: the compute dtype.
            name: The node's name within the scope; None: the scope's own name.
            weights: A dict from names in the node to names of tensors.
            masks: A dict of Symbols; those that are None are left out.
            **attributes: The node's attributes.
        """
        output = self.add_value(shape, dtype)
        node: dict[str, Any] = {
            "op": op,
            "name": self._unique(name, op),
            "inputs": [x.index for x in inputs],
            "outputs": [output.index],
        }
        given = {key: x.index for key, x in (masks or {}).items() if x is not None}
        if given:
            node["masks"] = given
        attributes = {key: _plain(x) for key, x in attributes.items()}
        self.nodes.append({**node, "weights": weights or {}, "attributes": attributes})
        return output

    def _unique(self, name: str | None, op: str) -> str:
        name = "/".join(part for part in (self.scope, name) if part) or op
        unique = name
        while unique in self._names:
            self._names[name] += 1
            unique = f"{name}_{self._names[name]}"
        self._names[unique] = 0
        return unique

    # Weights.

    def variable(
        self,
        variable: keras.Variable | keras.KerasTensor,
        shape: tuple[int, ...] | None = None,
        transform: Callable[[Array], Array] | None = None,
        kernel: bool = False,
        name: str | None = None,
    ) -> str:
        """Store a Keras variable, and return its tensor's name: the variable's path.

        Args:
            variable: A `keras.Variable`, or a tensor that Keras derives from one.
            shape: The shape to store it in; None: its own.
            transform: A function of its array; its result is stored instead. None: the array.
            kernel: Whether it is the kernel of a dense node.
            name: The tensor's name if `variable` is not a variable and has no path.
        """
        path = getattr(variable, "path", None) or name or self.scope
        array = to_numpy(variable, self.dtype)
        array = array if transform is None else transform(array)
        array = array if shape is None else array.reshape(shape)
        key = (id(variable), array.shape, transform is not None, kernel)
        if transform is None and key in self._tensors:
            return self._tensors[key][0]
        name = self.constant_weight(path, array)
        self._tensors[key] = (name, variable)
        if kernel:
            self.kernels.add(name)
        return name

    def constant_weight(self, name: str, array: npt.ArrayLike, dtype: str | None = None) -> str:
        """Store an array under a name that is unique, and return that name."""
        shape = np.shape(array)  # NumPy makes a vector of a contiguous scalar.
        unique, count = name, 0
        while unique in self.weights:
            count += 1
            unique = f"{name}_{count}"
        array = np.ascontiguousarray(array, dtype or self.dtype)
        self.weights[unique] = array.reshape(shape)
        return unique

    def derived(self, name: str, array: npt.ArrayLike, dtype: str | None = None) -> str:
        """Store an array that the lowering computed, named within the scope."""
        return self.constant_weight(f"{self.scope}/{name}" if self.scope else name, array, dtype)

    # Basic nodes.

    def reshape(self, x: Symbol, shape: Iterable[int]) -> Symbol:
        """Give a Symbol another shape. Chains of reshapes become one node, or none."""
        shape = tuple(int(n) for n in shape)
        if math.prod(shape) != x.size:
            raise CannotLower(f"reshapes {list(x.shape)} to {list(shape)}")
        if shape == x.shape:
            return x
        source = self._unshaped.get(x.index, x)
        if source.shape == shape:
            return source.with_mask(x.mask)
        y = self.node("reshape", [source], shape, source.dtype)
        self._unshaped[y.index] = source.with_mask(None)
        return y.with_mask(x.mask)

    def strided(
        self,
        x: Symbol,
        shape: Iterable[int],
        strides: Iterable[int],
        offset: int = 0,
        name: str | None = None,
    ) -> Symbol:
        """Pick elements with the node `strided`."""
        return self.node(
            "strided", [x], shape, x.dtype, name=name,
            offset=int(offset), strides=[int(s) for s in strides],
        )  # fmt: skip

    def transpose(self, x: Symbol, axes: Sequence[int]) -> Symbol:
        """Transpose a Symbol. If only axes of size 1 move, this is a reshape."""
        shape = tuple(x.shape[a] for a in axes)
        moved = [a for a in axes if x.shape[a] != 1]
        if moved == sorted(moved):
            return self.reshape(x, shape)
        strides = contiguous_strides(x.shape)
        return self.strided(x, shape, [strides[a] for a in axes], name="transpose")

    def slice(self, x: Symbol, axis: int, start: int, size: int, step: int = 1) -> Symbol:
        """Take `size` elements along one axis, from `start` on."""
        if start == 0 and size == x.shape[axis] and step == 1:
            return x
        strides = contiguous_strides(x.shape)
        offset = start * strides[axis]
        strides[axis] *= step
        return self.strided(
            x, (*x.shape[:axis], size, *x.shape[axis + 1 :]), strides, offset, name="slice"
        )

    def concat(self, xs: Sequence[Symbol], axis: int) -> Symbol:
        """Concatenate Symbols along one axis."""
        if len(xs) == 1:
            return xs[0]
        shape = list(xs[0].shape)
        shape[axis] = sum(x.shape[axis] for x in xs)
        return self.node("concat", xs, shape, xs[0].dtype, name="concat", axis=axis)

    def broadcast(self, x: Symbol, shape: Iterable[int]) -> Symbol:
        """Broadcast a Symbol to a shape, as NumPy does."""
        shape = tuple(shape)
        if x.shape == shape:
            return x
        lead = len(shape) - len(x.shape)
        if lead < 0 or any(a not in (1, b) for a, b in zip(x.shape, shape[lead:], strict=True)):
            raise CannotLower(f"broadcasts {list(x.shape)} to {list(shape)}")
        if math.prod(shape) == x.size:
            return self.reshape(x, shape)
        strides = [
            0 if a == 1 else s for a, s in zip(x.shape, contiguous_strides(x.shape), strict=True)
        ]
        return self.strided(x, shape, [0] * lead + strides, name="broadcast")

    def constant(self, array: npt.ArrayLike, dtype: str | None = None) -> Symbol:
        """Add a node that returns a constant array."""
        array = np.asarray(array)
        weights = {"value": self.derived("value", array, dtype)}
        return self.node("constant", [], array.shape, dtype, weights=weights)

    def binary(self, function: str, x: Symbol, y: Symbol) -> Symbol:
        """Apply an element-wise function to two Symbols, broadcast to each other."""
        shape = broadcast_shapes(x.shape, y.shape)
        x, y = (self.broadcast(self.cast(z, self.dtype), shape) for z in (x, y))
        return self.node("binary", [x, y], shape, name=function, function=function)

    def activation(self, x: Symbol, function: str, **numbers: Any) -> Symbol:
        """Apply an element-wise function, with its numbers as attributes."""
        if function == "linear":
            return x
        x = self.cast(x, self.dtype)
        return self.node("activation", [x], x.shape, name=function, function=function, **numbers)

    def cast(self, x: Symbol, dtype: str) -> Symbol:
        """Cast a Symbol to another dtype. It keeps its mask."""
        if x.dtype == dtype:
            return x
        return self.node("cast", [x], x.shape, dtype).with_mask(x.mask)

    def affine(self, x: Symbol, scale: npt.ArrayLike, offset: npt.ArrayLike) -> Symbol:
        """Compute x * scale + offset, with arrays that broadcast to x."""
        x, shape = self.cast(x, self.dtype), x.shape
        # The number of last axes along which they vary. These axes are read as one.
        axes = max(1, _axes_that_vary(scale), _axes_that_vary(offset))
        channels = shape[len(shape) - axes :] if shape else (1,)
        factors, terms = _channels(scale, channels), _channels(offset, channels)
        scaled = self._affine_of.get(x.index)
        if scaled is None or len(scaled[1]) != len(factors) or (factors != 1).any():
            scaled = (x, factors)
        else:
            # x was only scaled before: scale and move the original at once, with the same result.
            x, factors = scaled
        x = self.reshape(x, (*shape[: len(shape) - axes], math.prod(channels)))
        weights = {"scale": self.derived("scale", factors), "offset": self.derived("offset", terms)}
        y = self.reshape(self.node("affine", [x], x.shape, weights=weights), shape)
        if (terms == 0).all():
            self._affine_of[y.index] = scaled
        return y

    def dense(
        self, x: Symbol, kernel: str, bias: str | None = None, name: str | None = None
    ) -> Symbol:
        """Multiply x [..., I] by a kernel [I, O]; kernel and bias are names of tensors."""
        inputs, outputs = self.weights[kernel].shape
        if x.shape[-1:] != (inputs,):
            raise CannotLower(f"is given shape {list(x.shape)}, but its kernel has {inputs} inputs")
        weights = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
        return self.node("dense", [x], (*x.shape[:-1], outputs), name=name, weights=weights)

    def reduce(
        self, x: Symbol, function: str, axes: Sequence[int], keepdims: bool = False
    ) -> Symbol:
        """Reduce over axes, counted from 0, one after the other."""
        shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
        x = self.cast(x, self.dtype)
        # Neighbouring axes are merged into one: a mean of means would round twice.
        groups = _neighbours(axes)
        for first, last in reversed(groups):
            size = math.prod(x.shape[first : last + 1])
            x = self.reshape(x, (*x.shape[:first], size, *x.shape[last + 1 :]))
            rest = x.shape[:first] + x.shape[first + 1 :]
            x = self.node("reduce", [x], rest, name=function, function=function, axis=first)
        return self.reshape(x, shape) if keepdims else x

    def rotary_angles(self, turns: Array, rows: int = 1) -> Symbol:
        """Return the cosines and sines of a step's angles: one node for all layers.

        Args:
            turns: int64 `[pairs]`, what a step adds to each angle, in 2^-64 of a turn.
            rows: How many rows a step has, each with angles of its own.

        Returns:
            `[2, pairs]`, or with several rows `[rows, 2, pairs]`.
        """
        key = (turns.tobytes(), rows)
        if key not in self._angles:
            outer, self.scope = self.scope, ""
            weights = {"turns": self.derived("rotary_angles/turns", turns, "int64")}
            shape = (*([rows] if rows > 1 else []), 2, len(turns))
            self._angles[key] = self.node(
                "rotary_angles", [], shape, name="rotary_angles", weights=weights
            )
            self.scope = outer
        return self._angles[key]

    def is_of_input(self, x: Symbol) -> bool:
        """Return whether a value is one of the plan's inputs, perhaps in another order or shape."""
        made_by = {i: node for node in self.nodes for i in node["outputs"]}
        index = x.index
        while index in made_by:
            if made_by[index]["op"] not in ("reshape", "strided"):
                return False
            (index,) = made_by[index]["inputs"]
        return index < self.inputs

    # Masks.

    def not_equal(self, x: Symbol, value: float) -> Symbol:
        """Return a mask that is true if any element of x differs from a number."""
        key = (x.index, value)
        if key not in self._masks:
            self._masks[key] = self.node(
                "not_equal", [x], (1,), "bool", name="mask", value=value, any=True
            )
        return self._masks[key]

    def mask_and(self, a: Symbol | None, b: Symbol | None) -> Symbol | None:
        """Return a mask that is true if both are. None stands for a mask that is left out."""
        if a is None or b is None or a == b:
            return b if a is None else a
        return self.node("mask_and", [a, b], a.shape, "bool")

    def mask_not(self, a: Symbol) -> Symbol:
        """Return a mask that is true if the given one is false."""
        return self.cast(self.affine(self.cast(a, self.dtype), -1, 1), "bool")

    def mask_or(self, a: Symbol, b: Symbol) -> Symbol:
        """Return a mask that is true if either is."""
        if a == b:
            return a
        a, b = (self.cast(x, self.dtype) for x in (a, b))
        return self.cast(self.binary("add", a, b), "bool")

    def logical(self, function: str, x: Symbol, y: Symbol) -> Symbol:
        """Apply a function of two numbers, 0 or 1, to conditions, and return a condition."""
        return self.cast(self.binary(function, self.cast(x, "bool"), self.cast(y, "bool")), "bool")

    # The end.

    def finish(
        self, outputs: Iterable[Symbol]
    ) -> tuple[Callable[[int], int | None], Callable[[int], int | None]]:
        """Drop nodes that nothing uses, with their weights and values.

        Returns:
            Two functions, for nodes and for values. Each maps an old place to the new one, or to
            None if the node or value is gone.
        """
        used = {x.index for x in outputs}
        kept = set()
        for node in reversed(self.nodes):
            if used.intersection(node["outputs"]) or node["op"] in STATEFUL:
                kept.add(id(node))
                used.update(node["inputs"], node.get("masks", {}).values())
        places: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            if id(node) in kept:
                places[i] = len(places)
        self.nodes = [node for node in self.nodes if id(node) in kept]
        produced = {i for node in self.nodes for i in node["outputs"]}
        values: dict[int, int] = {}
        for i in range(len(self.values)):
            if i in produced or i < self.inputs:
                values[i] = len(values)
        self.values = [self.values[i] for i in values]
        for node in self.nodes:
            for key in ("inputs", "outputs"):
                node[key] = [values[i] for i in node[key]]
            if "masks" in node:
                node["masks"] = {name: values[i] for name, i in node["masks"].items()}
        used_weights = {name for node in self.nodes for name in node["weights"].values()}
        self.weights = {k: v for k, v in self.weights.items() if k in used_weights}
        self.kernels &= used_weights
        return places.get, values.get

    def add_inputs(self, specs: Sequence[tuple[Iterable[int], str]]) -> list[Symbol]:
        """Add the plan's inputs as its first values, each given as (shape, dtype)."""
        self.inputs = len(specs)
        return [self.add_value(shape, dtype) for shape, dtype in specs]

    def convert_kernels(self, dtype: str) -> None:
        """Convert the kernels of dense nodes to another dtype."""
        for name in self.kernels:
            self.weights[name] = self.weights[name].astype(np_dtype(dtype))


STATEFUL = {
    "positional", "delay", "window", "attention", "retroactive_attention", "recurrent",
}  # fmt: skip


def np_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype for a name. bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def to_numpy(x: Any, dtype: str) -> Array:
    """Return a Keras variable, a tensor or an array as an array of a dtype."""
    x = getattr(x, "value", x) if hasattr(x, "path") else x
    return np.asarray(x).astype(dtype)


def _plain(x: Any) -> Any:
    """Return an attribute as a JSON value: users may have given NumPy numbers."""
    x = x.item() if isinstance(x, np.generic) else x
    if isinstance(x, float) and not math.isfinite(x):
        raise CannotLower(f"has the number {x}: a plan holds only finite numbers")
    return x


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that NumPy broadcasts these shapes to."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise CannotLower(
            f"combines shapes that do not fit in a step: {', '.join(str(list(s)) for s in shapes)}"
        ) from error


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous array, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return strides[::-1]


def _channels(array: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return an array as a vector with one element for each of these channels."""
    array = np.asarray(array, np.float64)
    if array.ndim > len(shape):
        array = array.reshape(array.shape[array.ndim - len(shape) :])
    return np.broadcast_to(array, shape).reshape(-1)


def _axes_that_vary(array: npt.ArrayLike) -> int:
    """Return how many axes an array has without its leading axes of size 1."""
    shape = list(np.shape(array))
    while shape and shape[0] == 1:
        shape.pop(0)
    return len(shape)


def _neighbours(axes: Sequence[int]) -> list[list[int]]:
    """Return the runs of neighbouring axes as [first, last]."""
    groups: list[list[int]] = []
    for a in sorted(axes):
        if groups and groups[-1][1] == a - 1:
            groups[-1][1] = a
        else:
            groups.append([a, a])
    return groups
