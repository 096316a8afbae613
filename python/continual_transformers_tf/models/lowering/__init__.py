"""Lowering of a Keras model to a plan, which `ct.Session` runs."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import keras

from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.plain_layers import precise
from continual_transformers_tf.models.convert import (
    ATTENTION,
    convert_layers,
    is_converted,
    layers_of,
    needs_window,
)
from continual_transformers_tf.models.lowering.continual_layers import StateOf, lower_continual
from continual_transformers_tf.models.lowering.graph_lowering import GraphLowering
from continual_transformers_tf.models.lowering.lowered import Lowered
from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder, Symbol
from continual_transformers_tf.models.own_calls import check_streaming_model
from continual_transformers_tf.models.problem import CannotStream, Problem
from continual_transformers_tf.models.step_graph import StepGraph, names_of_inputs
from continual_transformers_tf.models.streaming_model import StreamingModel

__all__ = ["Lowered", "LoweredGraph", "continual_model", "lower", "lower_graph"]

# What else may hold cached keys and values, and dense kernels, if the compute dtype is float32.
NARROW_CACHES = ("bfloat16", "float16", "int8")
NARROW_WEIGHTS = ("bfloat16", "int8")


def lower(
    model: keras.layers.Layer,
    seq_len: int | None = None,
    cache_dtype: str | None = None,
    weights_dtype: str | None = None,
    inputs: Sequence[str] | None = None,
) -> Lowered:
    """Turn one step of a Keras model into a plan, as `docs/model_file.md` defines it.

    A step of the plan gives the outputs of a step of the `StreamingModel` (or the layer) with
    `warm_up="partial"`. Layers that compute in 16 bits are computed in float32, with their weights
    as they are. A model with a layer in float64 is computed in float64 as a whole. Layers that only
    act in training are left out.

    Args:
        model: A functional or built sequential `keras.Model`, a `StreamingModel`, or a built
            continual layer of this package. A layer whose inputs have different sizes has several
            inputs: "query", "value" and "key". Plain attention of Keras inside is
            converted as by `ct.convert`; layers that are already continual keep their window.
        seq_len: The window of plain Keras attention; None: the length of the model's windows.
        cache_dtype: The dtype of cached keys and values: the compute dtype, or if that is float32,
            also "bfloat16", "float16" or "int8". None: the layers' own if they agree, otherwise the
            compute dtype.
        weights_dtype: The dtype of dense kernels: the compute dtype, or if that is float32, also
            "bfloat16" or "int8". None: the layers' own if they agree, otherwise the compute dtype.
        inputs: The names of a layer's inputs, the first of "query", "value" and "key"; None: its
            one input, "x", or all if they have different sizes. A model names its own inputs.

    Returns:
        A `Lowered`.

    Raises:
        ValueError: If something in the model cannot be lowered: a line for every such layer, with
            the reason. Also if an argument does not fit.
    """
    if isinstance(model, keras.Model):
        return _lower_model(model, seq_len, cache_dtype, weights_dtype)
    if isinstance(model, keras.layers.Layer) and isinstance(model, ContinualLayer):
        return _lower_layer(model, cache_dtype, weights_dtype, inputs)
    if isinstance(model, ATTENTION):
        why = (
            "is neither a model nor a continual layer: "
            "ct.CoSiMultiHeadAttention.from_regular(layer, seq_len) makes a continual layer of it"
        )
        raise CannotStream([Problem(why, model)])
    raise ValueError(
        "Expected a functional or built sequential keras.Model, a StreamingModel, or a continual "
        f"layer of continual_transformers_tf, but got {model!r}"
    )


# Models.


class LoweredGraph(NamedTuple):
    """The graph of a model, lowered as far as possible.

    Attributes:
        model: The functional or sequential model whose steps become the plan: `continual_model`.
        graph: The `StepGraph` of that model.
        builder: The `PlanBuilder`, which has the nodes.
        inputs, outputs: Their `Symbol`s. The outputs are in the model's own structure.
        state: For each continual layer of the graph, its entry of keras_state.
        problems: Why the plan is not one: `Problem`s. Empty if it is.
        conversion: Those of the problems that were found when the model was converted.
    """

    model: keras.Model
    graph: StepGraph
    builder: PlanBuilder
    inputs: list[Symbol]
    outputs: Any
    state: list[Any]
    problems: list[Problem]
    conversion: list[Problem]


def lower_graph(whole: keras.Model, seq_len: int | None) -> LoweredGraph:
    """Lower the graph of a model, and collect every reason why that does not work.

    Args:
        whole, seq_len: The model and the window, as in `lower`.

    Raises:
        CannotStream: If the model has no graph.
        ValueError: If the window is not known, or the model was never called.
    """
    model = whole
    if isinstance(whole, StreamingModel):
        check_streaming_model(whole)
        model = whole.model
    if not hasattr(model, "_nodes_by_depth") and not isinstance(model, keras.Sequential):
        why = (
            "has no graph to read: expected a functional or a built sequential model. Write it as "
            "keras.Model(inputs, outputs), or make a session of each continual layer"
        )
        raise CannotStream([Problem(why, model)])
    if not model.built:
        raise ValueError(
            f"Expected a built model, but {model.name} has never been called: call it once"
        )
    model, conversion = _continual(whole, seq_len)
    graph = StepGraph(model)
    if graph.model is None:
        raise CannotStream(graph.problems, f"{model.name} cannot be run by a session")
    dtypes = [layer.compute_dtype for layer in model._flatten_layers()]
    dtypes += [x.dtype for x in (*graph.model.inputs, *graph.model.outputs)]
    b = PlanBuilder("float64" if "float64" in dtypes else "float32")
    lowering = GraphLowering(b, graph)
    inputs = b.add_inputs(
        [_input(b, x, graph.block, lowering.problems) for x in graph.model.inputs]
    )
    outputs = lowering.run(inputs)
    problems = [*conversion, *lowering.problems]
    state = [] if problems else [lowering.state[id(layer)] for layer in graph.layers]
    return LoweredGraph(model, graph, b, inputs, outputs, state, problems, conversion)


def _lower_model(
    whole: keras.Model, seq_len: int | None, cache_dtype: str | None, weights_dtype: str | None
) -> Lowered:
    lowered = lower_graph(whole, seq_len)
    if lowered.problems:
        raise CannotStream(lowered.problems, f"{whole.name} cannot be run by a session")
    graph = lowered.graph
    given = graph.model._inputs_struct
    if isinstance(given, (list, tuple)) and len(given) == 1:
        given = given[0]  # A list of one input is the same as that input.
    names = [x.name for x in graph.model.inputs]
    if names_of_inputs(graph.model) != names:
        names = ["x"] if len(names) == 1 else [f"x_{i}" for i in range(len(names))]
    return _finish(
        lowered.builder,
        list(lowered.model._flatten_layers()),
        cache_dtype,
        weights_dtype,
        name=whole.name,
        receptive_field=graph.receptive_field,
        delay=graph.delay,
        block=graph.block,
        inputs=dict(zip(names, lowered.inputs, strict=True)),
        input_structure=given,
        outputs=lowered.outputs,
        state=lowered.state,
    )


def continual_model(model: keras.Model, seq_len: int | None = None) -> keras.Model:
    """Return the functional or sequential model whose steps become the plan.

    Args:
        model, seq_len: As in `lower`.
    """
    return _continual(model, seq_len)[0]


def _continual(model: keras.Model, seq_len: int | None) -> tuple[keras.Model, list[Problem]]:
    """Return (`continual_model`, a list of problems)."""
    if isinstance(model, StreamingModel):
        return model.model, []
    layers = list(layers_of(model))
    if not any(map(is_converted, layers)):
        return model, []
    attention = {"seq_len": _window(model, seq_len) if any(map(needs_window, layers)) else None}
    return convert_layers(model, attention, also_continual=False)


def _window(model: keras.Model, seq_len: int | None) -> int:
    """Return the window of a model's plain attention."""
    if seq_len is not None:
        return seq_len
    functional = model._functional if isinstance(model, keras.Sequential) else model
    # An input of floats (B, E) has no axis of time, which the graph refuses.
    timed = [x for x in functional.inputs if len(x.shape) > 2 or "int" in x.dtype]
    lengths = {x.shape[1] for x in timed or functional.inputs if len(x.shape) > 1}
    if len(lengths) == 1 and None not in lengths:
        return lengths.pop()
    raise ValueError(
        f"Expected seq_len, the window of the attention in {model.name}: its inputs "
        f"{[tuple(x.shape) for x in functional.inputs]} have no fixed axis of time"
    )


def _input(
    b: PlanBuilder, x: keras.KerasTensor, block: int, problems: list[Problem]
) -> tuple[list[int], str]:
    """Return the shape and dtype of a step of a model's input."""
    if keras.backend.is_float_dtype(x.dtype):
        dtype = b.dtype
    elif x.dtype == "bool":
        dtype = "bool"
    elif x.dtype in ("int64", "uint32", "uint64"):
        dtype = "int64"
    elif "int" in x.dtype:
        dtype = "int32"
    else:
        problems.append(Problem(f"{x.name} (Input) is of {x.dtype}: expected numbers"))
        dtype = b.dtype
    if None in x.shape[2:]:
        problems.append(Problem(f"{x.name} (Input) has features of unknown size: {tuple(x.shape)}"))
    rows = [block] if block > 1 else []
    return rows + [1 if n is None else n for n in x.shape[2:]], dtype


# Layers.


def _lower_layer(
    layer: keras.layers.Layer,
    cache_dtype: str | None,
    weights_dtype: str | None,
    names: Sequence[str] | None,
) -> Lowered:
    if not layer.built:
        raise ValueError(
            f"Expected a built layer, but {layer.name} has never been called: call it once"
        )
    b = PlanBuilder(precise(layer.compute_dtype))
    b.scope = layer.name
    try:
        sizes = layer.input_features
        if names is None:
            names = ["x"] if len(set(sizes.values())) == 1 else list(sizes)
        within = layer
        while isinstance(within, CoResidual):
            within = within.layer
        dtype = b.dtype
        if not keras.backend.is_float_dtype(within.compute_dtype):
            dtype = within.compute_dtype
        specs = []
        for name in names:
            size = next(iter(sizes.values())) if name == "x" else sizes[name]
            if size is None:
                raise CannotLower(
                    "does not know its features, because it was never called: call it once"
                )
            specs.append((size if isinstance(size, (tuple, list)) else (size,), dtype))
        inputs = b.add_inputs(specs)
        output, state = lower_continual(b, layer, *inputs)
    except CannotLower as reason:
        raise CannotStream(
            [Problem(str(reason), layer)], f"{layer.name} cannot be run by a session"
        ) from reason
    return _finish(
        b,
        list(layer._flatten_layers()),
        cache_dtype,
        weights_dtype,
        name=layer.name,
        receptive_field=layer.receptive_field,
        delay=layer.delay,
        block=layer.block,
        inputs=dict(zip(names, inputs, strict=True)),
        input_structure=None if len(names) == 1 else {name: name for name in names},
        outputs=output,
        state=state,
    )


# The plan.


def _finish(
    b: PlanBuilder,
    layers: list[keras.layers.Layer],
    cache_dtype: str | None,
    weights_dtype: str | None,
    *,
    name: str,
    receptive_field: int,
    delay: int,
    block: int,
    inputs: Mapping[str, Symbol],
    input_structure: Any,
    outputs: Any,
    state: Any,
) -> Lowered:
    cache_dtype = _chosen(
        "cache_dtype", cache_dtype, [_cache_of(x) for x in layers], b, NARROW_CACHES
    )
    weights_dtype = _chosen(
        "weights_dtype",
        weights_dtype,
        [getattr(x, "weights_dtype", None) or b.dtype for x in layers if hasattr(x, "seq_len")],
        b,
        NARROW_WEIGHTS,
    )
    flat = keras.tree.flatten(outputs)
    node_of_value = {i: place for place, node in enumerate(b.nodes) for i in node["outputs"]}
    place_of_node, place_of_value = b.finish(flat)
    state = _entries(state, lambda value: place_of_node(node_of_value[value]))
    if weights_dtype == "bfloat16":  # Kernels in int8 are rounded when the file is loaded.
        b.convert_kernels(weights_dtype)
    plan = {
        "producer": f"continual-transformers-tf {_version()}",
        "name": name,
        "compute_dtype": b.dtype,
        "cache_dtype": cache_dtype,
        "weights_dtype": weights_dtype,
        "receptive_field": int(receptive_field),
        "delay": int(delay),
        "block": int(block),
        "values": b.values,
        "inputs": [{"name": key, "value": x.index} for key, x in inputs.items()],
        "outputs": [
            {"name": key, "value": place_of_value(x.index)}
            for key, x in zip(_output_names(outputs), flat, strict=True)
        ],
        "input_structure": _places(input_structure),
        "output_structure": _places(outputs),
        "nodes": b.nodes,
        "keras_state": state,
    }
    return Lowered(plan, b.weights)


def _cache_of(layer: keras.layers.Layer) -> str | None:
    """Return the dtype of a layer's cached keys and values; None if it has none."""
    state: Any = getattr(layer, "_stream_state", None)
    if isinstance(layer, keras.layers.MultiHeadAttention) and hasattr(state, "dtype"):
        return state.dtype.name
    return None


def _chosen(
    name: str, dtype: str | None, of_layers: list[str | None], b: PlanBuilder, narrow: Sequence[str]
) -> str:
    """Return the dtype that was asked for, or that of the layers."""
    if dtype is None:
        agreed = {x for x in of_layers if x is not None}
        own = agreed.pop() if len(agreed) == 1 else b.dtype
        return own if b.dtype == "float32" and own in narrow else b.dtype
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype == b.dtype or (b.dtype == "float32" and dtype in narrow):
        return dtype
    raise ValueError(
        f"Expected {name} to be None or the compute dtype, {b.dtype}, or under float32 "
        f"{' or '.join(map(repr, narrow))}, but got {dtype!r}"
    )


def _entries(state: Any, place: Callable[[int], int | None]) -> Any:
    """Return keras_state in its JSON form; see docs/model_file.md."""
    if isinstance(state, StateOf):
        return [place(state.value), state.entry, *state.layout]
    if isinstance(state, dict):
        return {name: _entries(x, place) for name, x in state.items()}
    if isinstance(state, list):
        return {str(i): _entries(x, place) for i, x in enumerate(state)}
    return state


def _places(structure: Any) -> Any:
    """Return the structure with each leaf replaced by its place in the list of all leaves."""
    flat = keras.tree.flatten(structure)
    places = keras.tree.pack_sequence_as(structure, list(range(len(flat))))
    return _plain(places)


def _plain(structure: Any) -> Any:
    if isinstance(structure, dict):
        return {str(name): _plain(x) for name, x in structure.items()}
    if isinstance(structure, (list, tuple)):
        return [_plain(x) for x in structure]
    return structure


def _output_names(outputs: Any) -> list[str]:
    flat = keras.tree.flatten(outputs)
    if len(flat) == 1 and not isinstance(outputs, dict):
        return ["y"]
    if isinstance(outputs, dict) and len(outputs) == len(flat):
        return [str(name) for name in keras.tree.flatten({name: name for name in outputs})]
    return [f"y_{i}" for i in range(len(flat))]


def _version() -> str:
    try:
        return metadata.version("continual-transformers-tf")
    except metadata.PackageNotFoundError:
        return "unknown"
