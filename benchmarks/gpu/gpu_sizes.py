"""The sizes that are timed, and the operations and least bytes of each step."""

from typing import NamedTuple

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
WINDOWS = (16, 64, 256, 512, 1024, 4096, 16384, 65536)
HEADS = 8
STREAMS = (1, 8, 64, 512, 2048)  # Times HEADS, this is 8 to 16,384 heads.
DIMS = (64, 128)
DTYPES = ("float32", "bfloat16", "float16")
LAYER_STREAMS = (1, 16, 17, 64, 256, 4096)
# One block for each query is 4, 4.5 and 8 for each of 132 multiprocessors.
QUERIES = (528, 600, 1056)


class AttentionSize(NamedTuple):
    """One step of some streams, with query, key and value already projected."""

    streams: int
    heads: int
    window: int
    dim: int
    dtype: str

    @property
    def compute_bytes(self):
        """The bytes of a number in the computation."""
        return max(4, ITEM_BYTES[self.dtype])

    @property
    def ring_bytes(self):
        """The bytes of the stored keys and values."""
        rows = self.streams * self.heads * self.window
        return 2 * rows * self.dim * ITEM_BYTES[self.dtype]

    @property
    def bytes(self):
        """The bytes that a step must read or write.

        It reads each key and value of the window once, and the mask of steps that have a key. It
        reads the newest key and value, and writes them to the ring. It reads queries and writes
        outputs.
        """
        newest = 2 * self.streams * self.heads * self.dim * ITEM_BYTES[self.dtype]
        asked = 2 * self.streams * self.heads * self.dim * self.compute_bytes
        return self.ring_bytes + newest + asked + self.streams * self.window

    @property
    def operations(self):
        """Multiplications and additions of query . key and weight . value."""
        return 4 * self.streams * self.heads * self.window * self.dim

    def __str__(self):
        return f"S={self.streams} H={self.heads} N={self.window} D={self.dim} {self.dtype}"


# Others have published their times for these sizes. LATENCY_GOAL (gpu_report.py) is the goal.
GOAL_SIZES = (AttentionSize(1, 16, 512, 128, "bfloat16"), AttentionSize(2, 8, 1024, 64, "bfloat16"))


class LayerSize(NamedTuple):
    """One step of a whole layer: E features in and out, D = E / H.

    With `hidden` features it is a step of an encoder block, with its norms and feed-forward part.
    """

    streams: int
    features: int
    heads: int
    window: int
    dtype: str  # The dtype of the weights and the ring.
    hidden: int = 0

    @property
    def attention(self):
        dim = self.features // self.heads
        return AttentionSize(self.streams, self.heads, self.window, dim, self.dtype)

    @property
    def weights_bytes(self):
        """The bytes of all kernels, biases and norms."""
        vectors = 4 * self.features
        if self.hidden:
            vectors += 5 * self.features + self.hidden
        return self.kernel_numbers * ITEM_BYTES[self.dtype] + vectors * self.attention.compute_bytes

    @property
    def kernel_numbers(self):
        return 4 * self.features**2 + 2 * self.features * self.hidden

    @property
    def bytes(self):
        """The bytes that a step must read or write: weights and windows once, inputs, outputs."""
        ends = 2 * self.streams * self.features * self.attention.compute_bytes
        return self.weights_bytes + self.attention.ring_bytes + ends

    @property
    def operations(self):
        return 2 * self.streams * self.kernel_numbers + self.attention.operations

    def __str__(self):
        block = f" F={self.hidden}" if self.hidden else ""
        return (
            f"M={self.streams} E={self.features} H={self.heads} N={self.window}{block} {self.dtype}"
        )


class RetroactiveSize(NamedTuple):
    """One step of retroactive attention, in float32: the outputs of all queries of the window."""

    streams: int
    heads: int
    window: int
    dim: int

    @property
    def bytes(self):
        """The bytes that an update must read or write, without the few that are not N rows.

        It reads queries, and reads and writes the sums of values and three numbers of each row's
        softmax, all in double. It computes the newest row from all keys and values. It writes the
        outputs.
        """
        rows = self.streams * self.heads * self.window
        return rows * (4 * 4 * self.dim + 2 * 8 * self.dim + 2 * 8 * 3)

    def __str__(self):
        return f"S={self.streams} H={self.heads} N={self.window} D={self.dim} retroactive"


def retroactive_sizes():
    """Return the sizes that tell from which window on an update is faster than recomputing."""
    return [
        RetroactiveSize(streams, HEADS, window, 64)
        for streams in (1, 64)
        for window in (16, 64, 128, 256, 512, 1024)
    ]


def attention_sizes():
    """Return the sizes, the most important first: if time runs out, the last are missing."""
    sizes = [
        AttentionSize(streams, HEADS, window, dim, dtype)
        for dtype in DTYPES
        for dim in DIMS
        for streams in STREAMS
        for window in WINDOWS
    ]
    sizes += [AttentionSize(queries // HEADS, HEADS, 4096, 64, "bfloat16") for queries in QUERIES]
    # The paper's audio model, whose rows of 12 are no multiple of 16 bytes in 16-bit types.
    sizes += [
        AttentionSize(streams, 16, 120, 12, dtype)
        for dtype in ("float32", "bfloat16")
        for streams in (1, 2048)
    ]
    sizes += [AttentionSize(1, HEADS, window, 64, "float64") for window in (64, 512)]

    def rank(size):
        usual = size.dim in (12, 64) and size.dtype in ("float32", "bfloat16")
        return (
            not usual,
            size.dtype == "float64",
            size.dim != 64,
            size.dim,
            size.dtype != "bfloat16",
        )

    others = [size for size in sizes if size not in GOAL_SIZES]
    return [*GOAL_SIZES, *sorted(others, key=rank)]


def layer_sizes():
    """Return the paper's sizes: E = 1024, 8 heads, windows of 64; for a layer and a whole block."""
    return [
        LayerSize(streams, 1024, 8, 64, dtype, hidden)
        for streams in LAYER_STREAMS
        for hidden in (0, 1024)
        for dtype in ("float32", "bfloat16")
    ]


def window_parts_sizes():
    """Return the sizes that are timed with several numbers of window parts."""
    return [AttentionSize(1, HEADS, window, 64, "bfloat16") for window in (512, 65536)]


def window_parts(window):
    """Return the numbers of parts to try: powers of 2, with at least 32 rows in each."""
    return [2**i for i in range(9) if 2**i * 32 <= window]


def copies_beyond(cache_bytes, size_bytes):
    """Return how many sets of `size_bytes` to use in turn, so that none is still in a cache."""
    return 1 if size_bytes > 2 * cache_bytes else 2 * cache_bytes // size_bytes + 2


def why_skipped(size, memory_bytes):
    """Return why a size cannot be measured in this much memory; None if it can."""
    needed = size.ring_bytes
    if needed > memory_bytes:
        return f"{needed / 1e9:.1f} GB of rings do not fit into {memory_bytes / 1e9:.1f} GB"
    return None
