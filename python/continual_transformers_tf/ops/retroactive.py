"""Continual retroactive attention on projected steps: the fused op, or its plain twin."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from continual_transformers_tf.ops import library, retroactive_twin
from continual_transformers_tf.ops.delay import put_steps
from continual_transformers_tf.ops.retroactive_cache import RetroactiveCache
from continual_transformers_tf.ops.single_output import expand_key_mask, expand_mask, scale_tensor
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_numbers import stream_tensor

OP = "ContinualTransformers>RetroactiveAttention"

ALGORITHMS = ("auto", "update", "recompute")

NO_GRADIENT = (
    "Expected no gradient of this graph's retroactive attention, which kept nothing for it: enter "
    "tf.GradientTape within the tf.function, or call the layer with training=True"
)


def retroactive_attention(
    query: Any,
    key: Any,
    value: Any,
    cache: RetroactiveCache,
    *,
    streams: Any = None,
    attention_mask: Any = None,
    key_mask: Any = None,
    scale: float | tf.Tensor | None = None,
    return_attention_scores: bool = False,
    algorithm: str = "auto",
    update_state: bool = True,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Take steps of streams: after each, all queries of the window attend to all of the window.

    The window is the N newest steps, or fewer while it fills. This is the continual retroactive
    attention of Hedegaard et al., "Continual Transformers" (ICLR 2023, arXiv 2201.06268),
    section 3.2, made stable: for logits of any size and any number of steps it is as exact as
    attention that is computed again from the whole window.

    Gradients flow to this call's queries, keys and values, and to the scale. Earlier steps are
    constants. If a gradient is recorded, the call uses plain TensorFlow. If the tape is outside the
    `tf.function`, there are no gradients.

    Args:
        query: `[M, H, D]`, one step of M streams, or `[M, T, H, D]`, T steps. The dtype is the
            cache's.
        key: Of the shape and dtype of query.
        value: `[M, H, Dv]` or `[M, T, H, Dv]`.
        cache: A `RetroactiveCache` of S streams. It is changed in place.
        streams: Integers `[M]`: the stream of each row, in any order, each once; None: row i is
            stream i.
        attention_mask: bool: which steps of the window (last axis) each of its queries (the axis
            before) may attend to, oldest first: `[N, N]`, `[M, N, N]`, `[M, H, N, N]` or
            `[M, H, T, N, N]`. None: all. It holds for this call only, so all rows are computed
            again, in plain TensorFlow.
        key_mask: bool `[M]` or `[M, T]`: which of these steps have a key. No query attends to a
            step without one, now or later, but its own query attends. None: all.
        scale: The factor of the logits; None: 1 / sqrt(D).
        return_attention_scores: Whether to return the softmax too. All rows are then computed
            again, in plain TensorFlow.
        algorithm: "update": each row of the window gains the new key and loses the oldest;
            "recompute": each row is computed again; "auto": the faster of the two at these sizes.
            The results are equal up to rounding. Plain TensorFlow always computes all rows again.
        update_state: False: nothing changes, and the output is that of the next real call; on a
            GPU up to rounding, for several steps.

    Returns:
        `[M, H, N, Dv]` or `[M, T, H, N, Dv]`: the outputs of the window's queries, oldest first.
        Zeros for steps that were never taken, and where there is nothing to attend to. With
        return_attention_scores also `[M, H, N, N]` or `[M, H, T, N, N]`: the softmax of each query
        over the window.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: If shapes, dtypes or streams do not fit the
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
        attention_mask=expand_mask(
            attention_mask, query.shape[0], query.shape[1], cache, all_rows=True
        ),
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
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    cache: RetroactiveCache,
    *,
    streams: tf.Tensor,
    attention_mask: tf.Tensor | None = None,
    key_mask: tf.Tensor | None = None,
    scale: float | tf.Tensor | None = None,
    return_attention_scores: bool = False,
    algorithm: str = "auto",
    update_state: bool = True,
    advance_position: bool = True,
    training: bool | None = None,
    dropout: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor]:
    """Do what `retroactive_attention` does, for tensors of the right ranks: one op in eager mode.

    Args:
        query, key: Tensors `[M, T, H, D]` of the cache's dtype.
        value: Tensor `[M, T, H, Dv]` of the cache's dtype.
        cache, scale, return_attention_scores, algorithm, update_state: As in
            `retroactive_attention`.
        streams: int32 tensor `[M]`.
        attention_mask: bool tensor `[M, H, T, N, N]`, whose first three axes may be 1; or None.
        key_mask: bool tensor `[M, T]`, or None.
        advance_position: False: the rings are written, but the caller advances `cache.position`.
            Until then a call of one step can be repeated: its sums are then computed again.
        training: Whether a graph may be asked for gradients from outside.
        dropout: A function that is applied to the scores before they weight the values; None: none.

    Returns:
        (output `[M, T, H, N, Dv]`; scores `[M, H, T, N, N]`, or None if they are not wanted; int64
        `[M]`, the number of steps that each of these streams has taken, these included).
    """
    check_algorithm(algorithm)
    recorded = [x for x in (query, key, value, scale) if tf.is_tensor(x)]
    # The fused op has no gradient, random numbers or scores. It keeps, for each row, sums over all
    # that the row has seen, so no mask of the window can change them.
    plain = training or dropout is not None or record.should_record_backprop(recorded)
    plain = plain or attention_mask is not None or return_attention_scores
    fused = None if plain else library.fused_ops(cache.device_type, OP)
    scale = scale_tensor(
        1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale,
        on_host=fused is not None and cache.device_type == "GPU",
    )
    inputs = dict(query=query, key=key, value=value, streams=streams, scale=scale)
    masks = [] if key_mask is None else [key_mask]
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


def put_whole_window(
    cache: RetroactiveCache,
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    key_mask: tf.Tensor | None,
    step: Step,
) -> None:
    """Put a step's queries, keys and values into the rings; the next step computes the sums again.

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


def check_algorithm(algorithm: str) -> None:
    """Raise ValueError unless it is one of `ALGORITHMS`."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"Expected algorithm to be one of {ALGORITHMS}, but got {algorithm!r}")


@tf.RegisterGradient(OP)
def _no_gradient(op: tf.Operation, *_: Any) -> list[tf.Tensor | None]:
    # Fail when the gradient runs, not here: TensorFlow also builds gradients that no one asks for.
    with tf.control_dependencies([tf.debugging.Assert(False, [NO_GRADIENT])]):
        of_inputs = [tf.identity(tf.zeros_like(x)) for x in op.inputs[:3]]
    return of_inputs + [None] * (len(op.inputs) - 3)
