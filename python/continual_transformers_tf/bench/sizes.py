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

    @property
    def weight_bytes(self) -> int:
        """The bytes of the four projections' weights, in float32."""
        return 4 * 4 * self.features * (self.features + 1)

    def __str__(self) -> str:
        many = f" M={self.streams}" if self.streams > 1 else ""
        return f"N={self.seq_len} E={self.features} H={self.heads}{many}"


TABLE = (
    Size(64, 128, 4),
    Size(120, 192, 16),
    Size(64, 1024, 8),
    Size(512, 512, 8),
    Size(4096, 1024, 16),
    Size(256, 512, 8, streams=32),
    Size(64, 128, 4, streams=32),
    Size(64, 128, 4, streams=256),
)
WINDOWS = tuple(Size(4**power, 128, 4) for power in range(2, 8))
STREAMS = tuple(Size(64, 128, 4, streams=10**power) for power in range(4))
QUICK = (Size(8, 16, 2), Size(8, 16, 2, streams=4))


def goals(size: Size) -> dict[str, float]:
    """Return a dict from rivals to how many times faster than them a step should be."""
    n, e, m = size.seq_len, size.features, size.streams
    if size not in TABLE:
        return {}
    long, small = n >= 4096, e <= 192
    found: dict[str, float] = {
        "continual_inference": 5 if e <= 512 or long else 3,
        "torch_sdpa": 2,
        "onnxruntime": 3 if long else 1.5 if (n, e) == (512, 512) else 1.2 if small else 1,
        "keras_recompute": 60 if long else 25 if small else 12,
    }
    if (n, e, m) == (64, 128, 256):
        found["ours_apart"] = 4
    return found


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
    ModelSize(64, 64, 32, 64, 4, 3),
    ModelSize(256, 64, 128, 128, 4, 3),
)
MODEL_QUICK = (ModelSize(1, 8, 5, 16, 2, 2), ModelSize(3, 8, 5, 16, 2, 2))

# By the number of streams: how many times faster a session's step should be than a rival's, both
# from Python.
MODEL_GOALS = {
    "onnxruntime": {1: 6, 64: 4, 256: 3},
    "torch_ring": {1: 25, 64: 5, 256: 2},
    "sequence_layers": {1: 5, 64: 4, 256: 4},
    "keras_windows": {1: 100},
}
# By the number of streams: how many times its bound a step in C++ may take.
MODEL_BOUND_GOALS = {1: 1.4, 64: 1.7, 256: 1.7}
# How many microseconds a step from Python may take more than the same step in C++.
PYTHON_GOAL = 1.0
