"""The state of streams under attention: rings of keys and values."""

import warnings
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from continual_transformers_tf.ops.stream_state import StreamState, check_integer

DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)


class AttentionCache(StreamState):
    """The keys and values of the window of each stream, changed in place by the attention ops.

    Step number p of a stream lies in row p mod N of its rings and is never moved. The variables are
    public, so that your own ops can use them. Only the attention ops and the methods here should
    write to them.

    Args:
        streams: S, the number of streams held at first. They are numbered from 0.
        num_heads: H, the number of heads.
        seq_len: N, the window: a query attends to this many of the newest steps. Each ring has N
            rows.
        key_dim: D, the size of a head's keys.
        value_dim: Dv, the size of a head's values; None: key_dim.
        dtype: The dtype of keys and values: float32, float64, bfloat16 or float16.
        extra_rows: What else is kept of each stream, as `rows` in `StreamState`.

    Attributes:
        keys: tf.Variable `[S, N, H, D]`.
        values: tf.Variable `[S, N, H, Dv]`.
        key_mask: tf.Variable bool `[S, N]`, which steps have a key that queries may attend to.
        position: tf.Variable int64 `[S]`, the steps each stream has taken.
        compute_dtype: The dtype that attention computes in: float64 for float64, otherwise float32.
        device_type: The type of the device that holds the variables, such as "CPU".

    Raises:
        ValueError: If a size is not a positive integer (streams may be 0), or attention does not
            support the dtype.
    """

    # States from before the rings were sequence first: their names there, with axes [S, H, N, D].
    _old_names: ClassVar = {"key": "keys", "value": "values"}

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
    def ready(self) -> tf.Tensor:
        """Which streams have a full window: a bool tensor `[S]`."""
        return self.position >= self.seq_len

    def arrays_of(self, state: Any, rows: int | None = None) -> dict[str, np.ndarray]:
        """See `StreamState.arrays_of`. Also takes states with the old names and order of axes."""
        return super().arrays_of(with_new_names(state, self._old_names), rows)

    @property
    def key(self) -> tf.Tensor:
        """Deprecated: the keys as a tensor `[S, H, N, D]`. Use `keys`."""
        return self._heads_first("key")

    @property
    def value(self) -> tf.Tensor:
        """Deprecated: the values as a tensor `[S, H, N, Dv]`. Use `values`."""
        return self._heads_first("value")

    def _heads_first(self, old_name: str) -> tf.Tensor:
        name = self._old_names[old_name]
        warnings.warn(
            f"{type(self).__name__}.{old_name} is deprecated: use {name}, whose axes are "
            "[S, N, H, size]",
            DeprecationWarning,
            stacklevel=3,
        )
        return tf.transpose(getattr(self, name), (0, 2, 1, 3))


def with_new_names(state: Any, old_names: dict[str, str]) -> Any:
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
