"""An encoder block's step by the CUDA kernels, against the float64 reference."""

import ctypes
import itertools
import math

import numpy as np
import pytest

import cuda_calls
import reference
from arena import Arena
from cuda_co_si_mha_step import Layer, LayerCall, LayerSizes, LayerStreams, check_layer_results
from cuda_single_output import Sizes, bound_of, compute_dtype, to_float64, to_stored

EPSILON = 1e-6
ACTIVATIONS = {
    "linear": lambda x: x,
    "gelu": np.vectorize(lambda x: x / 2 * math.erfc(-x / math.sqrt(2)), otypes=[float]),
    "relu": lambda x: np.maximum(x, 0),
}


def normalize(x, scale, offset):
    x = x.astype(np.float64)
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + EPSILON)
    return centered / deviation * scale + offset


class Block:
    """The attention layer and the rest of a block, all with E features."""

    def __init__(self, random, attention, hidden, weights_dtype, activation, norm_first):
        features = attention.heads * 3 + 2
        self.layer = Layer(
            random, LayerSizes(attention, *[features] * 4, weights_dtype=weights_dtype)
        )
        self.features, self.hidden = features, hidden
        self.activation, self.norm_first = activation, norm_first
        compute = compute_dtype(attention.dtype)
        self.vectors = {
            name: random.normal(size=size).astype(compute)
            for name, size in (
                ("attention_norm_scale", features),
                ("attention_norm_offset", features),
                ("output_norm_scale", features),
                ("output_norm_offset", features),
                ("hidden_bias", hidden),
                ("output_bias", features),
            )
        }
        self.kernels = {
            name: to_stored(random.normal(scale=shape[0] ** -0.5, size=shape), weights_dtype)
            for name, shape in (
                ("hidden_kernel", (features, hidden)),
                ("output_kernel", (hidden, features)),
            )
        }

    def norm(self, name, x):
        return normalize(x, self.vectors[f"{name}_norm_scale"], self.vectors[f"{name}_norm_offset"])

    def attended_input(self, x):
        return self.norm("attention", x) if self.norm_first else x.astype(np.float64)

    def expected(self, x, attended):
        """Return the output [M, E] for the attention layer's output [M, E]."""
        between = x + attended
        kernels = {
            name: to_float64(kernel, self.layer.sizes.weights_dtype)
            for name, kernel in self.kernels.items()
        }
        inner = self.norm("output" if self.norm_first else "attention", between)
        hidden = inner @ kernels["hidden_kernel"] + self.vectors["hidden_bias"]
        forward = ACTIVATIONS[self.activation](hidden) @ kernels["output_kernel"]
        forward += self.vectors["output_bias"]
        return between + forward if self.norm_first else self.norm("output", inner + forward)


def check_step(machine, block, streams, chosen, x, result=True, update_state=True):
    options = dict(scores=False, result=False, update_state=update_state)
    attention = LayerCall(machine, block.layer, streams, chosen, [x] * 3, **options)
    arena = Arena(machine.memory)
    for name, array in (*block.vectors.items(), *block.kernels.items()):
        arena.add(name, array)
    if result:
        arena.output("result", x.shape, x.dtype)
    attention.struct.output_features = block.features
    call = cuda_calls.CoSiEncoderStep(
        attention=attention.struct,
        epsilon=EPSILON,
        hidden_features=block.hidden,
        activation=list(ACTIVATIONS).index(block.activation),
        norm_first=block.norm_first,
    )
    scratch = machine.library.co_si_encoder_step_scratch_bytes(ctypes.byref(call))
    arena.output("scratch", (scratch // 16 + 1, 16), np.dtype("V16"))
    arena.place()
    for name in arena.places:
        setattr(call, name, arena.address(name))
    machine.library.co_si_encoder_step(ctypes.byref(call), machine.memory.stream)

    exact = block.attended_input(x)
    heads, _, d, dv, dtype = block.layer.sizes.attention
    query, key, value = (
        block.layer.project(name, exact).reshape(len(x), 1, heads, size)
        for name, size in (("query", d), ("key", d), ("value", dv))
    )
    steps = (query, to_stored(key, dtype), to_stored(value, dtype))
    everyone = np.ones(len(x), bool)
    attended, _ = streams.expected(chosen, steps, d**-0.5, None, None, everyone)
    attended = block.layer.project("output", attended.reshape(len(x), heads * dv))
    written = arena.results()
    if result:
        error = reference.relative_error(written["result"], block.expected(x, attended))
        # Seven layers and norms follow each other, and each adds an error: allow 3 times the bound.
        assert error < 3 * max(bound_of(dtype), reference.ROUNDING.get(dtype, 0))
    check_layer_results(attention, streams, chosen, [exact] * 3, **options)


@pytest.mark.sanitizer
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks(machine, random, activation, norm_first):
    for (dtype, weights_dtype), hidden in zip(
        (("float32", "float32"), ("float64", "float64"), ("float32", "bfloat16")),
        (1, 37, 64),
        strict=True,
    ):
        attention = Sizes(2, 5, 12, 8, dtype)
        block = Block(random, attention, hidden, weights_dtype, activation, norm_first)
        streams = LayerStreams(random, [0, 1, 4, 5, 13], block.layer)
        for m in (1, 3, 5):
            x = random.normal(size=(m, block.features)).astype(compute_dtype(dtype))
            check_step(machine, block, streams, random.permutation(5)[:m], x)


@pytest.mark.parametrize("m", [16, 17])
def test_many_rows(machine, random, m):
    """With up to 16 rows the norm before the feed-forward part shares a launch with it."""
    block = Block(random, Sizes(2, 5, 12, 8, "float32"), 21, "float32", "gelu", False)
    streams = LayerStreams(random, random.integers(0, 12, m), block.layer)
    x = random.normal(size=(m, block.features)).astype(np.float32)
    check_step(machine, block, streams, random.permutation(m), x)


@pytest.mark.parametrize(
    ("result", "update_state"), list(itertools.product([False, True], repeat=2))
)
def test_what_is_not_wanted(machine, random, result, update_state):
    block = Block(random, Sizes(2, 5, 12, 8, "float32"), 16, "float32", "gelu", False)
    streams = LayerStreams(random, [0, 7], block.layer)
    x = random.normal(size=(2, block.features)).astype(np.float32)
    check_step(machine, block, streams, [1, 0], x, result, update_state)


def test_an_attention_that_no_kernel_takes(machine, random):
    block = Block(random, Sizes(1, 2, 257, 257, "float32"), 4, "float32", "relu", True)
    streams = LayerStreams(random, [0], block.layer)
    x = random.normal(size=(1, block.features)).astype(np.float32)
    with pytest.raises(cuda_calls.Refused, match="at most 256"):
        check_step(machine, block, streams, [0], x)
