"""What a regular call of `CoSiMultiHeadAttention` does: Keras' own attention, and one row of it."""

import keras
import tensorflow as tf

from continual_transformers_tf.layers.inputs import expect_given, without_keras_mask


def attend_windows(
    layer,
    attend,
    query,
    value,
    key,
    return_attention_scores,
    training,
    use_causal_mask,
    **masks,
):
    """The arguments of `call_regular`; `attend` is the call of Keras' layer."""
    expect_given("query", query)
    query = keras.ops.convert_to_tensor(query)
    if layer._single_output:  # Keras reads the query's mask from the tensor; a step has none.
        query = without_keras_mask(query)
    value = query if value is None else keras.ops.convert_to_tensor(value)
    if layer._single_output:
        for name, x in (("query", query), ("value", value)):
            if len(x.shape) != 3:
                raise ValueError(f"Expected {name} of shape (B, T, E), but got {tuple(x.shape)}")
    layer._ensure_built(query, value, key)
    plain = (
        masks["query_mask"] is masks["attention_mask"] is None
        and not use_causal_mask
        and layer._sliding_window is None
    )
    # With nothing that depends on a query's place among the others, the others need not be
    # computed: N times less attention.
    only_one = layer._single_output and plain
    result = attend(
        at_query_index(layer, query, 1) if only_one else query,
        value,
        key,
        return_attention_scores=return_attention_scores,
        training=training,
        use_causal_mask=use_causal_mask,
        **masks,
    )
    if not layer._single_output or only_one:
        return result
    if return_attention_scores:
        return at_query_index(layer, result[0], 1), at_query_index(layer, result[1], 2)
    return at_query_index(layer, result, 1)


def at_query_index(layer, x, axis):
    """The one row of x at `query_index` of this axis, which is kept."""
    index, size = layer._query_index, x.shape[axis]
    expected = f"Expected windows that have a step {index}, query_index, but got"
    if size is not None and not -size <= index < size:
        raise ValueError(f"{expected} {size} steps")
    if size is None and tf.is_tensor(x):  # In a graph; symbolic tensors have no values to check.
        size = tf.shape(x)[axis]
        fits = tf.debugging.Assert((-size <= index) & (index < size), [expected, size, "steps"])
        with tf.control_dependencies([fits]):
            x = tf.identity(x)
    lead = (slice(None),) * axis
    return x[(*lead, slice(index, None))][(*lead, slice(1))]
