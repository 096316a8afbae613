"""Layers that stream with the weights of PyTorch's, from live modules and from files of them."""

import os
from collections.abc import Mapping

import numpy as np

from continual_transformers_tf.layers.co_si_mha import CoSiMultiHeadAttention
from continual_transformers_tf.ops.stream_state import check_integer


def from_torch(module, seq_len=None, *, num_heads=None, prefix="", **options):
    """A `CoSiMultiHeadAttention` with the weights of an attention of PyTorch.

    It is called as Keras' layers are: `(B, T, E)` whatever `batch_first` says, and in the order
    query, value, key, where PyTorch's is query, key, value.

    Args:
        module: a live `torch.nn.MultiheadAttention` or `SingleOutputMultiheadAttention` of
            continual-inference; or weights by their names in such a module's `state_dict`: a
            mapping to arrays or tensors, or the path of a safetensors file.
        seq_len: N, the window; None: that of a module that has one.
        num_heads: H, for weights, which do not know it; of a module it is its own.
        prefix: what the names of the weights begin with, as "encoder.self_attn.".
        **options: further arguments of `CoSiMultiHeadAttention`. Those that the module has too are
            its own where they are left out: dropout, dtype, and of continual-inference's
            query_index, and whether a regular call gives the one output.

    Returns:
        The layer, built. Its weights are copies.

    Raises:
        ValueError: if the module is none of these, or has what has no counterpart
            (`add_bias_kv`, `add_zero_attn`); if `seq_len` or `num_heads` is needed and left out, or
            the weights do not fit each other.
        ImportError: if a path is given, and safetensors is not installed.
    """
    if isinstance(module, (str, os.PathLike)):
        module = _weights_in(module)
    if isinstance(module, Mapping):
        weights = {k.removeprefix(prefix): v for k, v in module.items() if k.startswith(prefix)}
        if num_heads is None:
            raise ValueError("Expected num_heads, which weights alone do not tell, but got None")
        return _attention(weights, num_heads, seq_len, options)
    for cls in type(module).__mro__:
        read = _MODULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if read is not None:
            return read(module, seq_len, options)
    raise ValueError(
        "Expected a torch.nn.MultiheadAttention, a SingleOutputMultiheadAttention of "
        f"continual-inference, or their weights, but got {_name_of(module)}"
    )


# Modules, each a function of (module, seq_len, options).


def _multi_head_attention(module, seq_len, options):
    if module.add_zero_attn:
        raise ValueError(
            "Expected add_zero_attn=False, but got a module that also attends to a step of zeros, "
            "which no window of keras.layers.MultiHeadAttention has"
        )
    options = {"dropout": module.dropout, **options}
    return _attention(module.state_dict(), module.num_heads, seq_len, options)


def _single_output_attention(module, seq_len, options):
    own = dict(query_index=module.query_index, single_output=module.single_output_forward)
    window = module.sequence_len if seq_len is None else seq_len
    return _multi_head_attention(module, window, {**own, **options})


def _retroactive_attention(module, seq_len, options):
    raise ValueError(
        f"Expected an attention with a single output, but {_name_of(module)} gives those of all "
        "steps of the window"
    )


# By the names of their classes, so that torch is imported by those alone who have it. The first in
# a module's order of inheritance counts.
_MODULES = {
    "torch.nn.modules.activation.MultiheadAttention": _multi_head_attention,
    "continual.multihead_attention.single_output_mha.SingleOutputMultiheadAttention": (
        _single_output_attention
    ),
    "continual.multihead_attention.retroactive_mha.RetroactiveMultiheadAttention": (
        _retroactive_attention
    ),
}


def _name_of(module):
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


def _attention(weights, num_heads, seq_len, options):
    """The layer, from the state_dict of a `torch.nn.MultiheadAttention`."""
    check_integer("num_heads", num_heads, at_least=1)
    if seq_len is None:
        raise ValueError("Expected seq_len, the window, which the module does not know: got None")
    for name, why in _REFUSED.items():
        if name in weights:
            raise ValueError(
                f"Expected weights without {name}, but got {why}, which no window of "
                "keras.layers.MultiHeadAttention has"
            )
    unknown = sorted(set(weights) - _KNOWN)
    if unknown or "out_proj.weight" not in weights:
        raise ValueError(
            "Expected the weights of a torch.nn.MultiheadAttention, out_proj.weight and so on, but "
            f"got {unknown or sorted(weights)} (prefix= chooses one attention among others)"
        )
    arrays = {name: _array(weight) for name, weight in weights.items()}
    kernels, biases = _projections(arrays)
    features = kernels[0].shape[0]
    if features % num_heads:
        raise ValueError(
            f"Expected num_heads to divide the {features} features, but got {num_heads}"
        )
    size = features // num_heads
    options = {"dtype": str(kernels[0].dtype), "use_bias": bool(biases), **options}
    layer = CoSiMultiHeadAttention(seq_len, num_heads, size, **options)
    query, key, value, _ = (kernel.shape[1] for kernel in kernels)
    layer.build((None, seq_len, query), (None, seq_len, value), (None, seq_len, key))
    # PyTorch's kernels are [outputs, inputs], the heads one after the other.
    placed = [kernel.T.reshape(-1, num_heads, size) for kernel in kernels[:3]]
    placed.append(kernels[3].T.reshape(num_heads, size, features))
    if biases:
        placed_biases = [bias.reshape(num_heads, size) for bias in biases[:3]] + [biases[3]]
        placed = [w for pair in zip(placed, placed_biases, strict=True) for w in pair]
    layer.set_weights(placed)
    return layer


def _projections(arrays):
    """Kernels `[E, inputs]` of query, key, value and output, and their biases, or none."""
    output = arrays["out_proj.weight"]
    if "in_proj_weight" in arrays:
        kernels = np.split(arrays["in_proj_weight"], 3)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"Expected in_proj_weight, or else {names}, but there is no {missing}")
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


def _array(weight):
    """An array of a tensor; those of bfloat16, which NumPy does not know, as TensorFlow's is."""
    if not hasattr(weight, "detach"):
        return np.asarray(weight)
    weight = weight.detach().cpu()
    if str(weight.dtype) == "torch.bfloat16":
        import ml_dtypes

        return weight.float().numpy().astype(ml_dtypes.bfloat16)
    return weight.numpy()


def _weights_in(path):
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            "reading weights from a file needs safetensors: install it with the extra torch, as by "
            "`pip install '.[cpu,torch]'` in a checkout"
        ) from error
    return load_file(path)
