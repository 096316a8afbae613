"""Continual layers for Keras: one file a layer."""

import continual_transformers_tf._keras_backend  # noqa: F401  First: it says what is missing.
from continual_transformers_tf.layers.call_modes import call_mode
from continual_transformers_tf.layers.callbacks import CleanState
from continual_transformers_tf.layers.circular_positional_encoding import CircularPositionalEncoding
from continual_transformers_tf.layers.co_chunked_mha import CoChunkedMultiHeadAttention
from continual_transformers_tf.layers.co_delay import CoDelay
from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.co_re_transformer_encoder import CoReTransformerEncoder
from continual_transformers_tf.layers.co_recurrent import CoRecurrent
from continual_transformers_tf.layers.co_residual import CoResidual
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.co_temporal import CoTemporal
from continual_transformers_tf.layers.co_window import CoWindow
from continual_transformers_tf.layers.learned_queries import LearnedQueries
from continual_transformers_tf.layers.model_streams import (
    clean_state,
    convert_weights,
    ensure_streams,
    hold_streams,
)
from continual_transformers_tf.layers.position_bias import ALiBi, RelativePositionBias
from continual_transformers_tf.layers.rotary import Rotary
from continual_transformers_tf.layers.rotary_embedding import RotaryEmbedding
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder

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
    "TransformerEncoder",
    "call_mode",
    "clean_state",
    "convert_weights",
    "ensure_streams",
    "hold_streams",
]
