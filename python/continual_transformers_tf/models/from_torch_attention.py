"""Streaming attention with the weights of PyTorch attention: entries of `ct.from_torch`."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from continual_transformers_tf.layers.co_re_mha import CoReMultiHeadAttention
from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.ops.stream_state import check_integer

Array = npt.NDArray[Any]

# Modules: one function of (module, seq_len, options) for each type.


def multi_head_attention(
    module: Any, seq_len: int | None, options: dict[str, Any]
) -> keras.layers.Layer:
    """Return the layer for a `torch.nn.MultiheadAttention`."""
    if module.add_zero_attn:
        raise ValueError(
            "Expected add_zero_attn=False, but got a module that also attends to a step of zeros. "
            "keras.layers.MultiHeadAttention has no such step"
        )
    options = {"dropout": module.dropout, **options}
    return attention_of(module.state_dict(), module.num_heads, seq_len, options)


def single_output_attention(
    module: Any, seq_len: int | None, options: dict[str, Any]
) -> keras.layers.Layer:
    """Return the layer for a `SingleOutputMultiheadAttention` of continual-inference."""
    own = dict(query_index=module.query_index, single_output=module.single_output_forward)
    window = module.sequence_len if seq_len is None else seq_len
    return multi_head_attention(module, window, {**own, **options})


def retroactive_attention(
    module: Any, seq_len: int | None, options: dict[str, Any]
) -> keras.layers.Layer:
    """Return the layer for a `RetroactiveMultiheadAttention` of continual-inference."""
    window = module.sequence_len if seq_len is None else seq_len
    return multi_head_attention(module, window, {"cls": CoReMultiHeadAttention, **options})


def needed_window(seq_len: int | None) -> int:
    """Return seq_len. Raise ValueError if it is None."""
    if seq_len is None:
        raise ValueError(
            "Expected seq_len, the window, but got None: the module has none of its own"
        )
    return seq_len


def name_of(module: Any) -> str:
    """Return the full name of an object's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


# Weights.

_REFUSED = {
    "bias_k": "add_bias_kv=True: a learned step that every query attends to",
    "bias_v": "add_bias_kv=True: a learned step that every query attends to",
}
_KNOWN = {
    "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight",
    "out_proj.weight", "out_proj.bias", *_REFUSED,
}  # fmt: skip


def attention_of(
    weights: Mapping[str, Any], num_heads: int, seq_len: int | None, options: dict[str, Any]
) -> keras.layers.Layer:
    """Return the layer for the state_dict of a `torch.nn.MultiheadAttention`."""
    needed_window(seq_len)
    placed, inputs = attention_weights(weights, num_heads)
    query, key, value = inputs
    features = placed[-1].shape[-1]
    options = {
        "cls": CoSiMultiHeadAttention,
        "dtype": str(placed[0].dtype),
        "use_bias": len(placed) == 8,
        **options,
    }
    layer = options.pop("cls")(seq_len, num_heads, features // num_heads, **options)
    layer.build((None, seq_len, query), (None, seq_len, value), (None, seq_len, key))
    layer.set_weights(placed)
    return layer


def attention_weights(
    weights: Mapping[str, Any], num_heads: int
) -> tuple[list[Array], tuple[int, ...]]:
    """Convert a state_dict to Keras' weights.

    Returns:
        (the weights in Keras' order, the numbers of features of query, key and value).
    """
    check_integer("num_heads", num_heads, at_least=1)
    for name, why in _REFUSED.items():
        if name in weights:
            raise ValueError(
                f"Expected weights without {name}, but got {why}. keras.layers.MultiHeadAttention "
                "has no such step"
            )
    unknown = sorted(set(weights) - _KNOWN)
    if unknown or "out_proj.weight" not in weights:
        raise ValueError(
            "Expected the weights of a torch.nn.MultiheadAttention, out_proj.weight and so on, but "
            f"got {unknown or sorted(weights)}. prefix= chooses one attention among others"
        )
    arrays = {name: array_of(weight) for name, weight in weights.items()}
    kernels, biases = _projections(arrays)
    features = kernels[0].shape[0]
    if features % num_heads:
        raise ValueError(
            f"Expected num_heads to divide the {features} features, but got {num_heads}"
        )
    size = features // num_heads
    # PyTorch's kernels are [outputs, inputs], the heads one after the other.
    placed = [kernel.T.reshape(-1, num_heads, size) for kernel in kernels[:3]]
    placed.append(kernels[3].T.reshape(num_heads, size, features))
    if biases:
        placed_biases = [bias.reshape(num_heads, size) for bias in biases[:3]] + [biases[3]]
        placed = [w for pair in zip(placed, placed_biases, strict=True) for w in pair]
    return placed, tuple(kernel.shape[1] for kernel in kernels[:3])


def _projections(arrays: Mapping[str, Array]) -> tuple[list[Array], list[Array]]:
    """Return (kernels `[E, inputs]` of query, key, value and output, their biases or [])."""
    output = arrays["out_proj.weight"]
    if "in_proj_weight" in arrays:
        kernels = np.split(arrays["in_proj_weight"], 3)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"Expected in_proj_weight, or {names}, but there is no {missing}")
        kernels = [arrays[name] for name in names]
    for kernel in kernels:
        if kernel.ndim != 2 or output.shape != (len(kernel), len(kernel)):
            raise ValueError(
                f"Expected projections to the {len(output)} features of out_proj.weight "
                f"{output.shape}, but got one of shape {kernel.shape}"
            )
    given = [name for name in ("in_proj_bias", "out_proj.bias") if name in arrays]
    if not given:
        return [*kernels, output], []
    if len(given) == 1:
        raise ValueError(f"Expected in_proj_bias and out_proj.bias, or neither, but got {given}")
    return [*kernels, output], [*np.split(arrays["in_proj_bias"], 3), arrays["out_proj.bias"]]


def array_of(weight: Any) -> Array:
    """Return a tensor as an array. bfloat16 has the dtype of ml_dtypes, because NumPy has none."""
    if not hasattr(weight, "detach"):
        return np.asarray(weight)
    weight = weight.detach().cpu()
    if str(weight.dtype) == "torch.bfloat16":
        import ml_dtypes

        return weight.float().numpy().astype(ml_dtypes.bfloat16)
    return weight.numpy()
