"""The published retroactive update, and naive attention, in NumPy.

The tests and `benchmarks/retroactive_errors.py` compare the package with them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class PublishedUpdate:
    """The published update, in float32, of one head whose window is full.

    It adds and subtracts exponentials as they are.

    Args:
        queries, keys, values: [N, D], [N, D] and [N, Dv], the window, oldest first.
    """

    def __init__(self, queries: Array, keys: Array, values: Array) -> None:
        self.queries, self.keys, self.values = (
            np.asarray(x, np.float32) for x in (queries, keys, values)
        )
        weights = self._weights(self.queries, self.keys)
        with np.errstate(all="ignore"):
            self.denominators, self.sums = weights.sum(1), weights @ self.values

    @staticmethod
    def _weights(queries: Array, keys: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(queries @ keys.T * np.float32(keys.shape[1] ** -0.5))

    def step(self, query: Array, key: Array, value: Array) -> Array:
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


def naive_attention(queries: Array, keys: Array, values: Array) -> Array:
    """Attend within a window, in its dtype: [n, D], [n, D], [n, Dv] -> [n, Dv]."""
    logits = queries @ keys.T * queries.dtype.type(keys.shape[1] ** -0.5)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ values
