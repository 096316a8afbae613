"""The models that session_benchmark.py times, and the streams of a step."""

from typing import NamedTuple

STREAMS = (1, 16, 17, 64, 256, 4096)
MOST_KEYS = 1 << 28  # Numbers in a step's keys. With as many values, they are 2 GB in float32.


class SessionSize(NamedTuple):
    """A model: `layers` encoder blocks with one output a step, or one retroactive attention layer.

    Attributes:
        kind: "encoder", "co_oad_tr" (an encoder between two dense layers, norms first, and no
            biases in attention), or "retroactive".
        inputs, outputs: The features of a step's input and output, where they are not `features`.
    """

    name: str
    kind: str
    layers: int
    window: int
    features: int
    heads: int
    hidden: int = 0
    inputs: int = 0
    outputs: int = 0


SIZES = (
    SessionSize("three_layers", "encoder", 3, 64, 128, 4, 128),
    # The paper's CoOadTR-b1: 37.9 MB of weights.
    SessionSize("co_oad_tr_b1", "co_oad_tr", 1, 64, 1024, 8, 1024, 3072, 22),
    # Its window is cut into parts, one block of threads each. 67 MB of keys and values a stream.
    SessionSize("long_window", "encoder", 1, 16384, 512, 8, 512),
    *(
        SessionSize(f"retroactive_{window}", "retroactive", 1, window, 128, 4)
        for window in (64, 128, 256, 512)
    ),
)


def jobs():
    """Return pairs of size and streams, the most telling first: one stream, then more.

    A long window has only few streams: see `MOST_KEYS`.
    """
    return [
        (size, streams)
        for streams in STREAMS
        for size in SIZES
        if streams * size.window * size.features <= MOST_KEYS
    ]
