"""The bound: one plain vector read loop over what a step must touch."""

import numpy as np

from continual_transformers_tf.bench.rivals import rings_of
from continual_transformers_tf.native import core_library


def _read_bound(size, weights, threads):
    del threads  # The bound of one thread, whatever the others use.
    arrays = [*rings_of(size, weights), *(kernel for kernel, _ in weights)]
    # In one piece: every call from Python would add its third of a microsecond.
    everything = np.concatenate([array.ravel() for array in arrays])
    read = core_library().continual_transformers_read
    address, size_in_bytes = everything.ctypes.data, everything.nbytes

    def step(x):
        read(address, size_in_bytes)
        return everything

    return step, lambda x: x


RIVALS = {"read_bound": _read_bound}
