"""Lowering of attention in chunks."""

from typing import Any

from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.models.lowering.continual_layers import (
    CONTINUAL,
    POSITION,
    State,
    StateOf,
    history,
    output_shape,
    project,
)
from continual_transformers_tf.models.lowering.plan_builder import PlanBuilder, Symbol
from continual_transformers_tf.ops.step import ALL_ROWS, Rows


def co_chunked(
    b: PlanBuilder,
    layer: Any,
    query: Symbol,
    value: Symbol | None = None,
    key: Symbol | None = None,
    given: Rows = ALL_ROWS,
    rows: int | None = None,
) -> tuple[Symbol, State]:
    """Lower a step of a `CoChunkedMultiHeadAttention`.

    Args:
        b: The `PlanBuilder`.
        layer: The layer.
        query, value, key: `[rows, E]`, or with one row a step `[E]`.
        given: The `Rows` of the input.
        rows: How many rows a step has, a multiple of the chunk; None: one chunk.
    """
    size, heads = layer.chunk, layer._num_heads
    rows = size if rows is None else rows
    value = query if value is None else value
    key = value if key is None else key
    before = size * layer.left_chunks
    queries = project(b, query, layer._query_dense, "query")
    queries = b.reshape(queries, (rows, heads * layer._key_dim))
    state: dict[str, State] = {"position": POSITION}
    kept = []
    for name, x, dense in (("keys", key, layer._key_dense), ("values", value, layer._value_dense)):
        projected = project(b, x, dense, name.removesuffix("s"))
        past, ring = history(b, projected, rows, before)
        kept.append(past)
        if ring is not None:
            state[name] = StateOf(ring.index, "ring", ("rows", rows) if rows > 1 else ())
    parts = []
    for first in range(0, rows, size):
        keys, values = (b.slice(x, 0, first, before + size) for x in kept)
        parts.append(
            b.node(
                "window_attention",
                [b.slice(queries, 0, first, size), keys, values],
                (size, heads * layer._value_dim),
                name="attention",
                heads=heads,
                scale=layer._inverse_sqrt_key_dim,
                band=0,
                causal=False,
                rows=rows,
                first=first - before - given.lag,
            )
        )
    attended = b.concat(parts, 0)
    output = project(b, attended, layer._output_dense, "output", axes=2)
    output = b.reshape(output, (rows, *output_shape(layer)))
    return (b.reshape(output, output.shape[1:]) if rows == 1 else output), state


CONTINUAL[CoChunkedMultiHeadAttention] = co_chunked
