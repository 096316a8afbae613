"""Memory for one call of a kernel: named buffers with guards around them, on host or device.

Everything that a call does not declare as written must be unchanged after it, byte for byte: the
other buffers, and the guards. Guards are bytes of 255. That is NaN in every floating type, -1 as an
index and true as a bool, so a read past a buffer does not go unnoticed either.
"""

import os

import numpy as np

import cuda_build

GUARD = 256  # The bytes on either side of a buffer; buffers also begin at a multiple of this.
POISON = 255


class HostMemory:
    """NumPy arrays, for the emulator's kernels."""

    stream = None
    multiprocessors = 7

    def upload(self, host):
        return host.copy()

    def download(self, memory):
        return memory

    def address(self, memory):
        return memory.ctypes.data

    def synchronize(self):
        pass

    def capture(self, launch):
        """Return a function that launches again what `launch` does, from a graph if supported."""
        return launch


class CupyMemory:
    """Arrays of CuPy."""

    def __init__(self):
        import cupy

        self.cupy = cupy
        cupy.cuda.runtime.getDeviceCount()
        if separate_allocations():
            cupy.cuda.set_allocator(None)
        device = cupy.cuda.Device()
        self.multiprocessors = device.attributes["MultiProcessorCount"]

    @property
    def stream(self):
        return self.cupy.cuda.get_current_stream().ptr

    def upload(self, host):
        return self.cupy.asarray(host)

    def download(self, memory):
        return self.cupy.asnumpy(memory)

    def address(self, memory):
        return memory.data.ptr

    def synchronize(self):
        self.cupy.cuda.runtime.deviceSynchronize()

    def capture(self, launch):
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            launch()
            graph = stream.end_capture()

        def replay():
            self.synchronize()  # Another stream uploaded the arena's contents.
            graph.launch(stream)

        return replay


class TorchMemory:
    """Tensors of PyTorch."""

    def __init__(self):
        import torch

        self.torch = torch
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count

    @property
    def stream(self):
        return self.torch.cuda.current_stream().cuda_stream

    def upload(self, host):
        return self.torch.from_numpy(host).cuda()

    def download(self, memory):
        return memory.cpu().numpy()

    def address(self, memory):
        return memory.data_ptr()

    def synchronize(self):
        self.torch.cuda.synchronize()

    def capture(self, launch):
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            launch()
        return graph.replay


def separate_allocations():
    """Return whether each buffer gets its own allocation, so that a sanitizer sees its end.

    It does if PyTorch is told not to cache memory.
    """
    return os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"


def device_memory():
    """Return the device memory of CuPy or PyTorch.

    Returns:
        (the memory, None), or (None, the reason).
    """
    why = cuda_build.why_no_driver()
    if why is not None:
        return None, f"no GPU is at hand, nor a driver: {why}"
    reasons = []
    for kind, module in ((CupyMemory, "cupy"), (TorchMemory, "torch")):
        try:
            __import__(module)
            return kind(), None
        except Exception as error:  # Without a driver, each raises a different exception.
            reasons.append(f"{module}: {str(error).splitlines()[0] if str(error) else error!r}")
    return None, "no GPU is at hand: " + "; ".join(reasons)


class Arena:
    """Buffers for one call.

    `add` them, then `place` them, pass `address(name)`, and take `results()`.
    """

    def __init__(self, memory, misaligned=False):
        self.memory = memory
        self.misaligned = misaligned
        self.arrays = {}
        self.places = {}
        self.written = set()
        self.held = None

    def add(self, name, array, written=False):
        """Add a buffer with a copy of `array`; `written` says that the call may write it."""
        if array is not None:
            self.arrays[name] = np.ascontiguousarray(array)
            if written:
                self.written.add(name)

    def output(self, name, shape, dtype):
        """Add a buffer for the call to write, filled with poison."""
        array = np.empty(shape, dtype)
        array.view(np.uint8)[...] = POISON
        self.add(name, array, written=True)

    def place(self):
        size = GUARD
        for name, array in self.arrays.items():
            # A kernel may rely only on the alignment of an element.
            start = size + (array.itemsize if self.misaligned else 0)
            self.places[name] = (start, start + array.nbytes)
            size = (start + array.nbytes + GUARD) // GUARD * GUARD + GUARD
        self.before = np.full(size, POISON, np.uint8)
        for name, array in self.arrays.items():
            start, end = self.places[name]
            self.before[start:end] = array.reshape(-1).view(np.uint8)
        if separate_allocations():
            self.held = {}
            for name, (start, end) in self.places.items():
                lead = array_lead(start)
                self.held[name] = (self.memory.upload(self.before[start - lead : end]), lead)
        else:
            self.held = self.memory.upload(self.before)
            base = self.memory.address(self.held)
            assert base % 16 == 0, base

    def address(self, name):
        """Return the address of a buffer, or None if there is no buffer of this name."""
        if name not in self.places:
            return None
        if isinstance(self.held, dict):
            memory, lead = self.held[name]
            return self.memory.address(memory) + lead
        return self.memory.address(self.held) + self.places[name][0]

    def set(self, name, array):
        """Replace the contents of a placed buffer."""
        assert not isinstance(self.held, dict)
        start, end = self.places[name]
        array = np.ascontiguousarray(array, self.arrays[name].dtype)
        self.before[start:end] = array.reshape(-1).view(np.uint8)
        self.held[start:end] = self.memory.upload(self.before[start:end])

    def results(self, check=True):
        """Check that nothing else has changed, and return the written buffers' contents by name."""
        self.memory.synchronize()
        if isinstance(self.held, dict):
            after = self.before.copy()
            for name, (memory, lead) in self.held.items():
                start, end = self.places[name]
                after[start - lead : end] = self.memory.download(memory)
        else:
            after = self.memory.download(self.held)
        if check:
            self._check(after)
        results = {}
        for name in self.written:
            start, end = self.places[name]
            array = self.arrays[name]
            results[name] = after[start:end].copy().view(array.dtype).reshape(array.shape)
        return results

    def _check(self, after):
        changed = after != self.before
        for name in self.written:
            start, end = self.places[name]
            changed[start:end] = False
        places = np.flatnonzero(changed)
        assert len(places) == 0, f"the call wrote what it must not write: {self._where(places)}"

    def _where(self, places):
        """Return a text: the nearest buffer of each byte, and the byte's offset from its start."""
        said = []
        for place in places[:4]:
            name, (start, end) = min(
                self.places.items(), key=lambda item: max(item[1][0] - place, place - item[1][1])
            )
            said.append(f"{place - start} of the {end - start} of {name}")
        return ", ".join(said) + f" ({len(places)} in all)"


def array_lead(start):
    """Return the bytes before a buffer that keep its alignment in a separate allocation."""
    return start % 16
