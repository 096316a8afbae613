"""What is raced: the sizes of the table, how cost grows, and the goals."""

from typing import NamedTuple


class Size(NamedTuple):
    """M streams of a layer with N steps in the window, E features and H heads of E / H."""

    seq_len: int
    features: int
    heads: int
    streams: int = 1

    @property
    def head(self):
        return self.features // self.heads

    @property
    def ring_bytes(self):
        """Keys and values of all streams, in float32."""
        return 2 * 4 * self.streams * self.seq_len * self.features

    @property
    def weight_bytes(self):
        return 4 * 4 * self.features * (self.features + 1)

    def __str__(self):
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
WINDOWS = tuple(Size(4**power, 128, 4) for power in range(2, 9))
STREAMS = tuple(Size(64, 128, 4, streams=10**power) for power in range(5))
QUICK = (Size(8, 16, 2), Size(8, 16, 2, streams=4))


def goals(size):
    """From a rival to how many times faster than it a step of this size is to be."""
    n, e, m = size.seq_len, size.features, size.streams
    if size not in TABLE:
        return {}
    long, small = n >= 4096, e <= 192
    found = {
        "continual_inference": 5 if e <= 512 or long else 3,
        "torch_sdpa": 2,
        "onnxruntime": 3 if long else 1.5 if (n, e) == (512, 512) else 1.2 if small else 1,
        "keras_recompute": 60 if long else 25 if small else 12,
    }
    if (n, e, m) == (64, 128, 256):
        found["ours_apart"] = 4
    return found
