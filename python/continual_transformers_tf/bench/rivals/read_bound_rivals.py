"""The bound: a plain vector loop that reads the bytes that a step must read."""

import numpy as np

from continual_transformers_tf.bench.rivals import Array, Contestant, Weights, rings_of
from continual_transformers_tf.bench.sizes import Size
from continual_transformers_tf.native import core_library


def _read_bound(size: Size, weights: Weights, threads: int) -> Contestant:
    del threads  # The bound is for one thread, even if the rivals use more.
    arrays = [*rings_of(size, weights), *(kernel for kernel, _ in weights)]
    # One array and so one call: every call from Python would add a third of a microsecond.
    everything = np.concatenate([array.ravel() for array in arrays])
    read = core_library().continual_transformers_read
    address, size_in_bytes = everything.ctypes.data, everything.nbytes

    def step(x: Array) -> Array:
        read(address, size_in_bytes)
        return everything

    return step, lambda x: x


RIVALS = {"read_bound": _read_bound}
