"""The costs of retroactive attention, its blocks and stacks: entries of `ct.cost`."""

from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.co_re_transformer_encoder import CoReTransformerEncoder
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.models.cost_formulas import (
    Cost,
    attention_cost,
    retroactive_attention_cost,
    sigmoid_cost,
)
from continual_transformers_tf.models.cost_layers import (
    Rows,
    attention_of_windows,
    bytes_of_state,
    bytes_of_weights,
    cost_of,
    projection,
)


@cost_of.register
def _(layer: CoReMultiHeadAttention, rows: Rows) -> Cost:
    """Return the cost of the published update of a step, or with a band, of computing all rows.

    All N outputs go through the output projection.
    """
    if rows.mode == "regular":
        return attention_of_windows(layer, rows)
    heads, key_size = layer._num_heads, layer._num_heads * layer._key_dim
    outputs = layer._output_dense.kernel.shape[-1]
    n, band = layer.seq_len, layer._sliding_window
    if band is None or band >= n:
        total = retroactive_attention_cost(n, layer._key_dim) * heads
    else:
        total = attention_cost(n, n, layer._key_dim, layer._value_dim) * heads
    total += projection(layer._query_dense, 1, key_size) + projection(layer._key_dense, 1, key_size)
    total += projection(layer._value_dense, 1, heads * layer._value_dim)
    total += projection(layer._output_dense, n, outputs)
    if layer._use_gate:  # Each output is multiplied by the gate that came with its query.
        gated = heads * layer._value_dim
        total += projection(layer._gate_dense, 1, gated) + sigmoid_cost(gated)
        total += Cost(multiplications=n * gated)
    state = bytes_of_state(layer._stream_state)
    return total + Cost(state_bytes=state, read_bytes=state + bytes_of_weights(layer))


@cost_of.register
def _(layer: CoReTransformerEncoder, rows: Rows) -> Cost:
    """Return the cost. All N rows go on after the attention, also in a step."""
    count = layer.seq_len if rows.mode == "step" else rows.count
    whole = Rows("regular", count)
    before = Rows(rows.mode, 1) if rows.mode == "step" and layer.norm_first else whole
    total = cost_of(layer.attention, rows) + cost_of(layer.attention_norm, before)
    for part in (layer.feed_forward, layer.feed_forward_output, layer.output_norm):
        total += cost_of(part, whole)
    # The window's inputs are among the attention's state.
    return total + Cost(additions=2 * count * layer.input_features["x"])


@cost_of.register
def _(layer: TransformerEncoder, rows: Rows) -> Cost:
    total = Cost()
    for i, block in enumerate(layer.blocks):
        if layer.kind == "single_output" or i == 0:
            total += cost_of(block, rows)
        else:  # Its input is the whole window at every step.
            count = layer.seq_len if rows.mode == "step" else rows.count
            total += cost_of(block, Rows("regular", count))
    return total if layer.final_norm is None else total + cost_of(layer.final_norm, Rows("step", 1))
