"""The state of streams under attention: rings of keys and values."""

import warnings
from typing import ClassVar

import numpy as np
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
        keys: tf.Variable `[S, N, H, D]`.
        values: tf.Variable `[S, N, H, Dv]`.
        key_mask: tf.Variable bool `[S, N]`, which steps have a key to attend to.
        position: tf.Variable int64 `[S]`, the steps each stream has taken.
        compute_dtype: what attention is computed in: float64 for float64, or else float32.
        device_type: of the device that holds them, such as "CPU".

    Raises:
        ValueError: if a size is not a positive integer (streams: not negative), or there is no
            attention on this dtype.
    """

    # States from before the rings were sequence first: their names there, with axes [S, H, N, D].
    _old_names: ClassVar = {"key": "keys", "value": "values"}

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
            keys=([seq_len, num_heads, key_dim], self.dtype),
            values=([seq_len, num_heads, value_dim], self.dtype),
            key_mask=([seq_len], tf.bool),
            **(extra_rows or {}),
        )
        super().__init__(streams, rows, name=name)
        device = tf.DeviceSpec.from_string(self.keys.device)
        self.device_type = device.device_type or "CPU"

    @property
    def ready(self):
        """bool tensor `[S]`: which streams' windows are full."""
        return self.position >= self.seq_len

    def arrays_of(self, state, rows=None):
        """See `StreamState.arrays_of`. Also takes states with the old names and order of axes."""
        return super().arrays_of(with_new_names(state, self._old_names), rows)

    @property
    def key(self):
        """Deprecated: the keys as a tensor `[S, H, N, D]`. Use `keys`."""
        return self._heads_first("key")

    @property
    def value(self):
        """Deprecated: the values as a tensor `[S, H, N, Dv]`. Use `values`."""
        return self._heads_first("value")

    def _heads_first(self, old_name):
        name = self._old_names[old_name]
        warnings.warn(
            f"{type(self).__name__}.{old_name} is deprecated: use {name}, whose axes are "
            "[S, N, H, size]",
            DeprecationWarning,
            stacklevel=3,
        )
        return tf.transpose(getattr(self, name), (0, 2, 1, 3))


def with_new_names(state, old_names):
    """Return a state with its rings `[M, N, H, size]` under their present names.

    Args:
        state: What the user gave as a state.
        old_names: Dict from old names to present names. Under the old names, rings are
            `[M, H, N, size]`.

    Returns:
        A new dict; or the state itself if it does not have exactly the old names.
    """
    is_old = isinstance(state, dict) and all(
        old in state and new not in state for old, new in old_names.items()
    )
    if not is_old:
        return state
    renamed = {}
    for name, array in state.items():
        if name in old_names:
            array = np.asarray(array)
            # Arrays of any other rank fail the later checks of shapes.
            array = array.swapaxes(1, 2) if array.ndim == 4 else array
        renamed[old_names.get(name, name)] = array
    return renamed
