"""Continual single-output attention on projected steps: the fused op, or its plain twin."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from continual_transformers_tf.ops import library, single_output_gradient, single_output_twin
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.delay import put_steps
from continual_transformers_tf.ops.step import Step
from continual_transformers_tf.ops.stream_numbers import stream_tensor


def single_output_attention(
    query: Any,
    key: Any,
    value: Any,
    cache: AttentionCache,
    *,
    streams: Any = None,
    attention_mask: Any = None,
    key_mask: Any = None,
    scale: float | tf.Tensor | None = None,
    return_attention_scores: bool = False,
    update_state: bool = True,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Take steps of streams: each step's query attends to the N newest steps of its stream.

    The N steps end with the step itself. A stream that has taken fewer than N steps attends to
    these. This is the continual single-output attention of Hedegaard et al., "Continual
    Transformers" (ICLR 2023, arXiv 2201.06268), section 3.3.

    Gradients flow to this call's queries, keys and values, and to the scale. Earlier steps are
    constants. If the tape is outside the `tf.function`, there are gradients only if a call takes
    several steps.

    Args:
        query: `[M, H, D]`, one step of M streams, or `[M, T, H, D]`, T steps. The dtype is the
            cache's, or its compute dtype.
        key: Of the shape and dtype of query.
        value: `[M, H, Dv]` or `[M, T, H, Dv]`.
        cache: An `AttentionCache` of S streams. It is changed in place.
        streams: Integers `[M]`: the stream of each row, in any order, each once; None: row i is
            stream i.
        attention_mask: bool: which steps of the window the query may attend to, oldest first
            (column N - 1 is the newest step): `[N]`, `[M, N]`, `[M, H, N]` or `[M, H, T, N]`.
            None: all.
        key_mask: bool `[M]` or `[M, T]`: which of these steps have a key. No query attends to a
            step without one, now or later, but its stream advances. None: all.
        scale: The factor of the logits; None: 1 / sqrt(D).
        return_attention_scores: Whether to return the softmax too.
        update_state: False: nothing changes, and the output is that of the next real call.

    Returns:
        `[M, H, Dv]` or `[M, T, H, Dv]`, of the query's dtype: zeros where everything is masked.
        With return_attention_scores also `[M, H, N]` or `[M, H, T, N]`: the softmax over the
        window, oldest step first, 0 where there was no step yet.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: If shapes, dtypes or streams do not fit the
            cache or each other. The cache is then as it was.
    """
    if not tf.is_tensor(query):
        query = tf.convert_to_tensor(query, dtype=cache.compute_dtype)
    dtype = query.dtype
    if dtype not in (cache.dtype, cache.compute_dtype):
        raise ValueError(
            f"Expected query to be {cache.dtype.name}, as the cache, or "
            f"{cache.compute_dtype.name}, but got {dtype.name}"
        )
    key, value = (tf.convert_to_tensor(x, dtype=dtype) for x in (key, value))
    one_step = query.shape.rank == 3
    if one_step:
        query, key, value = (tf.expand_dims(x, 1) for x in (query, key, value))
    output, scores, _ = attend_steps(
        tf.cast(query, cache.compute_dtype),
        tf.cast(key, cache.dtype),
        tf.cast(value, cache.dtype),
        cache,
        streams=stream_tensor(tf.range(tf.shape(query)[0]) if streams is None else streams),
        attention_mask=expand_mask(attention_mask, query.shape[0], query.shape[1], cache),
        key_mask=expand_key_mask("key_mask", key_mask, query, one_step),
        scale=scale,
        return_attention_scores=return_attention_scores,
        update_state=update_state,
    )
    if one_step:
        output = tf.squeeze(output, 1)
    output = tf.cast(output, dtype)
    if not return_attention_scores:
        return output
    return output, tf.cast(tf.squeeze(scores, 2) if one_step else scores, dtype)


def attend_steps(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    cache: AttentionCache,
    *,
    streams: tf.Tensor,
    attention_mask: tf.Tensor | None = None,
    key_mask: tf.Tensor | None = None,
    scale: float | tf.Tensor | None = None,
    return_attention_scores: bool = False,
    update_state: bool = True,
    advance_position: bool = True,
    position: tf.Tensor | None = None,
    training: bool | None = None,
    dropout: Callable[[tf.Tensor], tf.Tensor] | None = None,
    terms: single_output_twin.LogitTerms | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Do what `single_output_attention` does, for tensors of the right ranks: one op in eager mode.

    Args:
        query: Tensor `[M, T, H, D]` of the cache's compute dtype.
        key, value: Tensors `[M, T, Hk, D]` and `[M, T, Hk, Dv]` of the cache's dtype. Hk is the
            cache's number of heads, a divisor of H. If it is less than H, the call uses plain
            TensorFlow, because the fused op has as many heads of keys as of queries.
        cache, scale, return_attention_scores, update_state: As in `single_output_attention`.
        streams: int32 tensor `[M]`.
        attention_mask: bool tensor `[M, H, T, N]`, whose first three axes may be 1; or None.
        key_mask: bool tensor `[M, T]`, or None.
        advance_position: False: the rings are written, but the caller advances `cache.position`.
            Until then a call of one step can be repeated.
        position: int64 `[M]`, how many rows the rings of each stream had been given before; None:
            `cache.position`. It makes the call use plain TensorFlow, because the fused op reads the
            variable.
        training: Whether a graph may be asked for gradients; None: if it takes several steps.
        dropout: A function that is applied to the scores before they weight the values; None: none.
            It makes the call use plain TensorFlow, because the fused op has no random numbers.
        terms: Changes of the logits; None: none. They make the call use plain TensorFlow, because
            the fused op has no such inputs.

    Returns:
        (output `[M, T, H, Dv]`; scores `[M, H, T, N]`, without columns if they are not wanted;
        int64 `[M]`, the number of steps that each of these streams has taken, these included).
    """
    heads = query.shape[2] if query.shape.rank == 4 else None
    grouped = heads not in (None, cache.keys.shape[2])
    plain = dropout is not None or terms is not None or position is not None or grouped
    fused = None if plain else library.fused_ops(cache.device_type)
    scale = scale_tensor(
        1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale,
        on_host=fused is not None and cache.device_type == "GPU",
    )
    inputs = dict(query=query, key=key, value=value, streams=streams, scale=scale)
    options: dict[str, Any] = dict(
        attention_mask=[] if attention_mask is None else [attention_mask],
        key_mask=[] if key_mask is None else [key_mask],
        return_attention_scores=return_attention_scores,
        update_state=update_state,
        advance_position=advance_position,
    )
    with cache.turn():
        if fused is None:
            return single_output_twin.attend_steps(
                **inputs,
                key_cache=cache.keys,
                value_cache=cache.values,
                key_mask_cache=cache.key_mask,
                position=cache.position,
                start=position,
                dropout=dropout,
                terms=terms,
                **options,
            )
        return fused.continual_transformers_single_output_attention(
            **inputs,
            key_cache=cache.keys.handle,
            value_cache=cache.values.handle,
            key_mask_cache=cache.key_mask.handle,
            position=cache.position.handle,
            return_window=_gradient_may_be_wanted([query, key, value, scale], training),
            sequence_first=True,
            **options,
        )[:3]


def put_window(
    cache: AttentionCache,
    key: tf.Tensor,
    value: tf.Tensor,
    key_mask: tf.Tensor | None,
    step: Step,
    position: tf.Tensor,
) -> None:
    """Put a step's keys and values into the rings, as `attend_steps` does with `update_state`.

    Args:
        cache: The `AttentionCache`.
        key, value, key_mask: As in `attend_steps`.
        step: The `Step`, of any number of steps.
        position: int64 `[M]`, how many rows the streams had put into the rings before.
    """
    if key_mask is None:
        key_mask = tf.ones(tf.shape(key)[:2], bool)
    for ring, new in ((cache.keys, key), (cache.values, value), (cache.key_mask, key_mask)):
        put_steps(ring, new, step.numbers, position)


def _gradient_may_be_wanted(inputs: list[tf.Tensor], training: bool | None) -> bool:
    """Return whether the op must return what its gradient needs, a copy of the window."""
    if record.should_record_backprop(inputs):
        return True
    # A graph does not see a tape outside it. A graph of a single step is assumed to serve: the copy
    # would be half its time. A graph of many steps hardly notices it.
    return not tf.executing_eagerly() and (
        inputs[0].shape[1] != 1 if training is None else bool(training)
    )


tf.RegisterGradient("ContinualTransformers>SingleOutputAttention")(
    single_output_gradient.op_gradient
)


def expand_mask(
    mask: Any,
    m: int | None,
    t: int | None,
    cache: AttentionCache,
    all_rows: bool = False,
    heads: int | None = None,
) -> tf.Tensor | None:
    """Return a user's mask with its missing axes as 1: a bool tensor `[M, H, T, N]`; None for None.

    Args:
        mask: `[N]`, `[M, N]`, `[M, H, N]` or `[M, H, T, N]`.
        m, t: M and T; None if they are not known.
        cache: The `AttentionCache` whose H and N it must fit.
        all_rows: Whether all queries of the window attend. The mask then has `[N, N]` in place of
            `[N]`, the queries first.
        heads: H. None: that of the cache.

    Raises:
        ValueError: If it is not bool, or does not fit.
    """
    if mask is None:
        return None
    mask = _bool_tensor("attention_mask", mask)
    sizes = dict(M=m, H=heads or cache.keys.shape[2], T=t, N=cache.seq_len)
    window = "NN" if all_rows else "N"
    shapes = ["MHT"[:lead] + window for lead in range(4)]
    letters = next((shape for shape in shapes if len(shape) == mask.shape.rank), None)
    if letters is None or not all(
        got in (None, sizes[x]) or sizes[x] is None or (got == 1 and x != "N")
        for x, got in zip(letters, mask.shape, strict=True)
    ):
        *others, last = (f"[{', '.join(x)}]" for x in ([letters] if letters else shapes))
        expected = f"{', '.join(others)} or {last}" if others else last
        known = [f"{x} = {size}" for x, size in sizes.items()]
        raise ValueError(
            f"Expected attention_mask of shape {expected}, with {', '.join(known[:-1])} and "
            f"{known[-1]}, but got {tuple(mask.shape)}"
        )
    lead = len(letters) - len(window)
    for _ in range(3 - lead):
        mask = tf.expand_dims(mask, lead)
    return mask


def expand_key_mask(name: str, mask: Any, query: tf.Tensor, one_step: bool) -> tf.Tensor | None:
    """Return a user's mask of this call's steps as a bool tensor `[M, T]`; None for None.

    Args:
        name: The name of the argument, for the message.
        mask: `[M]` if `one_step`, otherwise `[M, T]`.
        query: Tensor `[M, T, ...]`, whose M and T it must fit.
        one_step: Whether the call takes one step.

    Raises:
        ValueError: If it is not bool, or does not fit.
    """
    if mask is None:
        return None
    mask = _bool_tensor(name, mask)
    expected = query.shape[:1] if one_step else query.shape[:2]
    if mask.shape.rank != len(expected) or not mask.shape.is_compatible_with(expected):
        raise ValueError(
            f"Expected {name} of shape {'[M]' if one_step else '[M, T]'}, {tuple(expected)}, but "
            f"got {tuple(mask.shape)}"
        )
    return tf.expand_dims(mask, 1) if one_step else mask


def _bool_tensor(name: str, mask: Any) -> tf.Tensor:
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool:
        raise ValueError(f"Expected {name} to be bool, but got {mask.dtype.name}")
    return mask


def scale_tensor(scale: float | tf.Tensor, on_host: bool = False) -> tf.Tensor:
    """Return the factor of the logits as a float64 tensor, which the ops take.

    Args:
        scale: A float or tensor.
        on_host: Whether a graph on a GPU keeps it on the host. The fused op needs it there, and
            would otherwise copy it from the GPU at every step.
    """
    if tf.is_tensor(scale):
        return tf.cast(scale, tf.float64)
    if tf.executing_eagerly():
        return _constant_scale(scale)
    with tf.device("CPU:0") if on_host else contextlib.nullcontext():
        return tf.constant(scale, tf.float64)


# An eager op makes a tensor of a float at every call. These few are kept.
@functools.lru_cache(maxsize=64)
def _constant_scale(scale: float) -> tf.Tensor:
    with tf.device("CPU:0"):
        return tf.constant(scale, tf.float64)
