"""Transformers for TensorFlow that answer at every step of an endless stream."""

import importlib.util
from importlib import metadata

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "continual_transformers_tf needs TensorFlow: install it with one of its extras, as by "
        "`pip install '.[cpu]'` in a checkout, or '.[gpu]' for CUDA"
    )

from continual_transformers_tf import ops
from continual_transformers_tf.layers import (
    CircularPositionalEncoding,
    CleanState,
    CoDelay,
    CoReMultiHeadAttention,
    CoResidual,
    CoReTransformerEncoder,
    CoSiMultiHeadAttention,
    CoSiTransformerEncoder,
    TransformerEncoder,
    call_mode,
    clean_state,
    convert_weights,
    ensure_streams,
)
from continual_transformers_tf.models import (
    StreamingModel,
    co_audio_transformer,
    co_oad_tr,
    convert,
    cost,
    export,
    from_torch,
)

try:
    __version__ = metadata.version("continual-transformers-tf")  # setup.py says it, once.
except metadata.PackageNotFoundError:  # A checkout that is on the path and not installed.
    __version__ = "unknown"

__all__ = [
    "CircularPositionalEncoding",
    "CleanState",
    "CoDelay",
    "CoReMultiHeadAttention",
    "CoReTransformerEncoder",
    "CoResidual",
    "CoSiMultiHeadAttention",
    "CoSiTransformerEncoder",
    "StreamingModel",
    "TransformerEncoder",
    "call_mode",
    "clean_state",
    "co_audio_transformer",
    "co_oad_tr",
    "convert",
    "convert_weights",
    "cost",
    "ensure_streams",
    "export",
    "from_torch",
    "ops",
]
