"""The functional core: attention on projected steps, the state of streams, the kernels' loader."""

from continual_transformers_tf.ops.attention_cache import AttentionCache
from continual_transformers_tf.ops.library import (
    LIBRARY_PATH,
    cpu_targets,
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
