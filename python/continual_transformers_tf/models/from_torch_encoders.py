"""Streaming encoders with the weights of PyTorch encoders: entries of `ct.from_torch`."""

import types
from typing import Any

import keras

from continual_transformers_tf.layers.co_re_transformer_encoder import CoReTransformerEncoder
from continual_transformers_tf.layers.co_si_transformer_encoder import CoSiTransformerEncoder
from continual_transformers_tf.layers.transformer_encoder import TransformerEncoder
from continual_transformers_tf.models.from_torch_attention import (
    Array,
    array_of,
    attention_weights,
    name_of,
    needed_window,
)


def encoder_layer(
    module: Any, seq_len: int | None, options: dict[str, Any]
) -> CoSiTransformerEncoder:
    """Return a `CoSiTransformerEncoder` for a `torch.nn.TransformerEncoderLayer`."""
    return _block(CoSiTransformerEncoder, module, seq_len, options)


def continual_encoder_layer(
    module: Any, seq_len: int | None, options: dict[str, Any]
) -> CoReTransformerEncoder | CoSiTransformerEncoder:
    """Return a block for an encoder layer of continual-inference, a Sequential of named parts."""
    parts = {}
    for path, part in module.named_modules():
        name = path.rsplit(".", 1)[-1]
        if name == "fn":  # Some parts wrap a module as `fn`.
            name = path.rsplit(".", 2)[-2]
        parts[name] = part
    missing = [name for name in _PARTS if name not in parts]
    if missing:
        raise ValueError(
            f"Expected a Sequential that is an encoder layer, but {name_of(module)} has no "
            f"{', '.join(missing)}"
        )
    attention = parts["self_attn"]
    retroactive = type(attention).__name__ == "RetroactiveMultiheadAttention"
    if not retroactive and attention.query_index != -1:
        raise ValueError(
            f"Expected an encoder layer with query_index=-1, but got {attention.query_index}. "
            "CoResidual(CoSiMultiHeadAttention(query_index=...)) attends from an earlier step"
        )
    activation = parts["activation"]
    while hasattr(activation, "fn"):
        activation = activation.fn
    layer = types.SimpleNamespace(
        **{name: parts[name] for name in _PARTS},
        dropout1=parts["dropout"],
        activation=activation,
        norm_first=False,
    )
    cls = CoReTransformerEncoder if retroactive else CoSiTransformerEncoder
    return _block(cls, layer, seq_len or attention.sequence_len, options)


_PARTS = ("self_attn", "norm1", "linear1", "linear2", "norm2")


def encoder(module: Any, seq_len: int | None, options: dict[str, Any]) -> TransformerEncoder:
    """Return a `ct.TransformerEncoder` for a `torch.nn.TransformerEncoder`.

    Without `kind=` it is the retroactive stack, whose output is the module's output for the newest
    step of every window.
    """
    blocks = list(module.layers)
    if module.norm is not None and module.norm.eps != blocks[0].norm1.eps:
        raise ValueError(
            f"Expected one epsilon for all layer norms, but got {blocks[0].norm1.eps} in the "
            f"layers and {module.norm.eps} after the last"
        )
    own = _options_of(blocks[0])
    for block in blocks[1:]:
        if _options_of(block) != own:
            raise ValueError(
                f"Expected layers with equal options, but got {own} and {_options_of(block)}"
            )
    sizes = _sizes(blocks[0])
    stack = TransformerEncoder(
        len(blocks),
        needed_window(seq_len),
        *sizes,
        **{"kind": "retroactive", "final_norm": module.norm is not None, **own, **options},
    )
    stack.build((None, None, sizes[0]))
    weights = [weight for block in blocks for weight in _weights(block, sizes[1])]
    if module.norm is not None:
        weights += [array_of(module.norm.weight), array_of(module.norm.bias)]
    stack.set_weights(weights)
    return stack


def _block(
    cls: type[CoReTransformerEncoder] | type[CoSiTransformerEncoder],
    module: Any,
    seq_len: int | None,
    options: dict[str, Any],
) -> CoReTransformerEncoder | CoSiTransformerEncoder:
    sizes = _sizes(module)
    block: keras.layers.Layer = cls(
        needed_window(seq_len), *sizes, **{**_options_of(module), **options}
    )
    block.build((None, None, sizes[0]))
    block.set_weights(_weights(module, sizes[1]))
    return block


def _sizes(module: Any) -> tuple[int, int, int]:
    """Return embed_dim, num_heads and ff_dim."""
    attention = module.self_attn
    return attention.embed_dim, attention.num_heads, module.linear1.out_features


def _options_of(module: Any) -> dict[str, Any]:
    if module.norm1.eps != module.norm2.eps:
        raise ValueError(
            f"Expected one epsilon for all layer norms, but got {module.norm1.eps} and "
            f"{module.norm2.eps}"
        )
    for name in ("linear1", "norm1"):
        if getattr(module, name).bias is None:
            raise ValueError(f"Expected a module with biases, but its {name} has none")
    if module.self_attn.add_zero_attn or module.self_attn.bias_k is not None:
        raise ValueError("Expected an attention without add_bias_kv and add_zero_attn")
    return dict(
        dropout_rate=module.dropout1.p,
        key_dim=module.self_attn.embed_dim // module.self_attn.num_heads,
        use_bias=module.self_attn.in_proj_bias is not None,
        norm_first=module.norm_first,
        activation=_activation(module.activation),
        epsilon=module.norm1.eps,
        dtype=str(module.linear1.weight.dtype).removeprefix("torch."),
    )


def _activation(activation: Any) -> str:
    """Return Keras' name of an activation function or module of torch."""
    name = getattr(activation, "__name__", type(activation).__name__).lower()
    known = {"relu": "relu", "gelu": "gelu", "silu": "silu", "tanh": "tanh"}
    if name not in known or getattr(activation, "approximate", "none") != "none":
        raise ValueError(f"Expected one of the activations {sorted(known)}, but got {activation!r}")
    return known[name]


def _weights(module: Any, num_heads: int) -> list[Array]:
    """Return a block's weights, in this package's order."""
    dense = [
        array_of(weight) if i % 2 else array_of(weight).T
        for linear in (module.linear1, module.linear2)
        for i, weight in enumerate((linear.weight, linear.bias))
    ]
    first, second = (
        [array_of(norm.weight), array_of(norm.bias)] for norm in (module.norm1, module.norm2)
    )
    attention, _ = attention_weights(module.self_attn.state_dict(), num_heads)
    return [*attention, *first, *dense, *second]
