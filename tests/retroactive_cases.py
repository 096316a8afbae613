"""Caches, steps and the reference's results, for the tests of retroactive attention."""

import numpy as np
import tensorflow as tf

import reference
from continual_transformers_tf.ops import RetroactiveCache


def cache_at(positions, num_heads, seq_len, key_dim, value_dim, dtype, random):
    """Return a cache whose streams are at these positions, and the streams' references.

    Ring rows that no step has written hold NaN. So do the kept parts of their softmax.
    """
    cache = RetroactiveCache(len(positions), num_heads, seq_len, key_dim, value_dim, dtype)
    state = cache.get_state()
    state["position"][:] = positions
    for name in ("queries", "keys", "values", "softmax", "weighted_sum"):
        state[name][:] = np.nan
    streams = []
    for s, position in enumerate(positions):
        taken = min(position, seq_len)
        steps = steps_of(taken, num_heads, key_dim, value_dim, dtype=dtype, random=random)
        for name, x in zip(("queries", "keys", "values"), steps, strict=True):
            for i in range(taken):
                state[name][s, (position - taken + i) % seq_len] = x[i]
        for i in range(taken):
            state["key_mask"][s, (position - taken + i) % seq_len] = True
        streams.append(reference.RetroactiveStream(seq_len, *steps))
    cache.set_state(state)
    return cache, streams


def steps_of(*sizes, dtype, random):
    """Return query, key [*lead, H, D] and value [*lead, H, Dv]; sizes is lead, H, D, Dv."""
    *lead, key_dim, value_dim = sizes
    query, key = random.normal(size=(2, *lead, key_dim)).astype(dtype)
    return query, key, random.normal(size=(*lead, value_dim)).astype(dtype)


def expected_of(streams, query, key, value, scale=None, key_mask=None, newest=None):
    """Step the references. Return output [M, T, H, N, Dv], or only its `newest` steps."""
    key_mask = [None] * len(streams) if key_mask is None else key_mask
    rows = zip(streams, query, key, value, key_mask, strict=True)
    return np.stack([s.take(q, k, v, scale, has_key, newest) for s, q, k, v, has_key in rows])


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
    "half precision": dict(query=tf.zeros((2, 1, 3, 8), tf.bfloat16)),
    "dtype of value": dict(value=tf.zeros((2, 1, 3, 6), tf.int32)),
    "no steps": {
        name: np.zeros((2, 0, 3, 8 if name != "value" else 6), np.float32)
        for name in ("query", "key", "value")
    },
    "stream beyond": dict(streams=[0, 5]),
    "stream negative": dict(streams=[-1, 1]),
    "stream twice": dict(streams=[1, 1]),
    "streams too few": dict(streams=[1]),
    "streams not a vector": dict(streams=[[0, 1]]),
    "streams not integers": dict(streams=[0.0, 1.0]),
    "key mask of other steps": dict(key_mask=np.ones((2, 2), bool)),
    "key mask of other rows": dict(key_mask=np.ones((3, 1), bool)),
    "key mask not bool": dict(key_mask=np.ones((2, 1), np.int32)),
    "algorithm": dict(algorithm="published"),
}
