"""Streaming layers with the weights of PyTorch modules, from live modules or from files."""

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy.typing as npt

from continual_transformers_tf.models import from_torch_attention, from_torch_encoders
from continual_transformers_tf.models.from_torch_attention import name_of


def from_torch(
    module: Any,
    seq_len: int | None = None,
    *,
    num_heads: int | None = None,
    prefix: str = "",
    **options: Any,
) -> keras.layers.Layer:
    """Return a continual layer with the weights of a PyTorch module.

    Inputs are `(B, T, E)`, regardless of `batch_first`. They are in Keras' order: query, value,
    key. PyTorch's order is query, key, value.

    | module | layer |
    | --- | --- |
    | `torch.nn.MultiheadAttention`, weights | `CoSiMultiHeadAttention` |
    | `torch.nn.TransformerEncoderLayer` | `CoSiTransformerEncoder` |
    | `torch.nn.TransformerEncoder` | `TransformerEncoder`, retroactive unless `kind=` is given |
    | continual-inference's `SingleOutputMultiheadAttention` | `CoSiMultiHeadAttention` |
    | its `RetroactiveMultiheadAttention` | `CoReMultiHeadAttention` |
    | its `SingleOutputTransformerEncoderLayer` | `CoSiTransformerEncoder` |
    | its `RetroactiveTransformerEncoderLayer` | `CoReTransformerEncoder` |

    Args:
        module: A live module; or weights by their names in the `state_dict` of a
            `torch.nn.MultiheadAttention`: a mapping to arrays or tensors, or the path of a
            safetensors file.
        seq_len: N, the window; None: the module's own window, if it has one.
        num_heads: H. Weights need it, because they do not contain it. A module has its own.
        prefix: The beginning of the weights' names, such as "encoder.self_attn.".
        **options: Further arguments of the layer. Arguments that are left out are taken from the
            module if it has them: dropout, dtype, activation and so on; from
            continual-inference's attention also query_index and single_output.

    Returns:
        The layer, built. Its weights are copies.

    Raises:
        ValueError: If the module is none of these, or has something without a counterpart
            (`add_bias_kv`, `add_zero_attn`, layers that differ); if `seq_len` or `num_heads` is
            needed and left out; or if the weights do not fit each other.
        ImportError: If a path is given, and safetensors is not installed.
    """
    if isinstance(module, (str, os.PathLike)):
        module = _weights_in(module)
    if isinstance(module, Mapping):
        weights = {k.removeprefix(prefix): v for k, v in module.items() if k.startswith(prefix)}
        if num_heads is None:
            raise ValueError("Expected num_heads, but got None: weights do not contain it")
        return from_torch_attention.attention_of(weights, num_heads, seq_len, options)
    for cls in type(module).__mro__:
        read = _MODULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if read is not None:
            _check_computation(module)
            return read(module, seq_len, options)
    raise ValueError(
        "Expected a torch.nn.MultiheadAttention, TransformerEncoderLayer or TransformerEncoder, an "
        "attention module or encoder layer of continual-inference, or the weights of an attention "
        f"module, but got {name_of(module)}"
    )


def _check_computation(module: Any) -> None:
    """Raise ValueError if the user wrote the `forward` of the module or of a part of it.

    Only the weights are read, so the layer would leave out what it computes.
    """
    for path, part in [("", module), *module.named_modules()]:
        cls = next(c for c in type(part).__mro__ if "forward" in vars(c))
        if cls.__module__.split(".")[0] not in ("torch", "continual"):
            where = f" at {path}" if path else ""
            raise ValueError(
                "Expected a module of torch or of continual-inference, but "
                f"{name_of(part)}{where} has a forward of its own. Give ct.from_torch the "
                "attention inside, and write the rest in Keras"
            )


# Functions of (module, seq_len, options), by the names of the modules' classes, so that torch need
# not be imported here. The first match in the order of inheritance counts.
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
    # continual-inference's functions for encoder layers return a Sequential.
    "continual.container.Sequential": from_torch_encoders.continual_encoder_layer,
}


def _weights_in(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            f"Expected safetensors to be installed, to read {path}: `pip install safetensors`"
        ) from error
    return load_file(path)
