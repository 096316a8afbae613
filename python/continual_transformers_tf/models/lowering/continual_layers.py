"""Lowering of one step of the continual layers, and of regular attention on whole windows.

The functions for streaming layers return a pair: the Symbol of the output, and the layer's entry of
`keras_state` (see `docs/model_file.md`), in which a `StateOf` stands for a node's state.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from continual_transformers_tf.layers.circular_positional_encoding import (
    CircularPositionalEncoding,
    sinusoids,
)
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.co_re_transformer_encoder import CoReTransformerEncoder
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.rotary import Rotary
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.layers.transformer_encoder_block import TransformerEncoderBlock
from continual_transformers_tf.models.lowering.activations import activate
from continual_transformers_tf.models.lowering.plan_builder import CannotLower, PlanBuilder, Symbol
from continual_transformers_tf.models.own_calls import computes_as


@dataclasses.dataclass(frozen=True)
class StateOf:
    """An entry of a node's state, in place of that node.

    Attributes:
        value: The index of the node's output.
        entry: The name of the entry.
        layout: What follows in keras_state, such as "index" with its two numbers.
    """

    value: int
    entry: str
    layout: tuple[str | int, ...] = ()


# A layer's entry of keras_state: a dict or list of States, a StateOf, or one of the words below.
State = Any
POSITION = "position"  # A state entry: the streams' positions, which all layers share.
ALL_TRUE = "true"  # A state entry that the plan does not keep, because it is always true.


# Parts of layers.


def kernel_of(layer: keras.layers.Layer) -> keras.Variable | keras.KerasTensor:
    """Return the variable of a dense layer's kernel, or the tensor that LoRA computes."""
    if layer.quantization_mode is not None:
        raise CannotLower(
            f"is quantized to {layer.quantization_mode}: make the session before quantize()"
        )
    return layer.kernel if layer.lora_enabled else layer._kernel


def project(
    b: PlanBuilder, x: Symbol, layer: keras.layers.Layer, name: str | None = None, axes: int = 1
) -> Symbol:
    """Apply a `Dense` layer, or an `EinsumDense` over the last `axes` axes, to x [..., I]."""
    kernel = kernel_of(layer)
    inputs = math.prod(kernel.shape[:axes])
    matrix = b.variable(kernel, (inputs, -1), kernel=True, name=layer.path + "/kernel")
    bias = None if layer.bias is None else b.variable(layer.bias, (-1,))
    return activate(b, b.dense(x, matrix, bias, name=name), layer.activation)


def layer_norm(
    b: PlanBuilder, x: Symbol, layer: keras.layers.Layer, name: str | None = None
) -> Symbol:
    """Apply a `LayerNormalization` over the last axis."""
    weights = {
        key: b.variable(w)
        for key, w in (("gamma", layer.gamma), ("beta", layer.beta))
        if w is not None
    }
    function = "rms" if getattr(layer, "rms_scaling", False) else "layer"
    epsilon = float(layer.epsilon)
    return b.node(
        "norm", [x], x.shape, name=name, weights=weights, function=function, epsilon=epsilon
    )


def output_shape(layer: keras.layers.MultiHeadAttention) -> tuple[int, ...]:
    """Return the shape of a MultiHeadAttention's output features."""
    return tuple(layer._output_dense.kernel.shape[2:])


def gated(b: PlanBuilder, attended: Symbol, gate: Symbol | None) -> Symbol:
    """Multiply the attended values by the gate, if the layer has one."""
    return attended if gate is None else b.binary("multiply", attended, gate)


# Attention of streams.


def co_si_mha(
    b: PlanBuilder,
    layer: CoSiMultiHeadAttention,
    query: Symbol,
    value: Symbol | None = None,
    key: Symbol | None = None,
    use_causal_mask: bool = False,
    value_mask: Symbol | None = None,
    key_mask: Symbol | None = None,
    rows: int = 1,
    **ignored: Any,
) -> tuple[Symbol, State]:
    """Lower a step of single-output attention."""
    check_steps(layer)
    value = query if value is None else value
    key = value if key is None else key
    heads, n, late = layer._num_heads, layer.seq_len, layer.delay
    several = (rows,) if rows > 1 else ()
    keys = placed(b, layer, "key", project(b, key, layer._key_dense, "key"))
    values = project(b, value, layer._value_dense, "value")
    queries = placed(b, layer, "query", project(b, query, layer._query_dense, "query"))
    gate = project(b, query, layer._gate_dense, "gate") if layer._use_gate else None
    state: dict[str, State] = {"position": POSITION}
    if late > 0:
        queries, state["query"] = delayed(b, queries, late, "query_delay", rows)
        state["query_mask"] = ALL_TRUE
        if gate is not None:
            gate, state["gate"] = delayed(b, gate, late, "gate_delay", rows)
    at, first, end = n - 1 - late, 0, n  # The query's own column; the columns it may attend to.
    if layer._sliding_window is not None:
        first, end = max(0, at - layer._sliding_window + 1), min(n, at + layer._sliding_window)
    if use_causal_mask:
        end = min(end, at + 1)
    more: dict[str, Any] = {}
    if layer._key_heads != heads:
        more["key_heads"] = layer._key_heads
    if layer._logit_soft_cap is not None:
        more["soft_cap"] = layer._logit_soft_cap
    attended = b.node(
        "attention",
        [queries, keys, values],
        (*several, heads * layer._value_dim),
        name="attention",
        weights=logit_weights(b, layer),
        masks={"key": b.mask_and(value_mask, key_mask)},
        heads=heads,
        window=n,
        first_column=first,
        end_column=end,
        query_delay=late,
        scale=layer._inverse_sqrt_key_dim,
        **more,
    )
    state |= {
        "keys": StateOf(attended.index, "key"),
        "values": StateOf(attended.index, "value"),
        "key_mask": StateOf(attended.index, "key_mask"),
    }
    output = project(b, gated(b, attended, gate), layer._output_dense, "output", axes=2)
    return b.reshape(output, (*several, *output_shape(layer))), state


def placed(b: PlanBuilder, layer: CoSiMultiHeadAttention, name: str, x: Symbol) -> Symbol:
    """Normalize and turn queries or keys [..., heads * D] as the layer's options say."""
    heads = b.reshape(x, (*x.shape[:-1], x.shape[-1] // layer._key_dim, layer._key_dim))
    if layer._query_key_norm:
        norm = layer.query_norm if name == "query" else layer.key_norm
        heads = rms_norm(b, heads, norm, f"{name}_norm")
    if layer._rotary is not None:
        rows = x.shape[0] if len(x.shape) > 1 else 1
        heads = turned(b, heads, layer._rotary, f"{name}_rotary", rows)
    return b.reshape(heads, x.shape)


def turned(
    b: PlanBuilder, x: Symbol, rotary: Rotary, name: str | None = None, rows: int = 1
) -> Symbol:
    """Turn heads [..., D], or with several rows a step [rows, ..., D], by the number of the row."""
    angles = b.rotary_angles(rotary.turns(x.shape[-1]), rows)
    return b.node("rotary", [x, angles], x.shape, name=name, interleaved=rotary.interleaved)


def rms_norm(
    b: PlanBuilder, x: Symbol, layer: keras.layers.RMSNormalization, name: str | None = None
) -> Symbol:
    """Apply an `RMSNormalization` over the last axis."""
    weights = {"gamma": b.variable(layer.scale)}
    epsilon = float(layer.epsilon)
    return b.node("norm", [x], x.shape, name=name, weights=weights, function="rms", epsilon=epsilon)


def logit_weights(b: PlanBuilder, layer: CoSiMultiHeadAttention) -> dict[str, str]:
    """Return the names of the tensors that a layer's attention node has."""
    weights = {}
    if layer.position_bias is not None:
        distance = layer.seq_len - 1 - layer.delay - np.arange(layer.seq_len)
        weights["bias"] = b.derived("bias", np.asarray(layer.position_bias.call(distance)))
    if layer._use_sinks:
        weights["sink"] = b.variable(layer.sinks)
    return weights


def co_re_mha(
    b: PlanBuilder,
    layer: CoReMultiHeadAttention,
    query: Symbol,
    value: Symbol | None = None,
    key: Symbol | None = None,
    use_causal_mask: bool = False,
    value_mask: Symbol | None = None,
    key_mask: Symbol | None = None,
    zero_untaken: bool = True,
    **ignored: Any,
) -> tuple[Symbol, State]:
    """Lower a step of retroactive attention.

    Without `zero_untaken`, rows of steps that were never taken hold the bias. A block that sets
    its own to zeros saves this, and its residual is then added in the same pass as the bias.
    """
    check_steps(layer)
    value = query if value is None else value
    key = value if key is None else key
    heads, n = layer._num_heads, layer.seq_len
    keys = project(b, key, layer._key_dense, "key")
    values = project(b, value, layer._value_dense, "value")
    queries = project(b, query, layer._query_dense, "query")
    gate = project(b, query, layer._gate_dense, "gate") if layer._use_gate else None
    mask = b.mask_and(value_mask, key_mask)
    if use_causal_mask or layer._sliding_window is not None:
        attended, state = _masked_rows(b, layer, queries, keys, values, mask, use_causal_mask)
    else:
        attended = b.node(
            "retroactive_attention",
            [queries, keys, values],
            (n, heads * layer._value_dim),
            name="attention",
            masks={"key": mask},
            heads=heads,
            window=n,
            scale=layer._inverse_sqrt_key_dim,
            algorithm=layer.algorithm,
        )
        state = {
            **{
                ring: StateOf(attended.index, name)
                for ring, name in (("queries", "query"), ("keys", "key"), ("values", "value"))
            },
            **{
                name: StateOf(attended.index, name)
                for name in ("softmax", "weighted_sum", "made_with", "key_mask")
            },
            "position": POSITION,
        }
    if gate is not None:
        gate = window_of(b, gate, n, "gate_window")
        state["gate"] = StateOf(gate.index, "ring")
    output = project(b, gated(b, attended, gate), layer._output_dense, "output", axes=2)
    output = b.reshape(output, (n, *output_shape(layer)))
    if zero_untaken and layer._output_dense.bias is not None:
        output = b.node("zero_untaken", [output], output.shape, name="taken")
    return output, state


def _masked_rows(
    b: PlanBuilder,
    layer: CoReMultiHeadAttention,
    queries: Symbol,
    keys: Symbol,
    values: Symbol,
    mask: Symbol | None,
    use_causal_mask: bool,
) -> tuple[Symbol, State]:
    """Compute all rows of the window, each from the part of the window that it may see."""
    if mask is not None:
        raise CannotLower(
            "is given a mask together with use_causal_mask or sliding_window. A plan has no node "
            "for both: leave out one of them"
        )
    n, heads = layer.seq_len, layer._num_heads
    windows = [
        window_of(b, x, n, f"{name}_window")
        for name, x in (("query", queries), ("key", keys), ("value", values))
    ]
    attended = b.node(
        "window_attention",
        windows,
        (n, heads * layer._value_dim),
        name="attention",
        heads=heads,
        scale=layer._inverse_sqrt_key_dim,
        band=layer._sliding_window or 0,
        causal=bool(use_causal_mask),
    )
    state = {
        name: StateOf(x.index, "ring")
        for name, x in zip(("queries", "keys", "values"), windows, strict=True)
    }
    # The plan keeps no sums, because it computes every row again. No step can be a gap here.
    unused = {"softmax": None, "weighted_sum": None, "made_with": None, "key_mask": ALL_TRUE}
    return attended, {**state, **unused, "position": POSITION}


def check_steps(layer: keras.layers.Layer) -> None:
    """Raise CannotLower if the layer has options that only regular calls support."""
    if layer._no_steps is not None:
        raise CannotLower(f"takes no steps, with {layer._no_steps}")


def delayed(
    b: PlanBuilder, x: Symbol, late: int, name: str | None = None, rows: int = 1
) -> tuple[Symbol, State]:
    """Return (the rows `late` rows before those of a step, the state that keeps them).

    Args:
        b: The `PlanBuilder`.
        x: One row a step, `[...]`, or several, `[rows, ...]`.
        late: How many rows.
        name: The name of the node.
        rows: How many rows a step has.
    """
    if rows == 1:
        y = b.node("delay", [x], x.shape, x.dtype, name=name, steps=late)
        return y, StateOf(y.index, "ring")
    past, ring = history(b, x, rows, late)
    state = None if ring is None else StateOf(ring.index, "ring", ("rows", rows))
    return b.slice(past, 0, 0, rows), state


def window_of(b: PlanBuilder, x: Symbol, n: int, name: str | None = None) -> Symbol:
    """Add a node that returns the n newest inputs, oldest first."""
    return b.node("window", [x], (n, *x.shape), name=name, window=n)


def history(b: PlanBuilder, x: Symbol, rows: int, before: int) -> tuple[Symbol, Symbol | None]:
    """Return (the `before` rows before a step's, followed by its own; the node that keeps them)."""
    if before == 0:
        return (b.reshape(x, (1, *x.shape)) if rows == 1 else x), None
    steps = 1 + -(-before // rows)
    window = window_of(b, x, steps, "steps")
    row = x.shape if rows == 1 else x.shape[1:]
    past = b.reshape(window, (steps * rows, *row))
    return b.slice(past, 0, (steps - 1) * rows - before, before + rows), window


# Attention on whole windows.


def attend_whole(
    b: PlanBuilder,
    layer: keras.layers.MultiHeadAttention,
    query: Symbol,
    value: Symbol | None = None,
    key: Symbol | None = None,
    use_causal_mask: bool = False,
    all_there: bool = False,
    **ignored: Any,
) -> Symbol:
    """Lower a regular call of a MultiHeadAttention on windows [N, E], in which all rows may be new.

    With `all_there` the rows are no steps: none is missing in a new stream.
    Return only the Symbol of the output: there is no state.
    """
    check_computation(layer)
    if isinstance(layer, CoSiMultiHeadAttention) and not layer._is_plain:
        raise CannotLower(
            "attends to whole windows that every step changes, with an argument that "
            "keras.layers.MultiHeadAttention does not have. A plan has no node for that: take the "
            "model's steps in TensorFlow, with a ct.StreamingModel"
        )
    if tuple(layer._attention_axes) != (1,):
        raise CannotLower(f"has attention_axes={layer._attention_axes}: expected time, axis 1")
    value = query if value is None else value
    key = value if key is None else key
    for name, x in (("query", query), ("value", value), ("key", key)):
        if len(x.shape) != 2:
            raise CannotLower(f"is given {name} of {len(x.shape)} axes a step: expected (N, E)")
    n = value.shape[0]
    band = layer._sliding_window or 0
    only = None
    if isinstance(layer, CoSiMultiHeadAttention) and layer._single_output:
        only = layer._query_index
        if only >= 0:
            only -= query.shape[0]
        if not -query.shape[0] <= only < 0:
            raise CannotLower(
                f"is given windows of {query.shape[0]} steps, too short for its query_index"
            )
        # With a mask along time, take the query's row and all newer ones, to keep its place.
        rows = -only if use_causal_mask or band else 1
        first = query.shape[0] + only
        query = b.strided(
            query, (rows, query.shape[1]), (query.shape[1], 1), first * query.shape[1], "query_rows"
        )
    elif query.shape[0] != n and (use_causal_mask or band):
        raise CannotLower(
            f"attends from {query.shape[0]} rows to {n} with a mask along time: expected as many "
            "rows as it attends to"
        )
    keys = project(b, key, layer._key_dense, "key")
    values = project(b, value, layer._value_dense, "value")
    queries = project(b, query, layer._query_dense, "query")
    more: dict[str, Any] = {"rows": 1, "first": 0} if all_there else {}
    attended = b.node(
        "window_attention",
        [queries, keys, values],
        (query.shape[0], layer._num_heads * layer._value_dim),
        name="attention",
        heads=layer._num_heads,
        scale=layer._inverse_sqrt_key_dim,
        band=band,
        causal=bool(use_causal_mask),
        **more,
    )
    gate = project(b, query, layer._gate_dense, "gate") if layer._use_gate else None
    output = project(b, gated(b, attended, gate), layer._output_dense, "output", axes=2)
    output = b.reshape(output, (query.shape[0], *output_shape(layer)))
    if only is not None and output.shape[0] > 1:
        size = math.prod(output.shape[1:])
        row = b.strided(output, (1, size), (size, 1), name="row")
        output = b.reshape(row, (1, *output.shape[1:]))
    return output


def encoder_on_whole(b: PlanBuilder, block: TransformerEncoderBlock, x: Symbol) -> Symbol:
    """Lower a regular call of an encoder block on whole windows [N, E]."""
    check_computation(block)
    normal = layer_norm(b, x, block.attention_norm, "attention_norm") if block.norm_first else x
    with b.within("attention"):
        attended = attend_whole(b, block.attention, normal)
    if isinstance(block, CoSiTransformerEncoder):
        features = x.shape[-1]
        x = b.strided(x, (1, features), (features, 1), (x.shape[0] - 1) * features, "newest")
    return feed_forward(b, block, x, attended)


def feed_forward(
    b: PlanBuilder, block: TransformerEncoderBlock, x: Symbol, attended: Symbol
) -> Symbol:
    """Lower the part of a block after its attention, for rows x of the block's input."""
    attended = b.binary("add", x, attended)
    if not block.norm_first:
        attended = layer_norm(b, attended, block.attention_norm, "attention_norm")
    x = layer_norm(b, attended, block.output_norm, "output_norm") if block.norm_first else attended
    y = project(b, x, block.feed_forward, "feed_forward")
    y = project(b, y, block.feed_forward_output, "feed_forward_output")
    y = b.binary("add", attended, y)
    return y if block.norm_first else layer_norm(b, y, block.output_norm, "output_norm")


# Whole layers.


def co_si_encoder(
    b: PlanBuilder,
    block: TransformerEncoderBlock,
    x: Symbol,
    value_mask: Symbol | None = None,
    rows: int = 1,
    **ignored: Any,
) -> tuple[Symbol, State]:
    """Lower a step of a single-output encoder block."""
    normal = layer_norm(b, x, block.attention_norm, "attention_norm") if block.norm_first else x
    with b.within("attention"):
        attended, state = co_si_mha(b, block.attention, normal, value_mask=value_mask, rows=rows)
    return feed_forward(b, block, x, attended), state


def co_re_encoder(
    b: PlanBuilder, block: TransformerEncoderBlock, x: Symbol, **ignored: Any
) -> tuple[Symbol, State]:
    """Lower a step of a retroactive encoder block."""
    normal = layer_norm(b, x, block.attention_norm, "attention_norm") if block.norm_first else x
    with b.within("attention"):
        attended, state = co_re_mha(b, block.attention, normal, zero_untaken=False)
    windows = window_of(b, x, block.seq_len, "window")
    output = feed_forward(b, block, windows, attended)
    output = b.node("zero_untaken", [output], output.shape, name="taken")
    return output, {**state, "window": StateOf(windows.index, "ring")}


def transformer_encoder(
    b: PlanBuilder,
    stack: TransformerEncoder,
    x: Symbol,
    value_mask: Symbol | None = None,
    rows: int = 1,
    **ignored: Any,
) -> tuple[Symbol, State]:
    """Lower a step of a stack of encoder blocks."""
    state = []
    for block in stack._streaming:
        lower = co_si_encoder if isinstance(block, CoSiTransformerEncoder) else co_re_encoder
        with b.within(block.name):
            x, of_block = lower(b, block, x, value_mask=value_mask, rows=rows)
        state.append(of_block)
    for block in stack.blocks[len(stack._streaming) :]:
        with b.within(block.name):
            x = encoder_on_whole(b, block, x)
    if rows == 1:
        x = b.reshape(x, x.shape[-1:])
    if stack.final_norm is not None:
        x = layer_norm(b, x, stack.final_norm, "final_norm")
    return x, state


def positional_encoding(
    b: PlanBuilder, layer: CircularPositionalEncoding, x: Symbol, **ignored: Any
) -> tuple[Symbol, State]:
    """Lower a step of the circular positional encoding."""
    if layer._encoding == "sinusoidal":
        rows = b.derived("rows", sinusoids(layer._max_len, layer._embed_dim))
    else:
        rows = b.variable(layer.embeddings)
    first = int(layer.first_row)
    start = b.derived("start", np.int64(first), "int64")
    y = b.node("positional", [x], x.shape, weights={"rows": rows, "start": start})
    index = StateOf(y.index, "offset", ("index", first, layer._max_len))
    return y, {"index": index, "position": POSITION}


def rotary_embedding(
    b: PlanBuilder, layer: RotaryEmbedding, x: Symbol, rows: int = 1, **ignored: Any
) -> tuple[Symbol, State]:
    """Lower a step of the layer of rotary positions."""
    return turned(b, b.cast(x, b.dtype), layer.rotary, rows=rows), {"position": POSITION}


def co_delay(
    b: PlanBuilder, layer: CoDelay, x: Symbol, rows: int = 1, **ignored: Any
) -> tuple[Symbol, State]:
    """Lower a step of a delay."""
    dtype = layer.compute_dtype
    if dtype in ("int32", "int64", "bool"):
        if x.dtype != dtype:
            raise CannotLower(f"delays {dtype}, but is given {x.dtype}: expected the same dtype")
    elif not keras.backend.is_float_dtype(dtype):
        raise CannotLower(f"delays {dtype}: expected floats, int32, int64 or bool")
    if layer.delay == 0:
        return x, {"position": POSITION}
    if rows > 1 and x.dtype != b.dtype:
        raise CannotLower(
            f"delays {x.dtype}, and a step has {rows} rows there, because a layer after it has "
            "strides: a plan keeps several rows only of floats. Cast the input to floats first"
        )
    y, steps = delayed(b, x, layer.delay, rows=rows)
    return y, {"steps": steps, "position": POSITION}


def co_window(b: PlanBuilder, layer: CoWindow, x: Symbol, **ignored: Any) -> tuple[Symbol, State]:
    """Lower a step of a window."""
    if x.dtype != b.dtype:
        raise CannotLower(f"keeps a window of {x.dtype}: a plan keeps windows only of floats")
    y = window_of(b, x, layer.seq_len)
    return y, {"steps": StateOf(y.index, "ring"), "position": POSITION}


def co_residual(
    b: PlanBuilder, layer: CoResidual, x: Symbol, rows: int = 1, **arguments: Any
) -> tuple[Symbol, State]:
    """Lower a step of a residual connection around another layer."""
    inner: keras.layers.Layer = layer.layer
    with b.within(inner.name):
        y, state = lower_continual(b, inner, x, rows=rows, **arguments)
    state, past = {"layer": state}, x
    if layer._skip is not None:
        past, steps = delayed(b, x, layer.delay, "skip", rows)
        state["skip"] = {"steps": steps, "position": POSITION}
    return b.binary("add", y, past), state


CONTINUAL: dict[type, Callable[..., tuple[Symbol, State]]] = {
    CoSiMultiHeadAttention: co_si_mha,
    CoReMultiHeadAttention: co_re_mha,
    CoSiTransformerEncoder: co_si_encoder,
    CoReTransformerEncoder: co_re_encoder,
    TransformerEncoder: transformer_encoder,
    CircularPositionalEncoding: positional_encoding,
    RotaryEmbedding: rotary_embedding,
    CoDelay: co_delay,
    CoResidual: co_residual,
    CoWindow: co_window,
}


def lower_continual(
    b: PlanBuilder, layer: keras.layers.Layer, *inputs: Symbol, **arguments: Any
) -> tuple[Symbol, State]:
    """Lower one step of a continual layer.

    Args:
        b: The `PlanBuilder`.
        layer: A built layer.
        *inputs: Symbols, in the order of `call_step`.
        **arguments: use_causal_mask, and Symbols value_mask and key_mask. rows, how many rows a
            step has: with more than one, inputs and the output are `[rows, ...]`.

    Returns:
        (the Symbol of its output, its entry of keras_state).
    """
    for kind, lower in CONTINUAL.items():
        if isinstance(layer, kind) and computes_as(layer, kind):
            return lower(b, layer, *inputs, **arguments)
    check_computation(layer)
    raise CannotLower(
        "is a continual layer of another package: a plan has nodes only for the layers of this one"
    )


def check_computation(layer: keras.layers.Layer) -> None:
    """Raise CannotLower if the class of a layer has calls of its own.

    A plan has nodes for what the parent computes.
    """
    for kind in (*CONTINUAL, keras.layers.MultiHeadAttention):
        if isinstance(layer, kind):
            if not computes_as(layer, kind):
                raise CannotLower(
                    "computes in its own way, and a plan has no node for that: expected the calls "
                    f"of {kind.__name__}"
                )
            return
