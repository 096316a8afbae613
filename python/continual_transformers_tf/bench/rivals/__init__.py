"""The rivals of the layer's race.

Each module has a dict RIVALS, from a rival's name to a function of a size, the layer's weights
(`weights_of`) and a number of threads. It returns (step, convert): step takes the inputs of
`inputs_of` after convert, and returns the outputs `[M, E]`. The window is full from the start.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from continual_transformers_tf.bench.sizes import Size

Array = npt.NDArray[Any]
Weights = list[tuple[Array, Array]]  # The result of `weights_of`.
Contestant = tuple[Callable[[Any], Any], Callable[[Array], Any]]  # (step, convert)

# The module of each rival, which imports what the rival needs.
MODULES = {
    "ours": "tensorflow",
    "ours_bfloat16": "tensorflow",
    "ours_graph": "tensorflow",
    "ours_apart": "tensorflow",
    "tensorflow_ring": "tensorflow",
    "keras_recompute": "tensorflow",
    "keras_xla": "tensorflow",
    "continual_inference": "torch",
    "torch_sdpa": "torch",
    "onnxruntime": "onnx",
    "read_bound": "read_bound",
}
DESCRIPTIONS = {
    "ours": "`CoSiMultiHeadAttention.call_step`, eager",
    "ours_bfloat16": "`ours` with weights and rings in bfloat16",
    "ours_graph": "`ours` in a `tf.function`",
    "ours_apart": "`ours`, with one call for each stream",
    "tensorflow_ring": "a ring in plain TensorFlow, in a `tf.function`",
    "keras_recompute": "`keras.layers.MultiHeadAttention` on the window, in a `tf.function`",
    "keras_xla": "the same, compiled by XLA",
    "continual_inference": "`SingleOutputMultiheadAttention.forward_step` of continual-inference",
    "torch_sdpa": "PyTorch's `scaled_dot_product_attention` on a ring",
    "onnxruntime": "ONNX Runtime, with the ring by concat and I/O binding",
    "read_bound": "a plain read of the bytes of the rings and the weights",
}


def make(name: str, size: Size, threads: int) -> Contestant:
    """Return (step, convert) of a rival, ready to take inputs.

    Raises:
        ModuleNotFoundError: If a package that it needs is not installed.
    """
    module = importlib.import_module(f"{__name__}.{MODULES[name]}_rivals")
    return module.RIVALS[name](size, weights_of(size), threads)


def weights_of(size: Size) -> Weights:
    """Return the kernels [E, E] and biases [E] of q, k, v and the output, the same for all."""
    random = np.random.default_rng(7)
    scale = 1 / np.sqrt(size.features)
    return [
        (
            random.normal(scale=scale, size=(size.features, size.features)).astype(np.float32),
            random.normal(scale=0.1, size=size.features).astype(np.float32),
        )
        for _ in range(4)
    ]


def past_of(size: Size) -> Array:
    """Return the steps that fill the window, oldest first: [N, M, E]."""
    random = np.random.default_rng(11)
    return random.normal(size=(size.seq_len, size.streams, size.features)).astype(np.float32)


def rings_of(size: Size, weights: Weights) -> list[Array]:
    """Return keys and values of the steps that fill the window: [M, H, N, D] each."""
    past = past_of(size)
    shape = (size.seq_len, size.streams, size.heads, size.head)
    return [
        np.ascontiguousarray((past @ kernel + bias).reshape(shape).transpose(1, 2, 0, 3))
        for kernel, bias in weights[1:3]
    ]


def inputs_of(size: Size, steps: int) -> Array:
    """Return the steps that are timed: [steps, M, E]."""
    random = np.random.default_rng(13)
    return random.normal(size=(steps, size.streams, size.features)).astype(np.float32)
