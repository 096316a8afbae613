"""The model in google's sequence-layers with JAX: a step donates the buffers of its state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench.model_rivals import EPSILON, Array, Contestant, Pair, Weights
from continual_transformers_tf.bench.sizes import MODEL_OUTPUTS, ModelSize

if TYPE_CHECKING:
    import jax
    import sequence_layers.jax as sl


def _model(size: ModelSize) -> sl.Serial:
    import jax
    import sequence_layers.jax as sl

    def gelu(x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x, approximate=False)

    features = size.embed_dim
    layers = [sl.Dense.Config(features, name="embedding")]
    for i in range(size.layers):
        attention = [
            sl.DotProductSelfAttention.Config(
                size.heads,
                size.head,
                max_past_horizon=size.seq_len - 1,
                use_bias=True,
                name="attention",
            ),
            sl.EinsumDense.Config(
                "...hd,hde->...e", output_shape=[features], bias_axes="e", name="output"
            ),
        ]
        feed_forward = [
            sl.Dense.Config(features, activation=gelu, name="hidden"),
            sl.Dense.Config(features, name="output"),
        ]
        layers += [
            sl.Residual.Config(attention, name=f"attention_{i}"),
            sl.LayerNormalization.Config(epsilon=EPSILON, name=f"attention_norm_{i}"),
            sl.Residual.Config(feed_forward, name=f"feed_forward_{i}"),
            sl.LayerNormalization.Config(epsilon=EPSILON, name=f"output_norm_{i}"),
        ]
    layers.append(sl.Dense.Config(MODEL_OUTPUTS, name="classifier"))
    return sl.Serial.Config(layers, name="model").make()


def _parameters(size: ModelSize, weights: Weights) -> dict[str, Any]:
    import numpy as np

    def dense(layer: Pair) -> dict[str, Array]:
        return dict(kernel=layer[0], bias=layer[1])

    def norm(layer: Pair) -> dict[str, Array]:
        return dict(scale=layer[0], bias=layer[1])

    heads = (size.heads, size.head)
    named: dict[str, Any] = dict(
        embedding=dense(weights.embedding), classifier=dense(weights.classifier)
    )
    for i, block in enumerate(weights.blocks):
        kernels, biases = zip(*block[:3], strict=True)
        named[f"attention_{i}"] = dict(
            attention=dict(
                query_key_value_projection=dict(
                    kernel=np.stack([kernel.reshape(-1, *heads) for kernel in kernels], 1),
                    bias=np.stack([bias.reshape(heads) for bias in biases]),
                )
            ),
            output=dict(kernel=block.output[0].reshape(*heads, -1), bias=block.output[1]),
        )
        named[f"attention_norm_{i}"] = norm(block.attention_norm)
        named[f"feed_forward_{i}"] = dict(
            hidden=dense(block.feed_forward), output=dense(block.feed_forward_output)
        )
        named[f"output_norm_{i}"] = norm(block.output_norm)
    return dict(params=named)


def _sequence_layers(size: ModelSize, weights: Weights, threads: int) -> Contestant:
    if threads == 1:
        # Before JAX starts its threads: it has no other way to limit their number.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp
    import sequence_layers.jax as sl

    model = _model(size)
    variables = jax.tree.map(jnp.asarray, _parameters(size, weights))
    taken = jnp.ones((size.streams, 1), bool)

    def take(x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        sequence = sl.Sequence(x[:, jnp.newaxis], taken)
        y, state = model.apply(variables, sequence, state, training=False, method=model.step)
        return y.values[:, 0], state

    take = jax.jit(take, donate_argnums=1)
    spec = sl.ShapeDType((size.features,), jnp.float32)
    state = model.apply(
        variables, size.streams, spec, training=False, method=model.get_initial_state
    )
    # Copy the state: some of its buffers are shared, and shared buffers cannot be donated.
    state = jax.tree.map(jnp.array, state)

    def step(x: jax.Array) -> jax.Array:
        nonlocal state
        y, state = take(x, state)
        return jax.block_until_ready(y)

    return Contestant(step, positions=False)


RIVALS = {"sequence_layers": _sequence_layers}
