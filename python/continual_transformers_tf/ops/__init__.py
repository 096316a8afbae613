"""The functional core: attention on projected steps, the state of streams, the kernels' loader."""

import continual_transformers_tf._tensorflow  # noqa: F401  First: says where it is missing.
from continual_transformers_tf.native import cpu_targets
from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.library import (
    LIBRARY_PATH,
    cuda_build,
    kernels,
    load_error,
)
from continual_transformers_tf.ops.retroactive import retroactive_attention
from continual_transformers_tf.ops.retroactive_cache import RetroactiveCache
from continual_transformers_tf.ops.single_output import single_output_attention

__all__ = [
    "LIBRARY_PATH",
    "AttentionCache",
    "RetroactiveCache",
    "cpu_targets",
    "cuda_build",
    "kernels",
    "load_error",
    "retroactive_attention",
    "single_output_attention",
]
