"""Transformers for TensorFlow that answer at every step of an endless stream.

Every name is imported when it is first used (PEP 562). `ct.Session.load(...)` imports neither
TensorFlow nor Keras, and works if they are not installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from continual_transformers_tf import _keras_registration

if TYPE_CHECKING:
    from continual_transformers_tf import layers as layers
    from continual_transformers_tf import models as models
    from continual_transformers_tf import ops, serving
    from continual_transformers_tf.layers import (
        ALiBi,
        CircularPositionalEncoding,
        CleanState,
        CoChunkedMultiHeadAttention,
        CoDelay,
        CoRecurrent,
        CoReMultiHeadAttention,
        CoResidual,
        CoReTransformerEncoder,
        CoSiMultiHeadAttention,
        CoSiTransformerEncoder,
        CoTemporal,
        CoWindow,
        LearnedQueries,
        RelativePositionBias,
        Rotary,
        RotaryEmbedding,
        TransformerEncoder,
        call_mode,
        clean_state,
        convert_weights,
        ensure_streams,
        hold_streams,
    )
    from continual_transformers_tf.models.convert import convert
    from continual_transformers_tf.models.cost import cost
    from continual_transformers_tf.models.explain import explain
    from continual_transformers_tf.models.export import export
    from continual_transformers_tf.models.export_litert import export_litert
    from continual_transformers_tf.models.from_torch import from_torch
    from continual_transformers_tf.models.paper import co_audio_transformer, co_oad_tr
    from continual_transformers_tf.models.row_wise_mark import row_wise
    from continual_transformers_tf.models.streaming_model import StreamingModel
    from continual_transformers_tf.session import Session

    __version__: str

__all__ = [
    "ALiBi",
    "CircularPositionalEncoding",
    "CleanState",
    "CoChunkedMultiHeadAttention",
    "CoDelay",
    "CoReMultiHeadAttention",
    "CoReTransformerEncoder",
    "CoRecurrent",
    "CoResidual",
    "CoSiMultiHeadAttention",
    "CoSiTransformerEncoder",
    "CoTemporal",
    "CoWindow",
    "LearnedQueries",
    "RelativePositionBias",
    "Rotary",
    "RotaryEmbedding",
    "Session",
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
    "explain",
    "export",
    "export_litert",
    "from_torch",
    "hold_streams",
    "ops",
    "row_wise",
    "serving",
]

# The module of each name. Names that are not listed are in `layers`.
_MODULES = {
    "Session": "session",
    "StreamingModel": "models",
    "co_audio_transformer": "models",
    "co_oad_tr": "models",
    "convert": "models",
    "cost": "models",
    "explain": "models",
    "export": "models",
    "export_litert": "models",
    "from_torch": "models",
    "row_wise": "models.row_wise_mark",
}


def _get(name: str) -> Any:
    """Import the value of a public name."""
    value: Any
    if name == "__version__":
        value = _version()
    elif name in ("layers", "models", "ops", "serving"):
        value = importlib.import_module(f"{__name__}.{name}")
    elif name in __all__:
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'layers')}")
        value = getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # Type checkers read the imports above, and so find misspelled names.
    __getattr__ = _get


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__")), "__version__"})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("continual-transformers-tf")  # Defined in pyproject.toml.
    except metadata.PackageNotFoundError:  # A checkout on the path that is not installed.
        return "unknown"


_keras_registration.begin()
