"""Continual retroactive attention on projected steps: the fused op, or its plain twin."""

import math

import tensorflow as tf
from tensorflow.python.eager import record

from continual_transformers_tf.ops import library, retroactive_twin
from continual_transformers_tf.ops.delay import put_steps
from continual_transformers_tf.ops.single_output import expand_key_mask, expand_mask, scale_tensor
from continual_transformers_tf.ops.stream_numbers import stream_tensor

OP = "ContinualTransformers>RetroactiveAttention"

ALGORITHMS = ("auto", "update", "recompute")

NO_GRADIENT = (
    "Expected no gradient of this graph's retroactive attention, which kept nothing for it: enter "
    "tf.GradientTape within the tf.function, or call the layer with training=True"
)


def retroactive_attention(
    query,
    key,
    value,
    cache,
    *,
    streams=None,
    attention_mask=None,
    key_mask=None,
    scale=None,
    return_attention_scores=False,
    algorithm="auto",
    update_state=True,
):
    """Takes steps of streams: after each, all queries of the window attend to all of the window.

    The window is the N newest steps. While a stream has taken fewer, those there are attend to each
    other. Continual retroactive attention of Hedegaard & Iosifidis, "Continual Transformers" (ICLR
    2023, arXiv 2201.06268), section 3.2, made stable: for logits of any size and any number of
    steps it is as exact as an attention that is computed anew.

    Gradients flow to this call's queries, keys and values, and to the scale; the steps before are
    constants to them. Where a gradient is recorded the call is taken in plain TensorFlow; a graph
    that is differentiated from outside, by a tape around a `tf.function` and not within it, has no
    gradients.

    Args:
        query: `[M, H, D]`, one step of M streams, or `[M, T, H, D]`, T steps. Of the cache's dtype.
        key: of the shape and dtype of query.
        value: `[M, H, Dv]` or `[M, T, H, Dv]`.
        cache: a `RetroactiveCache` of S streams; changed in place.
        streams: integers `[M]`, which stream each row belongs to, in any order, each once; None:
            row i is stream i.
        attention_mask: bool, which steps of the window (last axis) the query of each (the axis
            before) may attend to, oldest first: `[N, N]`, `[M, N, N]`, `[M, H, N, N]` or
            `[M, H, T, N, N]`. None: all. It holds for this call alone, so all rows are computed
            anew, in plain TensorFlow.
        key_mask: bool `[M]` or `[M, T]`, which of these steps have a key: one that has none is
            attended to neither now nor later, but its query attends. None: all.
        scale: what the logits are multiplied by; None: 1 / sqrt(D).
        return_attention_scores: whether to return the softmax too; all rows are then computed anew,
            in plain TensorFlow.
        algorithm: "update": each row of the window gains the new key and loses the oldest;
            "recompute": each is computed anew; "auto": whichever is faster at these sizes. The
            results are equal but for rounding. Plain TensorFlow always computes them anew.
        update_state: if False, nothing changes: the output is that of the next real call.

    Returns:
        `[M, H, N, Dv]` or `[M, T, H, N, Dv]`: the outputs of the window's queries, oldest first.
        Zeros for steps that were never taken, and where there is nothing to attend to. With
        return_attention_scores also `[M, H, N, N]` or `[M, H, T, N, N]`: the softmax of each query
        over the window.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit the
            cache or each other. The cache is then as it was.
    """
    if not tf.is_tensor(query):
        query = tf.convert_to_tensor(query, dtype=cache.dtype)
    if query.dtype != cache.dtype:
        raise ValueError(
            f"Expected query to be {cache.dtype.name}, as the cache, but got {query.dtype.name}"
        )
    key, value = (tf.convert_to_tensor(x, dtype=query.dtype) for x in (key, value))
    one_step = query.shape.rank == 3
    if one_step:
        query, key, value = (tf.expand_dims(x, 1) for x in (query, key, value))
    output, scores, _ = attend_all_steps(
        query,
        key,
        value,
        cache,
        streams=stream_tensor(tf.range(tf.shape(query)[0]) if streams is None else streams),
        attention_mask=expand_mask(attention_mask, *query.shape[:2], cache, all_rows=True),
        key_mask=expand_key_mask("key_mask", key_mask, query, one_step),
        scale=scale,
        return_attention_scores=return_attention_scores,
        algorithm=algorithm,
        update_state=update_state,
    )
    if one_step:
        output = tf.squeeze(output, 1)
    if not return_attention_scores:
        return output
    return output, tf.squeeze(scores, 2) if one_step else scores


def attend_all_steps(
    query,
    key,
    value,
    cache,
    *,
    streams,
    attention_mask=None,
    key_mask=None,
    scale=None,
    return_attention_scores=False,
    algorithm="auto",
    update_state=True,
    advance_position=True,
    training=None,
    dropout=None,
):
    """`retroactive_attention` for those who hold tensors of the right ranks: one op, eagerly.

    Args:
        query, key, value: tensors `[M, T, H, D]`, twice, and `[M, T, H, Dv]`, of the cache's dtype.
        cache, scale, return_attention_scores, algorithm, update_state: as there.
        streams: int32 tensor `[M]`.
        attention_mask: bool tensor `[M, H, T, N, N]`, the first three axes may be 1; or None.
        key_mask: bool tensor `[M, T]`, or None.
        advance_position: if False, the rings are written, but `cache.position` stays: the caller
            advances it. A call of one step whose position stays can be taken again: its sums are
            then computed anew.
        training: whether a graph may be asked for gradients from outside.
        dropout: what is applied to the scores before they weight the values; None: nothing.

    Returns:
        (output `[M, T, H, N, Dv]`, scores `[M, H, T, N, N]` or None where not wanted, and int64
        `[M]`, the steps that each of these streams has taken, these among them).
    """
    check_algorithm(algorithm)
    scale = scale_tensor(1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale)
    inputs = dict(query=query, key=key, value=value, streams=streams, scale=scale)
    masks = [] if key_mask is None else [key_mask]
    # The fused op has neither a gradient, random numbers nor scores; and the sums that it keeps of
    # a row are over all that the row has seen, which no mask of the window can change.
    plain = training or dropout is not None or record.should_record_backprop(list(inputs.values()))
    plain = plain or attention_mask is not None or return_attention_scores
    fused = None if plain else library.fused_ops(cache.device_type, OP)
    with cache.turn():
        if fused is None:
            return retroactive_twin.attend_all_steps(
                **inputs,
                key_cache=cache.keys,
                value_cache=cache.values,
                key_mask_cache=cache.key_mask,
                position=cache.position,
                query_cache=cache.queries,
                made_with=cache.made_with,
                attention_mask=attention_mask,
                key_mask=masks,
                return_attention_scores=return_attention_scores,
                update_state=update_state,
                advance_position=advance_position,
                dropout=dropout,
            )
        output, steps_taken = fused.continual_transformers_retroactive_attention(
            **inputs,
            key_cache=cache.keys.handle,
            value_cache=cache.values.handle,
            key_mask_cache=cache.key_mask.handle,
            position=cache.position.handle,
            query_cache=cache.queries.handle,
            softmax=cache.softmax.handle,
            weighted_sum=cache.weighted_sum.handle,
            made_with=cache.made_with.handle,
            key_mask=masks,
            algorithm=algorithm,
            update_state=update_state,
            advance_position=advance_position,
            sequence_first=True,
        )
    return output, None, steps_taken


def put_whole_window(cache, query, key, value, key_mask, step):
    """Put a step's queries, keys and values into the rings; the next step computes the sums anew.

    Args:
        cache: The `RetroactiveCache`.
        query, key, value, key_mask: As in `attend_all_steps`.
        step: The `Step`, of any number of steps.
    """
    if key_mask is None:
        key_mask = tf.ones(tf.shape(key)[:2], bool)
    rings = (cache.queries, cache.keys, cache.values, cache.key_mask)
    for ring, new in zip(rings, (query, key, value, key_mask), strict=True):
        put_steps(ring, new, step.numbers, step.position)
    nobodys = tf.zeros([tf.shape(step.numbers)[0], 2], cache.made_with.dtype)
    cache.made_with.scatter_nd_update(step.numbers[:, tf.newaxis], nobodys)


def check_algorithm(algorithm):
    """Raises ValueError unless it is one of `ALGORITHMS`."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"Expected algorithm to be one of {ALGORITHMS}, but got {algorithm!r}")


@tf.RegisterGradient(OP)
def _no_gradient(op, *_):
    # Only when it runs: TensorFlow prepares for gradients that nobody may ask for.
    with tf.control_dependencies([tf.debugging.Assert(False, [NO_GRADIENT])]):
        of_inputs = [tf.identity(tf.zeros_like(x)) for x in op.inputs[:3]]
    return of_inputs + [None] * (len(op.inputs) - 3)
