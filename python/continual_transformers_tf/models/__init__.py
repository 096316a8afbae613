"""Whole models: Keras models that stream, made from those that do not; and what serves them."""

import continual_transformers_tf._tensorflow  # First: says where it is missing.
import continual_transformers_tf.models.cost_retroactive  # noqa: F401  Its entries of cost.
from continual_transformers_tf.models.convert import convert
from continual_transformers_tf.models.cost import cost
from continual_transformers_tf.models.export import export
from continual_transformers_tf.models.from_torch import from_torch
from continual_transformers_tf.models.paper import co_audio_transformer, co_oad_tr
from continual_transformers_tf.models.streaming_model import StreamingModel

__all__ = [
    "StreamingModel",
    "co_audio_transformer",
    "co_oad_tr",
    "convert",
    "cost",
    "export",
    "from_torch",
]
