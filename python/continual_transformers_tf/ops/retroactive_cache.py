"""The state of streams under retroactive attention."""

from typing import Any, ClassVar

import tensorflow as tf

from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.stream_state import check_integer

RETROACTIVE_DTYPES = (tf.float32, tf.float64)


class RetroactiveCache(AttentionCache):
    """The queries, keys and values of the window of each stream, and each query's softmax.

    As in an `AttentionCache`, step number p of a stream lies in row p mod N of its rings.

    Args:
        streams, num_heads, seq_len, key_dim, value_dim: As in `AttentionCache`.
        dtype: The dtype of queries, keys and values: float32 or float64. In half precision a kept
            query would be rounded, and would attend to other steps than when it came.
        extra_rows: What else is kept of each stream, as `rows` in `StreamState`.

    Attributes:
        keys, values, key_mask, position, compute_dtype, device_type: As in `AttentionCache`.
        queries: tf.Variable `[S, N, H, D]`.
        softmax: tf.Variable float64 `[S, H, 4, N]`. For each row of the window: the value that is
            subtracted from its logits, its denominator, and how large this and the sums have been.
        weighted_sum: tf.Variable float64 `[S, H, N, Dv]`, each row's weighted sum of values.
        made_with: tf.Variable float64 `[S, 2]`: the arithmetic, the position and the scale that
            softmax and weighted_sum were computed with. If these do not fit the next step, it
            computes both again from the rings. This is the case after steps in plain TensorFlow,
            after calls of several steps, and after steps that failed.

    Raises:
        ValueError: If a size is not a positive integer (streams may be 0), or the dtype is neither
            float32 nor float64.
    """

    _old_names: ClassVar = {"query": "queries", **AttentionCache._old_names}

    def __init__(
        self,
        streams: int,
        num_heads: int,
        seq_len: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: Any = "float32",
        name: str | None = None,
        extra_rows: dict[str, tuple[Any, Any]] | None = None,
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
    def query(self) -> tf.Tensor:
        """Deprecated: the queries as a tensor `[S, H, N, D]`. Use `queries`."""
        return self._heads_first("query")
