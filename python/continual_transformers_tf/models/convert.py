"""`ct.convert`, which makes a Keras model stream."""

import inspect
from typing import Any

import keras

from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.models.own_calls import (
    OWN_CALL,
    check_streaming_model,
    own_calls_within,
)
from continual_transformers_tf.models.positions import Recycled, tables_within
from continual_transformers_tf.models.problem import CannotStream, Problem
from continual_transformers_tf.models.row_wise import name_of_op
from continual_transformers_tf.models.streaming_model import StreamingModel

KINDS = ("single_output", "retroactive")


def convert(
    model: keras.Model,
    seq_len: int,
    *,
    kind: str = "single_output",
    positions: str | None = None,
    **options: Any,
) -> StreamingModel:
    """Return a copy of a Keras model that also answers at every step of a stream.

    Every `keras.layers.MultiHeadAttention` becomes a `CoSiMultiHeadAttention` with a window of
    `seq_len` steps, and continual layers in the model get that window too. Regular calls give the
    same outputs as before. A step gives the output of a regular call for the newest step of the
    window (see `StreamingModel`).

    Args:
        model: A functional or built sequential `keras.Model`. Models inside it must be of these
            kinds too. It is not changed.
        seq_len: N, the window: how many of the newest steps a step's query attends to.
        kind: What plain attention becomes. "single_output": `CoSiMultiHeadAttention`, whose cost
            grows with N only by its attention. "retroactive": the first attention becomes a
            `CoReMultiHeadAttention`, which gives all rows of the window at every step, and
            everything above it runs on whole windows. This is exact for attention on attention, at
            any depth.
        positions: What becomes of a table of positions: a part of the model that adds row i of a
            table to step i of a window. None: it is refused, because it cannot stream exactly.
            "recycle": a `CircularPositionalEncoding` with the table's rows takes its place. Regular
            calls stay as they were. A stream goes on with the next row where a window begins at the
            first, so fine-tune the model, which then meets every row at every place. It should have
            at least N rows; the paper takes 2 N - 1.
        **options: `warm_up`, `call_mode` and `name` of the `StreamingModel`, and `cache_dtype` of
            its attention. If the model is a `StreamingModel` already, options that are left out
            stay as they were.

    Returns:
        A `StreamingModel`. Its weights are copies.

    Raises:
        ValueError: If something in the model cannot be converted or run on steps. The message gives
            the reason for every layer in the way.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected kind to be one of {KINDS}, but got {kind!r}")
    if positions not in (None, "recycle"):
        raise ValueError(f"Expected positions to be None or 'recycle', but got {positions!r}")
    attention: dict[str, Any] = {"seq_len": seq_len}
    if options.get("cache_dtype") is not None:
        attention["cache_dtype"] = options["cache_dtype"]
    options.pop("cache_dtype", None)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model, but got {model!r}. To convert a single layer, call "
            "CoSiMultiHeadAttention.from_regular"
        )
    unknown = sorted(set(options) - {"warm_up", "call_mode", "name", "dtype", "trainable"})
    if unknown:
        raise ValueError(
            "Expected only kind, positions, warm_up, call_mode, name and cache_dtype, but got "
            f"{' and '.join(unknown)}. CoSiMultiHeadAttention.from_regular(layer, seq_len, ...) "
            "takes every option of a single layer"
        )
    options = {"name": model.name, **options}
    if isinstance(model, StreamingModel):
        check_streaming_model(model)
        options = {"warm_up": model.warm_up, "call_mode": model.call_mode, **options}
        model = model.model
    if not model.built:
        raise ValueError(
            f"Expected a built model, but {model.name} has never been called: call it once"
        )
    copy, problems = convert_layers(model, attention, kind=kind, positions=positions)
    if problems:
        raise CannotStream(problems, f"{model.name} cannot be converted")
    return StreamingModel(copy, **options)


def convert_layers(
    model: keras.Model,
    attention: dict[str, Any],
    also_continual: bool = True,
    kind: str = "single_output",
    positions: str | None = None,
) -> tuple[keras.Model, list[Problem]]:
    """Return a copy of a model with continual attention, and the problems that were found.

    Args:
        model: A built model. A model that is neither functional nor sequential is returned as it
            is.
        attention: A dict of options of the attention: seq_len, and perhaps cache_dtype.
        also_continual: Whether continual layers in the model get these options too.
        kind, positions: As in `convert`.

    Returns:
        (the copy, a list of `Problem`). If there are no problems, the copy has the model's weights.
    """
    problems: list[Problem] = []
    above = _above_attention(model) if kind == "retroactive" else set()
    tables = {} if positions is None else tables_within(model)
    copies: list[tuple[Any, Any]] = []  # Layers and operations with their copies.

    def convert_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        copies.append((layer, convert_one(layer)))
        return copies[-1][1]

    def convert_one(layer: keras.layers.Layer) -> keras.layers.Layer:
        try:
            if isinstance(layer, StreamingModel):
                return convert(layer, **attention) if also_continual else _copy(layer)
            if isinstance(layer, CoResidual) and also_continual:
                within = keras.saving.serialize_keras_object(convert_layer(layer.layer))
                return CoResidual.from_config({**layer.get_config(), "layer": within})
            if isinstance(layer, ContinualLayer):
                return _with_options(layer, attention if also_continual else {})
            if isinstance(layer, keras.layers.MultiHeadAttention) and id(layer) in above:
                return _copy(layer)
            if isinstance(layer, keras.layers.MultiHeadAttention) and kind == "retroactive":
                return CoReMultiHeadAttention.from_regular(layer, **attention)
            if isinstance(layer, keras.layers.MultiHeadAttention):
                return CoSiMultiHeadAttention.from_regular(layer, single_output=False, **attention)
        except CannotStream as error:
            problems.extend(error.problems)
        except ValueError as error:
            problems.append(Problem(f"cannot be converted: {error}", layer))
        if isinstance(layer, keras.layers.GroupQueryAttention):
            problems.append(
                Problem(
                    "has no continual counterpart here: use keras.layers.MultiHeadAttention", layer
                )
            )
        return _copy(layer)

    if not isinstance(model, keras.Sequential) and not hasattr(model, "_nodes_by_depth"):
        return model, problems  # It has no graph; StreamingModel reports that.
    if tables and isinstance(model, keras.Sequential):
        model = model._functional  # Keras calls the layers of a sequential model itself.
    recycled = Recycled(convert_layer)

    def call(copied: Any, *args: Any, **kwargs: Any) -> Any:
        op = next(op for op, copy in copies if copy is copied)
        if id(op) in tables:
            return recycled.call(op, tables[id(op)], *args, **kwargs)
        return copied(*args, **kwargs)

    copy = keras.models.clone_model(
        model,
        clone_function=convert_layer,
        recursive=True,
        call_function=call if tables else None,
    )
    # Keras copies some subclasses of models as the plain model.
    lost = own_calls_within(model)
    for of_copy in own_calls_within(copy):
        lost.remove(next(x for x in lost if type(x) is type(of_copy)))
    problems += [Problem(OWN_CALL, x) for x in lost]
    if problems:
        return copy, problems
    if not tables:
        copy.set_weights(model.get_weights())
        return copy, problems
    recycled.assign_rows()
    for layer, copied in copies:
        if isinstance(layer, keras.layers.Layer) and copied.built and id(layer) not in tables:
            copied.set_weights(layer.get_weights())
    return copy, problems


def _sees_other_steps(op: keras.Operation) -> bool:
    """Return whether an operation is attention, or a continual layer with a state like it."""
    if isinstance(op, ContinualLayer):
        return op.receptive_field > 1
    return isinstance(op, keras.layers.MultiHeadAttention)


def _above_attention(model: keras.Model) -> set[int]:
    """Return the ids of the attention layers that attend to what other attention gave."""
    above: set[int] = set()

    def follow(model: keras.Model, given: list[bool]) -> list[bool]:
        """Return which outputs of a model depend on attention, given which inputs do."""
        graph = model._functional if isinstance(model, keras.Sequential) else model
        depends = dict(zip(map(id, graph.inputs), given, strict=True))
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                op = node.operation
                inputs = [depends[id(x)] for x in node.input_tensors if id(x) in depends]
                outputs = [any(inputs)] * len(node.outputs)
                if isinstance(op, keras.Model) and hasattr(op, "inputs") and op.inputs:
                    outputs = follow(op, inputs[: len(op.inputs)])
                elif _sees_other_steps(op):
                    if any(inputs):
                        above.add(id(op))
                    outputs = [True] * len(node.outputs)
                depends.update(zip(map(id, node.outputs), outputs, strict=True))
        return [depends[id(x)] for x in graph.outputs]

    if isinstance(model, keras.Sequential) or hasattr(model, "_nodes_by_depth"):
        graph = model._functional if isinstance(model, keras.Sequential) else model
        follow(model, [False] * len(graph.inputs))
    return above


def _copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    if type(layer) is keras.layers.Lambda:
        # Keras makes no copy of a Python lambda from a config, which may come from a file.
        return keras.layers.Lambda(
            layer.function,
            layer._output_shape,
            layer.mask,
            layer.arguments,
            **keras.layers.Layer.get_config(layer),
        )
    try:
        config = layer.get_config()
        if "activation" in config and inspect.isfunction(layer.activation):
            config["activation"] = layer.activation  # Keras finds only registered ones by name.
        return layer.__class__.from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        if name_of_op(layer) is not None:
            return layer  # It has no weights.
        why = "cannot be copied. Give it a get_config that returns the arguments of its constructor"
        raise CannotStream([Problem(why, layer)]) from error


def _with_options(layer: keras.layers.Layer, options: dict[str, Any]) -> keras.layers.Layer:
    """Return a copy of a continual layer, with these options if the layer has a window."""
    config = layer.get_config()
    if "seq_len" in config:
        if not set(options) <= set(config):
            raise ValueError("it takes no cache_dtype: leave it out")
        config |= options
    return layer.__class__.from_config(config)
