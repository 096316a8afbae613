"""Whole models: making Keras models stream, exporting them, and counting what they cost."""

import continual_transformers_tf._tensorflow  # First: it says if TensorFlow is missing.
import continual_transformers_tf.models.cost_retroactive  # noqa: F401  Adds entries to cost.
from continual_transformers_tf.models.convert import convert
from continual_transformers_tf.models.cost import cost
from continual_transformers_tf.models.explain import explain
from continual_transformers_tf.models.export import export
from continual_transformers_tf.models.export_litert import export_litert
from continual_transformers_tf.models.from_torch import from_torch
from continual_transformers_tf.models.paper import co_audio_transformer, co_oad_tr
from continual_transformers_tf.models.streaming_model import StreamingModel

__all__ = [
    "StreamingModel",
    "co_audio_transformer",
    "co_oad_tr",
    "convert",
    "cost",
    "explain",
    "export",
    "export_litert",
    "from_torch",
]
