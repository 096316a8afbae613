"""`ct.convert`, which makes a Keras model stream."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras

from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.co_recurrent import RECURRENT, CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_temporal import GLOBAL_POOLING, TEMPORAL, CoTemporal
from continual_transformers_tf.layers.continual_layer import ContinualLayer
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.models.own_calls import (
    OWN_CALL,
    check_streaming_model,
    computes_as,
    own_calls_within,
)
from continual_transformers_tf.models.positions import Recycled, tables_within
from continual_transformers_tf.models.problem import CannotStream, Problem
from continual_transformers_tf.models.row_wise import name_of_op
from continual_transformers_tf.models.streaming_model import StreamingModel

# The layers of Keras that become continual attention.
ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
KINDS = ("single_output", "retroactive")


def convert(
    model: keras.Model,
    seq_len: int | None = None,
    *,
    kind: str = "single_output",
    positions: str | None = None,
    recurrence: str = "stream",
    **options: Any,
) -> StreamingModel:
    """Return a copy of a Keras model that also answers at every step of a stream.

    Every `keras.layers.MultiHeadAttention` and `GroupQueryAttention` becomes a
    `CoSiMultiHeadAttention` with a window of `seq_len` steps, and continual layers in the model get
    that window too. Convolutions and pooling along time become `CoTemporal` layers, recurrent
    layers `CoRecurrent` ones, and a `keras_hub.layers.RotaryEmbedding` a `ct.RotaryEmbedding`.
    Regular calls give the same outputs as before. A step gives the output of a regular call for the
    newest step of the window (see `StreamingModel`).

    Args:
        model: A functional or built sequential `keras.Model`. Models inside it must be of these
            kinds too. It is not changed.
        seq_len: N, the window: how many of the newest steps a step's query attends to, or a global
            pooling reads. They are counted where that layer is: after layers with strides, a step
            is one of their rows. None: continual layers keep their own windows, and there are no
            other layers that need one.
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
        recurrence: What recurrent layers do at a step. "stream": their state goes on from step to
            step, as on one endless sequence. "window": each step runs them on the newest `seq_len`
            steps, from zeros, as they were trained on windows of that length.
        **options: `warm_up`, `call_mode` and `name` of the `StreamingModel`, and `cache_dtype` of
            its attention. If the model is a `StreamingModel` already, options that are left out
            stay as they were.

    Returns:
        A `StreamingModel`. Its weights are copies.

    Raises:
        ValueError: If something in the model cannot be converted or run on steps. The message gives
            the reason for every layer in the way.
    """
    if recurrence not in ("stream", "window"):
        raise ValueError(f"Expected recurrence 'stream' or 'window', but got {recurrence!r}")
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
    copy, problems = convert_layers(
        model, attention, kind=kind, positions=positions, recurrence=recurrence
    )
    if problems:
        raise CannotStream(problems, f"{model.name} cannot be converted")
    return StreamingModel(copy, **options)


def convert_layers(
    model: keras.Model,
    attention: dict[str, Any],
    also_continual: bool = True,
    kind: str = "single_output",
    positions: str | None = None,
    recurrence: str = "stream",
) -> tuple[keras.Model, list[Problem]]:
    """Return a copy of a model with continual attention, and the problems that were found.

    Args:
        model: A built model. A model that is neither functional nor sequential is returned as it
            is.
        attention: A dict of options of the attention: seq_len, and perhaps cache_dtype.
        also_continual: Whether continual layers in the model get these options too.
        kind, positions, recurrence: As in `convert`.

    Returns:
        (the copy, a list of `Problem`). If there are no problems, the copy has the model's weights.
    """
    problems: list[Problem] = []
    window = attention["seq_len"]
    above = _above_attention(model) if kind == "retroactive" else set()
    tables = {} if positions is None else tables_within(model)
    copies: list[tuple[Any, Any]] = []  # Layers and operations with their copies.

    def convert_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        copies.append((layer, convert_one(layer)))
        return copies[-1][1]

    def convert_one(layer: keras.layers.Layer) -> keras.layers.Layer:
        try:
            if needs_window(layer) and window is None:
                problems.append(Problem("needs seq_len, its window of newest steps", layer))
                return _copy(layer)
            if is_temporal(layer):
                global_pooling = window if needs_window(layer) else None
                return CoTemporal(_copy(layer), global_pooling, name=layer.name)
            if is_recurrent(layer):
                of_window = window if recurrence == "window" else None
                return CoRecurrent(_copy(layer), of_window, name=layer.name)
            if isinstance(layer, StreamingModel):
                return convert(layer, **attention) if also_continual else _copy(layer)
            if isinstance(layer, CoResidual) and also_continual:
                options = {**layer.get_config(), "layer": convert_layer(layer.layer)}
                return type(layer)(**options)
            if isinstance(layer, ContinualLayer):
                return _with_options(layer, attention if also_continual else {})
            if _is_of_keras_hub(layer, "RotaryEmbedding"):
                return _rotary_embedding(layer)
            if isinstance(layer, ATTENTION) and id(layer) in above:
                return _copy(layer)
            if isinstance(layer, keras.layers.MultiHeadAttention) and kind == "retroactive":
                return CoReMultiHeadAttention.from_regular(layer, **attention)
            if isinstance(layer, ATTENTION):
                return CoSiMultiHeadAttention.from_regular(layer, single_output=False, **attention)
        except CannotStream as error:
            problems.extend(error.problems)
        except ValueError as error:
            problems.append(Problem(f"cannot be converted: {error}", layer))
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


def is_temporal(layer: keras.layers.Layer) -> bool:
    """Return whether a Keras layer becomes a `CoTemporal`: it reads neighbouring steps."""
    kinds = [kind for kind in TEMPORAL if isinstance(layer, kind)]
    if not kinds or not computes_as(layer, kinds[0]):
        return False
    # A plain convolution of single steps is a product, row by row.
    sizes = (getattr(layer, "kernel_size", None), getattr(layer, "strides", None))
    is_product = isinstance(layer, keras.layers.Conv1D) and sizes == ((1,), (1,))
    return not is_product and getattr(layer, "data_format", "channels_last") == "channels_last"


def layers_of(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yield the layers of a model's graph, and of the models within it."""
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)


def is_converted(layer: keras.layers.Layer) -> bool:
    """Return whether `convert` makes another layer of a Keras layer."""
    known = needs_window(layer) or is_temporal(layer) or is_recurrent(layer)
    return known or _is_of_keras_hub(layer, "RotaryEmbedding")


def is_recurrent(layer: keras.layers.Layer) -> bool:
    """Return whether a Keras layer becomes a `CoRecurrent`."""
    kind = next((kind for kind in RECURRENT if isinstance(layer, kind)), None)
    return kind is not None and computes_as(layer, kind)


def needs_window(layer: keras.layers.Layer) -> bool:
    """Return whether a Keras layer reads a whole window, whose length must be known."""
    if isinstance(layer, ATTENTION):
        return not isinstance(layer, ContinualLayer)
    return isinstance(layer, GLOBAL_POOLING) and is_temporal(layer)


def _is_of_keras_hub(layer: keras.layers.Layer, name: str) -> bool:
    """Return whether a layer is of a class of KerasHub, which need not be installed here."""
    kind = type(layer)
    return kind.__name__ == name and kind.__module__.startswith("keras_hub.")


def _rotary_embedding(layer: Any) -> RotaryEmbedding:
    """Return the continual layer of a `keras_hub.layers.RotaryEmbedding`.

    Raises:
        ValueError: If its frequencies or axes are others.
    """
    config = layer.get_config()
    expected = dict(sequence_axis=1, feature_axis=-1, rope_type="linear", denominator_dim=None)
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"Expected {name}={value!r}, but got {config[name]!r}")
    own = {name: config[name] for name in ("name", "dtype", "max_wavelength", "scaling_factor")}
    return RotaryEmbedding.from_config(own)


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
    """Return a copy of a continual layer, with these options if the layer has a window.

    An option that is None leaves the layer's own as it is.
    """
    options = {name: option for name, option in options.items() if option is not None}
    config = layer.get_config()
    if "seq_len" in config:
        if not set(options) <= set(config):
            raise ValueError("it takes no cache_dtype: leave it out")
        config |= options
    return layer.__class__.from_config(config)
