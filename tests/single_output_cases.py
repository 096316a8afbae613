"""Caches, steps and the reference's results, for the tests of single-output attention."""

import numpy as np
import tensorflow as tf

import reference
from continual_transformers_tf.ops import AttentionCache


def cache_at(positions, num_heads, seq_len, key_dim, value_dim, dtype, random):
    """Return a cache whose streams are at these positions, and the streams' references.

    Ring rows that no step has written hold NaN.
    """
    cache = AttentionCache(len(positions), num_heads, seq_len, key_dim, value_dim, dtype)
    state = cache.get_state()
    state["position"][:] = positions
    for name in ("keys", "values"):
        state[name][:] = np.nan
    streams = []
    for s, position in enumerate(positions):
        taken = min(position, seq_len)
        keys = random.normal(size=(taken, num_heads, key_dim)).astype(dtype)
        values = random.normal(size=(taken, num_heads, value_dim)).astype(dtype)
        for i in range(taken):
            row = (position - taken + i) % seq_len
            state["keys"][s, row] = keys[i]
            state["values"][s, row] = values[i]
            state["key_mask"][s, row] = True
        streams.append(reference.Stream(seq_len, keys, values))
    cache.set_state(state)
    return cache, streams


def steps_of(m, t, num_heads, key_dim, value_dim, dtype, random):
    query, key = random.normal(size=(2, m, t, num_heads, key_dim)).astype(dtype)
    return query, key, random.normal(size=(m, t, num_heads, value_dim)).astype(dtype)


def expected_of(streams, query, key, value, scale=None, mask=None, key_mask=None):
    """Step the references. Return output [M, T, H, Dv] and scores [M, H, T, N].

    mask is [M, H, T, N], key_mask [M, T].
    """
    nothing = [None] * len(streams)
    mask, key_mask = (nothing if x is None else x for x in (mask, key_mask))
    rows = zip(streams, query, key, value, mask, key_mask, strict=True)
    pairs = [s.take(q, k, v, scale, mask, has_key) for s, q, k, v, mask, has_key in rows]
    output, scores = (np.stack(x) for x in zip(*pairs, strict=True))
    return output, scores.swapaxes(1, 2)


GOOD = dict(
    query=np.zeros((2, 1, 3, 8), np.float32),
    key=np.zeros((2, 1, 3, 8), np.float32),
    value=np.zeros((2, 1, 3, 6), np.float32),
    streams=[0, 1],
)


BAD = {
    "rank of query": dict(query=np.zeros((2, 8), np.float32)),
    "heads of query": dict(query=np.zeros((2, 1, 4, 8), np.float32)),
    "size of query and key": {
        name: np.zeros((2, 1, 3, 9), np.float32) for name in ("query", "key")
    },
    "size of key": dict(key=np.zeros((2, 1, 3, 9), np.float32)),
    "steps of key": dict(key=np.zeros((2, 2, 3, 8), np.float32)),
    "rows of value": dict(value=np.zeros((1, 1, 3, 6), np.float32)),
    "size of value": dict(value=np.zeros((2, 1, 3, 8), np.float32)),
    "dtype of query": dict(query=tf.zeros((2, 1, 3, 8), tf.float64)),
    "dtype of value": dict(value=tf.zeros((2, 1, 3, 6), tf.int32)),
    "no steps": {
        name: np.zeros((2, 0, 3, 8 if name != "value" else 6), np.float32)
        for name in ("query", "key", "value")
    },
    "stream beyond": dict(streams=[0, 5]),
    "stream negative": dict(streams=[-1, 1]),
    "stream twice": dict(streams=[1, 1]),
    "stream beyond int32": dict(streams=np.array([0, 2**32])),
    "stream tensor beyond int32": dict(streams=tf.constant([0, 2**32], tf.int64)),
    "streams too few": dict(streams=[1]),
    "streams not a vector": dict(streams=[[0, 1]]),
    "streams not integers": dict(streams=[0.0, 1.0]),
    "mask of another window": dict(attention_mask=np.ones(6, bool)),
    "mask of other rows": dict(attention_mask=np.ones((3, 5), bool)),
    "mask of too many axes": dict(attention_mask=np.ones((1, 2, 3, 1, 5), bool)),
    "mask not bool": dict(attention_mask=np.ones(5, np.float32)),
    "key mask of other steps": dict(key_mask=np.ones((2, 2), bool)),
    "key mask of other rows": dict(key_mask=np.ones((3, 1), bool)),
    "key mask of another rank": dict(key_mask=np.ones(2, bool)),
    "key mask not bool": dict(key_mask=np.ones((2, 1), np.int32)),
}
