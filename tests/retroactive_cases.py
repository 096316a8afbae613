"""Caches, steps and the reference's results, for the tests of retroactive attention."""

import numpy as np
import tensorflow as tf

import reference
from continual_transformers_tf.ops import RetroactiveCache


def cache_at(positions, num_heads, seq_len, key_dim, value_dim, dtype, random):
    """Return a cache whose streams have taken so many steps, and their references.

    Ring rows that no step has written hold NaN, and so do the parts kept of their softmax.
    """
    cache = RetroactiveCache(len(positions), num_heads, seq_len, key_dim, value_dim, dtype)
    state = cache.get_state()
    state["position"][:] = positions
    for name in ("query", "key", "value", "softmax", "weighted_sum"):
        state[name][:] = np.nan
    streams = []
    for s, position in enumerate(positions):
        taken = min(position, seq_len)
        steps = steps_of(taken, num_heads, key_dim, value_dim, dtype=dtype, random=random)
        for name, x in zip(("query", "key", "value"), steps, strict=True):
            for i in range(taken):
                state[name][s, :, (position - taken + i) % seq_len] = x[i]
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
    """Step the references: output [M, T, H, N, Dv], or only the `newest` steps of it."""
    steps = query.shape[1]
    newest = steps if newest is None else newest
    rows = []
    for m, stream in enumerate(streams):
        outputs = [
            stream.step(
                *(x[m, t] for x in (query, key, value)),
                scale,
                has_key=key_mask is None or key_mask[m, t],
                compute=t >= steps - newest,
            )
            for t in range(steps)
        ]
        rows.append(np.stack(outputs[steps - newest :]))
    return np.stack(rows)


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


class PublishedUpdate:
    """The published update, in float32, of one head whose window is full.

    It adds and subtracts exponentials as they are.

    Args:
        queries, keys, values: [N, D], [N, D] and [N, Dv], the window, oldest first.
    """

    def __init__(self, queries, keys, values):
        self.queries, self.keys, self.values = (
            np.asarray(x, np.float32) for x in (queries, keys, values)
        )
        weights = self._weights(self.queries, self.keys)
        with np.errstate(all="ignore"):
            self.denominators, self.sums = weights.sum(1), weights @ self.values

    @staticmethod
    def _weights(queries, keys):
        with np.errstate(over="ignore"):
            return np.exp(queries @ keys.T * np.float32(keys.shape[1] ** -0.5))

    def step(self, query, key, value):
        """Take one step, [D], [D], [Dv], and return the outputs [N, Dv]."""
        kept = self.queries[1:]
        with np.errstate(all="ignore"):
            leaving = self._weights(kept, self.keys[:1])
            fresh = self._weights(kept, key[None])
            self.denominators = self.denominators[1:] + (fresh - leaving)[:, 0]
            self.sums = self.sums[1:] + fresh * value - leaving * self.values[:1]
            self.queries, self.keys, self.values = (
                np.concatenate([x[1:], new[None]])
                for x, new in (
                    (self.queries, query),
                    (self.keys, key),
                    (self.values, value),
                )
            )
            weights = self._weights(query[None], self.keys)
            self.denominators = np.append(self.denominators, weights.sum())
            self.sums = np.concatenate([self.sums, weights @ self.values])
            return self.sums / self.denominators[:, None]


def naive_attention(queries, keys, values):
    """Attend within a window, in its dtype: [n, D], [n, D], [n, Dv] -> [n, Dv]."""
    logits = queries @ keys.T * queries.dtype.type(keys.shape[1] ** -0.5)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values
