"""Layers that stream with the weights of PyTorch's, from live modules and from files of them."""

import os
from collections.abc import Mapping

from continual_transformers_tf.models import from_torch_attention, from_torch_encoders
from continual_transformers_tf.models.from_torch_attention import name_of


def from_torch(module, seq_len=None, *, num_heads=None, prefix="", **options):
    """A continual layer with the weights of a module of PyTorch.

    It is called as Keras' layers are: `(B, T, E)` whatever `batch_first` says, and in the order
    query, value, key, where PyTorch's is query, key, value.

    | module | layer |
    | --- | --- |
    | `torch.nn.MultiheadAttention`, weights | `CoSiMultiHeadAttention` |
    | `torch.nn.TransformerEncoderLayer` | `CoSiTransformerEncoder` |
    | `torch.nn.TransformerEncoder` | `TransformerEncoder`, retroactive but with `kind=` |
    | continual-inference's `SingleOutputMultiheadAttention` | `CoSiMultiHeadAttention` |
    | its `RetroactiveMultiheadAttention` | `CoReMultiHeadAttention` |
    | its `SingleOutputTransformerEncoderLayer` | `CoSiTransformerEncoder` |
    | its `RetroactiveTransformerEncoderLayer` | `CoReTransformerEncoder` |

    Args:
        module: a live module; or weights by their names in the `state_dict` of a
            `torch.nn.MultiheadAttention`: a mapping to arrays or tensors, or the path of a
            safetensors file.
        seq_len: N, the window; None: that of a module that has one.
        num_heads: H, for weights, which do not know it; of a module it is its own.
        prefix: what the names of the weights begin with, as "encoder.self_attn.".
        **options: further arguments of the layer. Those that the module has too are its own where
            they are left out: dropout, dtype, activation and so on, and of continual-inference's
            query_index, and whether a regular call gives the one output.

    Returns:
        The layer, built. Its weights are copies.

    Raises:
        ValueError: if the module is none of these, or has what has no counterpart
            (`add_bias_kv`, `add_zero_attn`, layers that differ); if `seq_len` or `num_heads` is
            needed and left out, or the weights do not fit each other.
        ImportError: if a path is given, and safetensors is not installed.
    """
    if isinstance(module, (str, os.PathLike)):
        module = _weights_in(module)
    if isinstance(module, Mapping):
        weights = {k.removeprefix(prefix): v for k, v in module.items() if k.startswith(prefix)}
        if num_heads is None:
            raise ValueError("Expected num_heads, which weights alone do not tell, but got None")
        return from_torch_attention.attention_of(weights, num_heads, seq_len, options)
    for cls in type(module).__mro__:
        read = _MODULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if read is not None:
            return read(module, seq_len, options)
    raise ValueError(
        "Expected a torch.nn.MultiheadAttention, a SingleOutputMultiheadAttention of "
        f"continual-inference, or their weights, but got {name_of(module)}"
    )


# By the names of their classes, so that torch is imported by those alone who have it. The first in
# a module's order of inheritance counts. Each a function of (module, seq_len, options).
_MODULES = {
    "torch.nn.modules.activation.MultiheadAttention": from_torch_attention.multi_head_attention,
    "torch.nn.modules.transformer.TransformerEncoderLayer": from_torch_encoders.encoder_layer,
    "torch.nn.modules.transformer.TransformerEncoder": from_torch_encoders.encoder,
    "continual.multihead_attention.single_output_mha.SingleOutputMultiheadAttention": (
        from_torch_attention.single_output_attention
    ),
    "continual.multihead_attention.retroactive_mha.RetroactiveMultiheadAttention": (
        from_torch_attention.retroactive_attention
    ),
    # What its functions for encoder layers make.
    "continual.container.Sequential": from_torch_encoders.continual_encoder_layer,
}


def _weights_in(path):
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            f"Expected safetensors to be installed, to read {path}: `pip install safetensors`"
        ) from error
    return load_file(path)
