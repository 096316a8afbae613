"""The model as a PyTorch user would write it by hand, with rings that are written in place."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from continual_transformers_tf.bench.model_rivals import (
    EPSILON,
    Contestant,
    Pair,
    Weights,
    inputs_of,
)
from continual_transformers_tf.bench.sizes import ModelSize

# A function of queries, and of the rings of keys and values.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _torch_ring(size: ModelSize, weights: Weights, threads: int) -> Contestant:
    """Return the contestant with the faster of two ways to attend."""
    torch.set_num_threads(threads)
    x = torch.from_numpy(inputs_of(size)[0])
    ways = [_sdpa, _products]
    fastest = min(ways, key=lambda attend: _seconds(_Model(size, weights, attend).step, x))
    return Contestant(_Model(size, weights, fastest).step, torch.from_numpy)


def _sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, keys, values)


def _products(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return scores.softmax(-1) @ values


class _Model:
    def __init__(self, size: ModelSize, weights: Weights, attend: Attend) -> None:
        self._size, self._attend = size, attend
        self._heads = (size.streams, 3, size.heads, 1, size.head)
        self._embedding = _linear(weights.embedding)
        self._rows = torch.from_numpy(weights.positions)
        self._blocks = [
            (
                _linear(block.query, block.key, block.value),
                _linear(block.output),
                _norm(block.attention_norm),
                _linear(block.feed_forward),
                _linear(block.feed_forward_output),
                _norm(block.output_norm),
            )
            for block in weights.blocks
        ]
        self._classifier = _linear(weights.classifier)
        ring = (2, size.streams, size.heads, size.seq_len, size.head)
        self._rings = [torch.zeros(ring) for _ in weights.blocks]
        self._position = 0

    @torch.inference_mode()
    def step(self, x: torch.Tensor) -> torch.Tensor:
        size = self._size
        features = (size.embed_dim,)
        row = self._position % size.seq_len
        x = F.linear(x, *self._embedding) + self._rows[self._position % size.position_rows]
        self._position += 1
        for (qkv, output, norm, hidden, narrow, last_norm), ring in zip(
            self._blocks, self._rings, strict=True
        ):
            query, key, value = F.linear(x, *qkv).view(self._heads).unbind(1)
            keys, values = ring
            keys[:, :, row : row + 1] = key
            values[:, :, row : row + 1] = value
            attended = self._attend(query, keys, values).reshape(x.shape)
            x = F.layer_norm(x + F.linear(attended, *output), features, *norm, EPSILON)
            fed = F.linear(F.gelu(F.linear(x, *hidden)), *narrow)
            x = F.layer_norm(x + fed, features, *last_norm, EPSILON)
        return F.linear(x, *self._classifier)


def _norm(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    gamma, beta = pair
    return torch.from_numpy(gamma), torch.from_numpy(beta)


def _linear(*layers: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias in nn.Linear's layout, with several layers concatenated."""
    kernels, biases = zip(*layers, strict=True)
    return (
        torch.cat([torch.from_numpy(kernel.T.copy()) for kernel in kernels]),
        torch.cat([torch.from_numpy(bias) for bias in biases]),
    )


def _seconds(step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    def once() -> float:
        start = time.perf_counter()
        step(x)
        return time.perf_counter() - start

    for _ in range(3):
        once()
    return min(once() for _ in range(10))


RIVALS = {"torch_ring": _torch_ring}
