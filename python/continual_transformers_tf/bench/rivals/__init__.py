"""The rivals of the layer's race.

Each module has a dict RIVALS, from a rival's name to a function of a size, the layer's weights
(`weights_of`) and a number of threads. It returns (step, convert): step takes the inputs of
`inputs_of` after convert, and returns the outputs: `[M, E]`, or `[M, N, E]` of a retroactive layer.
The window is full from the start.
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

# The module of each rival, which imports what the rival needs. "native" is the program of
# benchmarks/cc/layer_benchmark.cc.
MODULES = {
    "session": "tensorflow",
    "bound": "native",
    "session_bfloat16": "tensorflow",
    "session_int8": "tensorflow",
    "layer": "tensorflow",
    "layer_graph": "tensorflow",
    "tensorflow_ring": "tensorflow",
    "keras_recompute": "tensorflow",
    "keras_xla": "tensorflow",
    "continual_inference": "torch",
    "torch_sdpa": "torch",
    "onnxruntime": "onnx",
}
DESCRIPTIONS = {
    "session": "`ct.Session(layer).step` from Python",
    "bound": "for each of the four dense products and the attention, the time to read its bytes "
    "or to compute its multiply-adds, whichever is longer, at the speeds measured in the same run "
    "with one thread; then the sum of these",
    "session_bfloat16": "`session` with weights and rings in bfloat16",
    "session_int8": "`session` with weights and rings in int8",
    "layer": "`CoSiMultiHeadAttention.call_step`, eager",
    "layer_graph": "`layer` in a `tf.function`",
    "tensorflow_ring": "a ring in plain TensorFlow, in a `tf.function`",
    "keras_recompute": "`keras.layers.MultiHeadAttention` on the window, in a `tf.function`",
    "keras_xla": "the same, compiled by XLA",
    "continual_inference": "`SingleOutputMultiheadAttention.forward_step` of continual-inference",
    "torch_sdpa": "PyTorch's `scaled_dot_product_attention` on a ring",
    "onnxruntime": "ONNX Runtime, with the ring by concat and I/O binding",
}
# The retroactive layer has rivals of its own: its step returns a row for every step of the window.
RETROACTIVE = {
    "retroactive_session": "tensorflow",
    "retroactive_bound": "native",
    "retroactive_keras": "tensorflow",
}
RETROACTIVE_DESCRIPTIONS = {
    "retroactive_session": "`ct.Session(ct.CoReMultiHeadAttention(...)).step` from Python",
    "retroactive_bound": "the bound, as above. The attention reads the window's queries and the "
    "sums of weighted values, and changes each sum by the new step and the one that leaves. The "
    "last product has N rows",
    "retroactive_keras": "`keras.layers.MultiHeadAttention` on the window, all rows, in a "
    "`tf.function`",
}
# Those whose speed depends on the instruction set of our kernels.
OWN = (
    "session", "bound", "session_bfloat16", "session_int8", "retroactive_session",
    "retroactive_bound",
)  # fmt: skip
TWO_THREADS = (
    "session", "session_bfloat16", "session_int8", "layer", "keras_recompute", "torch_sdpa",
    "onnxruntime",
)  # fmt: skip
# Those that compute a whole window at each step, or take a window's steps to get ready.
FULL_WINDOWS = ("keras_recompute", "keras_xla", "continual_inference")


def make(name: str, size: Size, threads: int) -> Contestant:
    """Return (step, convert) of a rival, ready to take inputs.

    Raises:
        ModuleNotFoundError: If a package that it needs is not installed.
    """
    module = importlib.import_module(f"{__name__}.{ {**MODULES, **RETROACTIVE}[name] }_rivals")
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
