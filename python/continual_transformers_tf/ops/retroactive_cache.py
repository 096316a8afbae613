"""The state of streams under retroactive attention."""

from typing import ClassVar

import tensorflow as tf

from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.stream_state import check_integer

RETROACTIVE_DTYPES = (tf.float32, tf.float64)


class RetroactiveCache(AttentionCache):
    """The queries, keys and values of the window of each stream, and each query's softmax.

    As of an `AttentionCache`, step number p of a stream lies in row p mod N of its rings.

    Args:
        streams, num_heads, seq_len, key_dim, value_dim: as `AttentionCache` has them.
        dtype: of queries, keys and values: float32 or float64. In half the bits a kept query would
            ask for something else than it did as it came.
        extra_rows: what else is kept of each stream, as `StreamState` has its rows.

    Attributes:
        keys, values, key_mask, position, compute_dtype, device_type: as of an `AttentionCache`.
        queries: tf.Variable `[S, N, H, D]`.
        softmax: tf.Variable float64 `[S, H, 4, N]`, of each row of the window what is subtracted
            from its logits, its denominator, and how large this and the sums have been.
        weighted_sum: tf.Variable float64 `[S, H, N, Dv]`, each row's sum of values.
        made_with: tf.Variable float64 `[S, 2]`, by which arithmetic, at which position and by which
            scale the former two were computed. If it does not fit the next step, this step computes
            them anew from the rings. So plain TensorFlow, calls of several steps, and steps that
            failed leave them.

    Raises:
        ValueError: if a size is not a positive integer (streams: not negative), or the dtype is
            another.
    """

    _old_names: ClassVar = {"query": "queries", **AttentionCache._old_names}

    def __init__(
        self,
        streams,
        num_heads,
        seq_len,
        key_dim,
        value_dim=None,
        dtype="float32",
        name=None,
        extra_rows=None,
    ):
        value_dim = key_dim if value_dim is None else value_dim
        sizes = dict(num_heads=num_heads, seq_len=seq_len, key_dim=key_dim, value_dim=value_dim)
        for size_name, size in sizes.items():
            check_integer(size_name, size, at_least=1)
        dtype = tf.as_dtype(dtype)
        if dtype not in RETROACTIVE_DTYPES:
            raise ValueError(
                f"Expected dtype to be one of {[t.name for t in RETROACTIVE_DTYPES]}, but got "
                f"{dtype.name}"
            )
        rows = dict(
            queries=([seq_len, num_heads, key_dim], dtype),
            softmax=([num_heads, 4, seq_len], tf.float64),
            weighted_sum=([num_heads, seq_len, value_dim], tf.float64),
            made_with=([2], tf.float64),
            **(extra_rows or {}),
        )
        super().__init__(
            streams, num_heads, seq_len, key_dim, value_dim, dtype, name=name, extra_rows=rows
        )

    @property
    def query(self):
        """Deprecated: the queries as a tensor `[S, H, N, D]`. Use `queries`."""
        return self._heads_first("query")
