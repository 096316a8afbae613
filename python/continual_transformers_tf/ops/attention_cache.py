"""The state of streams under attention: rings of keys and values."""

import tensorflow as tf

from continual_transformers_tf.ops.stream_state import StreamState, check_integer

DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)


class AttentionCache(StreamState):
    """The keys and values of the window of each stream, changed in place by the attention ops.

    Step number p of a stream lies in row p mod N of its rings and is never moved. The variables are
    public, so that an op of one's own can use them; only the attention ops and the methods here
    should write to them.

    Args:
        streams: S, how many streams are held at first, numbered from 0.
        num_heads: H.
        seq_len: N, the rows of each ring: how many of the newest steps a query attends to.
        key_dim: D, the size of a head's keys.
        value_dim: Dv, the size of a head's values; None: key_dim.
        dtype: of keys and values: float32, float64, bfloat16 or float16.
        extra_rows: what else is kept of each stream, as `StreamState` has its rows.

    Attributes:
        key: tf.Variable `[S, H, N, D]`.
        value: tf.Variable `[S, H, N, Dv]`.
        key_mask: tf.Variable bool `[S, N]`, which steps have a key to attend to.
        position: tf.Variable int64 `[S]`, the steps each stream has taken.
        compute_dtype: what attention is computed in: float64 for float64, or else float32.
        device_type: of the device that holds them, such as "CPU".

    Raises:
        ValueError: if a size is not a positive integer (streams: not negative), or there is no
            attention on this dtype.
    """

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
        self.seq_len = seq_len
        self.dtype = tf.as_dtype(dtype)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"Expected dtype to be one of {[t.name for t in DTYPES]}, but got {self.dtype.name}"
            )
        self.compute_dtype = tf.float64 if self.dtype == tf.float64 else tf.float32
        rows = dict(
            key=([num_heads, seq_len, key_dim], self.dtype),
            value=([num_heads, seq_len, value_dim], self.dtype),
            key_mask=([seq_len], tf.bool),
            **(extra_rows or {}),
        )
        super().__init__(streams, rows, name=name)
        device = tf.DeviceSpec.from_string(self.key.device)
        self.device_type = device.device_type or "CPU"

    @property
    def ready(self):
        """bool tensor `[S]`: which streams' windows are full."""
        return self.position >= self.seq_len
