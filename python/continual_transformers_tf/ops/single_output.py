"""Continual single-output attention on projected steps: the fused op, or its plain twin."""

import functools
import math

import tensorflow as tf

from continual_transformers_tf.ops import library, single_output_twin
from continual_transformers_tf.ops.stream_state import stream_tensor


def single_output_attention(
    query,
    key,
    value,
    cache,
    *,
    streams=None,
    attention_mask=None,
    scale=None,
    return_attention_scores=False,
    update_state=True,
):
    """Takes steps of streams: each step's query attends to the newest N steps of its stream.

    The N steps end with the step itself, whose key and value are among them. While a stream has
    taken fewer than N steps, it attends to those there are. Continual single-output attention of
    Hedegaard & Iosifidis, "Continual Transformers" (ICLR 2023, arXiv 2201.06268), section 3.3.

    Args:
        query: `[M, H, D]`, one step of M streams, or `[M, T, H, D]`, T steps. Of the cache's dtype.
        key: of the shape of query.
        value: `[M, H, Dv]` or `[M, T, H, Dv]`.
        cache: an `AttentionCache` of S streams; changed in place.
        streams: integers `[M]`, which stream each row belongs to, in any order, each once; None:
            row i is stream i.
        attention_mask: bool, which steps of the window may be attended to, oldest first (column
            N - 1 is the newest step): `[N]`, `[M, N]`, `[M, H, N]` or `[M, H, T, N]`. None: all.
        scale: what the logits are multiplied by; None: 1 / sqrt(D).
        return_attention_scores: whether to return the softmax too.
        update_state: if False, nothing changes: the output is that of the next real call.

    Returns:
        `[M, H, Dv]` or `[M, T, H, Dv]`, zeros where everything is masked. With
        return_attention_scores also `[M, H, N]` or `[M, H, T, N]`: the softmax over the window,
        oldest step first, 0 where there was no step yet.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: if shapes, dtypes or streams do not fit the
            cache or each other. The cache is then as it was.
    """
    query, key, value = (tf.convert_to_tensor(x, dtype=cache.dtype) for x in (query, key, value))
    one_step = query.shape.rank == 3
    if one_step:
        query, key, value = (tf.expand_dims(x, 1) for x in (query, key, value))
    output, scores, _ = attend_steps(
        query,
        key,
        value,
        cache,
        streams=stream_tensor(tf.range(tf.shape(query)[0]) if streams is None else streams),
        attention_mask=expand_mask(attention_mask, query, cache),
        scale=scale,
        return_attention_scores=return_attention_scores,
        update_state=update_state,
    )
    if one_step:
        output = tf.squeeze(output, 1)
    if not return_attention_scores:
        return output
    return output, tf.squeeze(scores, 2) if one_step else scores


def attend_steps(
    query,
    key,
    value,
    cache,
    *,
    streams,
    attention_mask=None,
    scale=None,
    return_attention_scores=False,
    update_state=True,
):
    """`single_output_attention` for those who hold tensors of the right ranks: one op, eagerly.

    Args:
        query, key, value: tensors `[M, T, H, D]` and `[M, T, H, Dv]`.
        cache, scale, return_attention_scores, update_state: as there.
        streams: int32 tensor `[M]`.
        attention_mask: bool tensor `[M, H, T, N]`, the first three axes may be 1; or None.

    Returns:
        (output `[M, T, H, Dv]`, scores `[M, H, T, N]`, or of no columns where not wanted, and
        int64 `[M]`, the steps that each of these streams has taken, these among them).
    """
    fused = library.fused_ops(cache.dtype, cache.device_type)
    take_steps = single_output_twin.attend_steps
    if fused is not None:
        take_steps = fused.continual_transformers_single_output_attention
    with cache.lock:
        return take_steps(
            query=query,
            key=key,
            value=value,
            key_cache=cache.key.handle if fused else cache.key,
            value_cache=cache.value.handle if fused else cache.value,
            position=cache.position.handle if fused else cache.position,
            streams=streams,
            scale=_scale(1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale),
            attention_mask=[] if attention_mask is None else [attention_mask],
            return_attention_scores=return_attention_scores,
            update_state=update_state,
        )


@tf.RegisterGradient("ContinualTransformers>SingleOutputAttention")
def _no_gradient(op, *_):
    raise LookupError(
        f"The fused op {op.type} has no gradient: train on windows, by regular calls, or in steps "
        f"with {library.BACKEND_VARIABLE}=tensorflow, whose plain ops have gradients"
    )


def expand_mask(mask, query, cache):
    """A user's mask with its missing axes as 1: bool tensor `[M, H, T, N]`, or None for None.

    Args:
        mask: `[N]`, `[M, N]`, `[M, H, N]` or `[M, H, T, N]`.
        query: tensor `[M, T, ...]`, whose M and T it must fit.
        cache: the `AttentionCache` whose H and N it must fit.

    Raises:
        ValueError: if it is not bool, or does not fit.
    """
    if mask is None:
        return None
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool:
        raise ValueError(f"Expected attention_mask to be bool, but got {mask.dtype.name}")
    m, t, (_, h, n, _) = query.shape[0], query.shape[1], cache.key.shape
    letters, full = {
        1: ("[N]", (n,)),
        2: ("[M, N]", (m, n)),
        3: ("[M, H, N]", (m, h, n)),
        4: ("[M, H, T, N]", (m, h, t, n)),
    }.get(mask.shape.rank, ("[N], [M, N], [M, H, N] or [M, H, T, N]", ()))
    fits = len(full) == mask.shape.rank and all(
        got == size or got is None or size is None or (got == 1 and axis < len(full) - 1)
        for axis, (got, size) in enumerate(zip(mask.shape, full, strict=True))
    )
    if not fits:
        raise ValueError(
            f"Expected attention_mask of shape {letters}, with M = {m}, H = {h}, T = {t} and "
            f"N = {n}, but got {tuple(mask.shape)}"
        )
    for axis in {1: (0, 0, 0), 2: (1, 1), 3: (2,), 4: ()}[len(full)]:
        mask = tf.expand_dims(mask, axis)
    return mask


def _scale(scale):
    if tf.is_tensor(scale):
        return tf.cast(scale, tf.float64)
    return _constant_scale(scale) if tf.executing_eagerly() else tf.constant(scale, tf.float64)


# A float handed to an eager op becomes a tensor at every call; these few are kept.
@functools.lru_cache(maxsize=64)
def _constant_scale(scale):
    return tf.constant(scale, tf.float64)
