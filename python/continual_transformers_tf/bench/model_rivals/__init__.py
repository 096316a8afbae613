"""The contestants of the race of whole models, and the model that they run.

The model is dense -> circular positional encoding of 2N - 1 learned rows -> L encoder blocks
(post-norm, exact GELU, as many features between the feed-forward layers as outside) -> dense. Each
block attends to the N newest steps. Every contestant gets the same weights and the same steps.

Each module has a dict RIVALS, from a contestant's name to a function of a size, the weights and a
number of threads that returns a `Contestant`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from continual_transformers_tf.bench.sizes import MODEL_OUTPUTS, ModelSize

STEPS = 64  # This many steps are prepared, and taken in turn.
EPSILON = 1e-6  # The epsilon of the layer norms.
TOLERANCE = 1e-4  # The largest error of an output, relative to the largest reference element.

# The module of each contestant, which imports what the contestant needs. "native" is the program of
# benchmarks/cc/model_benchmark.cc.
MODEL_MODULES = {
    "session": "session",
    "session_cpp": "native",
    "kernels": "native",
    "bound": "native",
    "tf_function": "tensorflow",
    "torch_ring": "torch",
    "onnxruntime": "onnx",
    "sequence_layers": "sequence_layers",
    "keras_windows": "tensorflow",
    "keras_windows_xla": "tensorflow",
}
MODEL_DESCRIPTIONS = {
    "session": "`ct.Session.step` from Python, the model file loaded without TensorFlow",
    "session_cpp": "the same step in C++",
    "kernels": "the layers' kernels one after the other in C++, without a session, with one thread",
    "bound": "for each dense product and attention, the time to read its bytes or to compute its "
    "multiply-adds, whichever is longer, at the speeds measured in the same run with one thread; "
    "then the sum of these",
    "tf_function": "`StreamingModel.call_step` in a `tf.function`",
    "torch_ring": "PyTorch in inference mode, with rings written in place, and "
    "`scaled_dot_product_attention` or two products, whichever is faster",
    "onnxruntime": "ONNX Runtime, with rings by concat and I/O binding",
    "sequence_layers": "Google's sequence-layers under `jax.jit`, with its state donated, without "
    "the positional encoding",
    "keras_windows": "the regular Keras model on whole windows, in a `tf.function`",
    "keras_windows_xla": "the same, compiled by XLA",
}
ONE_THREAD = ("kernels", "bound")
# Those whose speed depends on the instruction set of our kernels.
OWN = ("session", "session_cpp", "bound")

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]  # A layer's two weights.


class Contestant(NamedTuple):
    """A model that is ready to take steps.

    Attributes:
        step: A function of a step's inputs `[M, F]`, converted by `convert`, that returns the
            outputs `[M, 10]`.
        convert: A function that converts inputs from NumPy.
        output: A function that converts outputs to NumPy.
        windows: Whether a step is a call on the window of the N newest steps, in which the blocks
            before the last one see no further back. Such a contestant begins with the first N - 1
            steps in its window, and is compared at the first full window.
        positions: Whether it has the positional encoding.
    """

    step: Callable[[Any], Any]
    convert: Callable[[Array], Any] = lambda x: x
    output: Callable[[Any], Array] = np.asarray
    windows: bool = False
    positions: bool = True
    keep: Any = None  # An object that must live as long as `step`.


def make(name: str, size: ModelSize, threads: int, model_file: str) -> Contestant:
    """Return a contestant for a size.

    Args:
        name: A name in MODEL_MODULES, but not a "native" one.
        size: A ModelSize.
        threads: How many threads it may use.
        model_file: The path of the model file.

    Raises:
        ModuleNotFoundError: If a package that it needs is not installed.
    """
    module = importlib.import_module(f"{__name__}.{MODEL_MODULES[name]}_models")
    if MODEL_MODULES[name] == "session":
        return module.RIVALS[name](size, model_file, threads)
    return module.RIVALS[name](size, weights_of(size), threads)


class Block(NamedTuple):
    """The weights of an encoder block: (kernel, bias) and (gamma, beta)."""

    query: Pair
    key: Pair
    value: Pair
    output: Pair
    attention_norm: Pair
    feed_forward: Pair
    feed_forward_output: Pair
    output_norm: Pair


class Weights(NamedTuple):
    """The weights of the model that is raced."""

    embedding: Pair
    positions: Array  # [2N - 1, E]
    blocks: tuple[Block, ...]
    classifier: Pair

    def arrays(self) -> list[Array]:
        """Return all arrays in the order in which the C++ program reads them."""
        found = [*self.embedding, self.positions]
        for block in self.blocks:
            found += [array for pair in block for array in pair]
        return [*found, *self.classifier]


def weights_of(size: ModelSize) -> Weights:
    """Return the weights, which are the same for all contestants."""
    random = np.random.default_rng(7)

    def normal(scale: float, *shape: int) -> Array:
        return random.normal(scale=scale, size=shape).astype(np.float32)

    def dense(inputs: int, outputs: int) -> Pair:
        return normal(1 / np.sqrt(inputs), inputs, outputs), normal(0.1, outputs)

    def norm() -> Pair:
        return 1 + normal(0.1, size.embed_dim), normal(0.1, size.embed_dim)

    e = size.embed_dim
    return Weights(
        embedding=dense(size.features, e),
        positions=normal(0.3, size.position_rows, e),
        blocks=tuple(
            Block(
                query=dense(e, e),
                key=dense(e, e),
                value=dense(e, e),
                output=dense(e, e),
                attention_norm=norm(),
                feed_forward=dense(e, e),
                feed_forward_output=dense(e, e),
                output_norm=norm(),
            )
            for _ in range(size.layers)
        ),
        classifier=dense(e, MODEL_OUTPUTS),
    )


def inputs_of(size: ModelSize) -> Array:
    """Return the steps that are taken in turn: [STEPS, M, F]."""
    random = np.random.default_rng(13)
    return random.normal(size=(STEPS, size.streams, size.features)).astype(np.float32)


def checked_steps(size: ModelSize, windows: bool) -> int:
    """Return how many steps a contestant takes before its output is compared."""
    return size.seq_len if windows else size.receptive_field + 3


def checked_rows(size: ModelSize) -> list[int]:
    """Return the rows to compare: the first stream and the last. Rows are independent."""
    return sorted({0, size.streams - 1})


def reference(size: ModelSize, steps: int, positions: bool = True) -> npt.NDArray[np.float64]:
    """Return the last outputs of new streams after `steps` steps, float64 [checked rows, 10]."""
    weights = weights_of(size)
    rows = checked_rows(size)
    taken = np.arange(steps)
    x = inputs_of(size)[taken % STEPS][:, rows].astype(np.float64)

    def dense(x: npt.NDArray[np.float64], layer: Pair) -> npt.NDArray[np.float64]:
        return x @ layer[0].astype(np.float64) + layer[1]

    def norm(x: npt.NDArray[np.float64], layer: Pair) -> npt.NDArray[np.float64]:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + EPSILON) * layer[0] + layer[1]

    x = dense(x, weights.embedding)
    if positions:
        x = x + weights.positions[taken % size.position_rows][:, np.newaxis]
    for block in weights.blocks:
        q, k, v = (
            dense(x, layer).reshape(steps, len(rows), size.heads, size.head) for layer in block[:3]
        )
        attended = np.empty_like(q)
        for t in taken:
            window = slice(max(0, t + 1 - size.seq_len), t + 1)
            logits = np.einsum("mhd,nmhd->mhn", q[t], k[window]) / np.sqrt(size.head)
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            attended[t] = np.einsum("mhn,nmhd->mhd", scores, v[window])
        x = norm(x + dense(attended.reshape(x.shape), block.output), block.attention_norm)
        hidden = dense(x, block.feed_forward)
        hidden = hidden * 0.5 * (1 + _erf(hidden / np.sqrt(2)))
        x = norm(x + dense(hidden, block.feed_forward_output), block.output_norm)
    return dense(x[-1], weights.classifier)


def _erf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    import math

    return np.vectorize(math.erf)(x)
