"""The sizes of the layers and whole models in the races, and the goals."""

from typing import NamedTuple


class Size(NamedTuple):
    """The size of a layer: N steps in the window, E features, H heads of E / H, and M streams."""

    seq_len: int
    features: int
    heads: int
    streams: int = 1

    @property
    def head(self) -> int:
        """D, the features of a head."""
        return self.features // self.heads

    @property
    def ring_bytes(self) -> int:
        """The bytes of all streams' keys and values, in float32."""
        return 2 * 4 * self.streams * self.seq_len * self.features

    def __str__(self) -> str:
        many = f" M={self.streams}" if self.streams > 1 else ""
        return f"N={self.seq_len} E={self.features} H={self.heads}{many}"


# Heads of 32, 24, 33 (and an odd E), 12, 64 and 128 features.
TABLE = (
    Size(64, 128, 4),
    Size(64, 96, 4),
    Size(64, 99, 3),
    Size(120, 192, 16),
    Size(64, 512, 8),
    Size(64, 1024, 8),
    Size(512, 512, 8),
    Size(4096, 1024, 16),
    Size(64, 128, 4, streams=32),
    Size(64, 99, 3, streams=32),
    Size(256, 512, 8, streams=32),
    Size(64, 128, 4, streams=256),
    Size(256, 512, 8, streams=256),
)
WINDOWS = tuple(Size(4**power, 128, 4) for power in range(2, 8))
STREAMS = tuple(Size(64, 128, 4, streams=10**power) for power in range(4))
QUICK = (Size(8, 16, 2), Size(8, 16, 2, streams=4))
RETROACTIVE_TABLE = tuple(Size(64 * 2**power, 128, 4) for power in range(4))
RETROACTIVE_QUICK = (Size(8, 16, 2),)

# Rivals that keep or compute whole windows are left out where M N is more: they take minutes, and
# the trend is clear without them.
MOST_RECOMPUTED = 16384

# Ahead of these at every size; twice as fast where a step that takes no longer than its bound would
# be.
RIVALS_TO_BEAT = ("onnxruntime", "torch_sdpa", "continual_inference")
MODEL_RIVALS_TO_BEAT = ("onnxruntime", "torch_ring")
# At most how many times the float32 session's time, in the sizes of `has_narrow_goals`.
NARROW_GOALS = {"session_bfloat16": 0.6, "session_int8": 0.4}
# Two threads are to be this many times as fast as one, from so many streams on.
THREADS_GOAL, THREADS_GOAL_FROM = 1.8, 64
RETROACTIVE_GOALS = {"retroactive_keras": 4.0, "retroactive_bound": 2.0}
ATTENTION_GOAL = 1.15


def rival_goal(over_bound: float) -> float:
    """Return how many times as fast as a rival a step should be.

    Args:
        over_bound: How many times the bound the rival takes.
    """
    return 2 if over_bound >= 2 else 1


def bound_goal(size: Size) -> float | None:
    """Return how many times its bound a session's step may take, or None."""
    if size.streams >= 32:
        return 1.3
    if size.streams > 1:
        return None
    return 1.25 if size.features <= 192 else 1.1 if size.features >= 512 else None


def has_narrow_goals(size: Size) -> bool:
    """Return whether bfloat16 and int8 have goals: where reading weights, or rings, is the step."""
    reads_weights = size.streams == 1 and size.seq_len == 64 and size.features >= 512
    return reads_weights or size == Size(256, 512, 8, streams=256)


class AttentionSize(NamedTuple):
    """The size of attention alone: N steps in the window, H heads of D features."""

    seq_len: int
    heads: int
    head: int

    def __str__(self) -> str:
        return f"N={self.seq_len} H={self.heads} D={self.head}"


# With whether the rings are those of as many streams as fill the last-level cache twice. The others
# are of one stream: 260 to 400 KB in float32, which is more than a first-level cache has in int8.
ATTENTION = (
    (AttentionSize(64, 8, 64), False),
    (AttentionSize(256, 4, 32), False),
    (AttentionSize(256, 16, 12), False),
    (AttentionSize(256, 4, 33), False),
    (AttentionSize(64, 8, 64), True),
    (AttentionSize(256, 4, 32), True),
)
ATTENTION_QUICK = ((AttentionSize(8, 2, 8), False),)


class ModelSize(NamedTuple):
    """The size of a model (dense, positional encoding, L encoder blocks, dense) and M streams."""

    streams: int
    seq_len: int
    features: int  # The input's features.
    embed_dim: int
    heads: int
    layers: int

    @property
    def head(self) -> int:
        """D, the features of a head."""
        return self.embed_dim // self.heads

    @property
    def position_rows(self) -> int:
        """How many rows the positional encoding has."""
        return 2 * self.seq_len - 1

    @property
    def receptive_field(self) -> int:
        """How many steps an output depends on."""
        return 1 + self.layers * (self.seq_len - 1)

    def __str__(self) -> str:
        return (
            f"M={self.streams} N={self.seq_len} F={self.features} E={self.embed_dim} "
            f"H={self.heads} L={self.layers}"
        )


MODEL_OUTPUTS = 10
MODEL_TABLE = (
    ModelSize(1, 100, 6, 48, 4, 1),
    ModelSize(1, 64, 32, 64, 4, 3),
    ModelSize(1, 64, 128, 128, 4, 3),
    ModelSize(32, 64, 32, 64, 4, 3),
    ModelSize(256, 64, 128, 128, 4, 3),
    ModelSize(1000, 64, 32, 64, 4, 3),
)
MODEL_QUICK = (ModelSize(1, 8, 5, 16, 2, 2), ModelSize(3, 8, 5, 16, 2, 2))

# How many microseconds a step from Python may take more than the same step in C++.
PYTHON_GOAL = 1.0


def model_bound_goal(size: ModelSize) -> float | None:
    """Return how many times its bound a step in C++ may take, or None."""
    if size.streams >= 32:
        return 1.3
    return 1.25 if size.embed_dim in (64, 128) else None
