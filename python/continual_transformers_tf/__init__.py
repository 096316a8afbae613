"""Transformers for TensorFlow that answer at every step of an endless stream."""

import importlib.util

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "continual_transformers_tf needs TensorFlow: `pip install continual-transformers-tf[cpu]`, "
        "or `[gpu]` for CUDA"
    )

from continual_transformers_tf import ops
from continual_transformers_tf.layers import (
    CircularPositionalEncoding,
    CoSiMultiHeadAttention,
    CoSiTransformerEncoder,
    call_mode,
)

__all__ = [
    "CircularPositionalEncoding",
    "CoSiMultiHeadAttention",
    "CoSiTransformerEncoder",
    "call_mode",
    "ops",
]
