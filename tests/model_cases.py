"""Small Keras models and layers for every node of a plan, with their inputs and Keras' outputs.

case = CASES["co_si"]
model = case.build()                           # Seeded: the same weights every time.
inputs = case.inputs(model, random, (M, T))    # Arrays (M, T, ...).
expected = case.steps(model, inputs)           # Keras' outputs for these steps, also as arrays.
"""

import functools

import keras
import numpy as np
from keras import layers as kl
from keras import ops

import continual_transformers_tf as ct
import convert_cases
from model_case import Case, N

E, H, D = 6, 2, 3
HALVES = ("float16", "bfloat16")

CASES = {}


def case(function=None, *, name=None, **options):
    """Add a case, made by a function of a model's input, or by one without arguments."""
    if function is None:
        return functools.partial(case, name=name, **options)
    CASES[name or function.__name__] = Case(function, **options)
    return function


def model(*shape, dtype=None, name=None, **options):
    """Add a functional model: the function returns the outputs for an input (T, *shape)."""

    def register(function):
        def make():
            length = options.get("length", N)
            inputs = keras.Input((length, *shape), dtype=dtype)
            return keras.Model(inputs, function(inputs))

        kept = {k: v for k, v in options.items() if k != "length"}
        CASES[name or function.__name__] = Case(make, **kept)
        return function

    return register


def built(layer, *shape):
    layer.build((None, *shape))
    layer.built = True
    return layer


def co_si(n=N, **options):
    options = {"num_heads": H, "key_dim": D, "warm_up": "partial", **options}
    return ct.CoSiMultiHeadAttention(n, **options)


# Only attention, at the edges of the grid.

for n in (1, 2, 3, 16, 17):
    case(lambda n=n: built(co_si(n), E), name=f"co_si_window_{n}", window=n)
    case(
        lambda n=n: built(ct.CoReMultiHeadAttention(n, H, D, warm_up="partial"), E),
        name=f"co_re_window_{n}",
        window=n,
    )
for d, dv in ((1, 1), (12, 12), (33, 33), (12, 33), (33, 1), (1, 12)):
    case(
        lambda d=d, dv=dv: built(co_si(key_dim=d, value_dim=dv), E),
        name=f"co_si_key_{d}_value_{dv}",
    )
    case(
        lambda d=d, dv=dv: built(
            ct.CoReMultiHeadAttention(N, H, d, value_dim=dv, warm_up="partial"), E
        ),
        name=f"co_re_key_{d}_value_{dv}",
    )
CO_SI = {
    "gate": dict(use_gate=True, value_dim=5),
    "no_bias": dict(use_bias=False),
    "output_5": dict(output_shape=5),
    "output_2_3": dict(output_shape=(2, 3), use_gate=True),
    "sliding_window": dict(sliding_window=2),
    "first_query": dict(query_index=0),
    "second_query": dict(query_index=1, use_gate=True),
    "last_but_one": dict(query_index=-2),
    "first_query_sliding": dict(query_index=0, sliding_window=2),
    "middle_query_sliding": dict(query_index=2, sliding_window=2),
    "dropout": dict(dropout=0.5),
    "one_head": dict(num_heads=1),
}
for name, options in CO_SI.items():
    case(lambda options=options: built(co_si(**options), E), name=f"co_si_{name}")
# What attention of today has.
MODERN = {
    "grouped": dict(num_heads=4, num_key_value_heads=2),
    "multi_query_gate": dict(num_heads=3, num_key_value_heads=1, use_gate=True, value_dim=5),
    "rotary": dict(key_dim=4, rotary=dict()),
    "rotary_older_query": dict(rotary=dict(size=2, interleaved=True), query_index=1),
    "norms": dict(query_key_norm=True, norm_epsilon=1e-3),
    "soft_cap": dict(logit_soft_cap=0.8),
    "alibi": dict(position_bias=ct.ALiBi),
    "buckets": dict(
        position_bias=lambda: ct.RelativePositionBias(8, 6, bidirectional=True), query_index=-3
    ),
    "buckets_sliding": dict(
        position_bias=lambda: ct.RelativePositionBias(4, 3), sliding_window=2
    ),
    "sinks": dict(use_sinks=True, query_index=-2),
    "everything": dict(
        num_heads=4, num_key_value_heads=2, key_dim=6, value_dim=5, use_gate=True, query_index=-2,
        rotary=dict(size=4, scaling_factor=2.0), query_key_norm=True, logit_soft_cap=2.0,
        position_bias=lambda: ct.RelativePositionBias(6, 5, bidirectional=True), use_sinks=True,
    ),
}  # fmt: skip


def modern(rotary=None, position_bias=None, **options):
    return co_si(
        rotary=None if rotary is None else ct.Rotary(**rotary),
        position_bias=position_bias and position_bias(),
        **options,
    )


@case
def rotary_embedding():
    inputs = keras.Input((N, E))
    heads = kl.EinsumDense("abc,cde->abde", (N, 3, 2))(inputs)
    heads = ct.RotaryEmbedding(interleaved=True)(heads)
    y = kl.EinsumDense("abde,def->abf", (N, E))(heads)
    return keras.Model(inputs, co_si(single_output=False)(ct.RotaryEmbedding(size=4)(inputs + y)))


for name, options in MODERN.items():
    case(lambda options=options: built(modern(**options), E), name=f"co_si_{name}")
CO_RE = {
    "gate": dict(use_gate=True, value_dim=5),
    "no_bias": dict(use_bias=False),
    "output_2_3": dict(output_shape=(2, 3)),
    "sliding_window": dict(sliding_window=2),
    "sliding_window_gate": dict(sliding_window=3, use_gate=True, value_dim=2),
    "update": dict(algorithm="update"),
    "update_vectors": dict(algorithm="update", key_dim=4, value_dim=8),
    "recompute": dict(algorithm="recompute"),
}
for name, options in CO_RE.items():
    case(
        lambda options=options: built(
            ct.CoReMultiHeadAttention(N, H, warm_up="partial", **{"key_dim": D, **options}), E
        ),
        name=f"co_re_{name}",
    )


@case
def co_si_three_inputs():
    layer = co_si()
    layer.build((None, N, E), (None, N, 5), (None, N, 4))
    layer.built = True
    return layer


@case
def co_re_three_inputs():
    layer = ct.CoReMultiHeadAttention(N, H, D, warm_up="partial")
    layer.build((None, N, E), (None, N, 5), (None, N, 4))
    layer.built = True
    return layer


# Encoders.

ENCODER = {
    "plain": {},
    "norm_first": dict(norm_first=True),
    "relu_no_bias": dict(activation="relu", use_bias=False),
    "key_dim_softmax": dict(key_dim=5, activation="softmax"),
    "linear_dropout": dict(activation=None, dropout_rate=0.9, epsilon=1e-2),
    "tanh_norm_first": dict(activation="tanh", norm_first=True, key_dim=2),
    "layer_activation": dict(activation="leaky_relu"),
}
for name, options in ENCODER.items():
    for kind in (ct.CoSiTransformerEncoder, ct.CoReTransformerEncoder):
        case(
            lambda options=options, kind=kind: built(
                kind(N, E, H, 7, warm_up="partial", **options), N, E
            ),
            name=f"{'co_si' if kind is ct.CoSiTransformerEncoder else 'co_re'}_encoder_{name}",
        )
for kind in ("single_output", "retroactive"):
    for depth in (1, 2, 3):
        for name, options in {
            "": {},
            "_norm_first": dict(norm_first=True),
            "_final_norm": dict(final_norm=True, activation="relu", use_bias=False),
        }.items():
            case(
                lambda kind=kind, depth=depth, options=options: built(
                    ct.TransformerEncoder(
                        depth, N, E, H, 7, kind=kind, warm_up="partial", **options
                    ),
                    N,
                    E,
                ),
                name=f"stack_{kind}_{depth}{name}",
                window=N * depth,
            )
for n in (1, 2, 17):
    case(
        lambda n=n: built(
            ct.TransformerEncoder(2, n, E, H, 7, kind="retroactive", warm_up="partial"), n, E
        ),
        name=f"stack_retroactive_window_{n}",
        window=n,
    )


# Positions, delays, residuals.


@case
def positions_learned():
    layer = built(ct.CircularPositionalEncoding(5, E), N, E)
    layer(np.zeros((1, N, E)))
    layer(np.zeros((1, N, E)))  # After two calls, a stream starts at the third row.
    return layer


case(
    lambda: built(ct.CircularPositionalEncoding(7, 5, encoding="sinusoidal"), N, 5),
    name="positions_sinusoidal",
)
case(
    lambda: built(ct.CircularPositionalEncoding(1, 1, temporal_dim=2), 1, N),
    name="positions_of_one_row",
)
for name, shape, options in (
    ("vector", (3,), {}),
    ("matrix", (2, 3), {}),
    ("number", (), {}),
    ("int32", (2,), dict(dtype="int32")),
    ("int64", (2,), dict(dtype="int64")),
    ("bool", (2,), dict(dtype="bool")),
    ("at_once", (3,), dict(delay=0)),
    ("by_one", (3,), dict(delay=1)),
    ("time_last", (3,), dict(temporal_dim=-1)),
):
    case(
        lambda shape=shape, options=options: _delay(shape, **options),
        name=f"delay_{name}",
    )


def _delay(shape, delay=3, **options):
    layer = ct.CoDelay(delay, warm_up="partial", **options)
    with ct.call_mode("step"):
        return built(layer, *shape)


for n in (1, 3):
    case(lambda n=n: built(ct.CoWindow(n, warm_up="partial"), N, E), name=f"whole_window_{n}")
case(lambda: built(ct.CoResidual(co_si()), N, E), name="residual")
case(lambda: built(ct.CoResidual(co_si(query_index=0)), N, E), name="residual_delayed")
case(lambda: built(ct.CoResidual(ct.CoDelay(2, warm_up="partial")), N, E), name="residual_of_delay")
case(
    lambda: built(ct.CoResidual(ct.CoResidual(co_si(query_index=-2))), N, E),
    name="residual_of_residual",
)
case(
    lambda: built(ct.CoResidual(ct.CoSiTransformerEncoder(N, E, H, 7, warm_up="partial")), N, E),
    name="residual_of_encoder",
)
case(
    lambda: built(ct.CoResidual(ct.CircularPositionalEncoding(3, E)), N, E),
    name="residual_of_positions",
)


# Whole models: those of ct.convert's tests, and deeper models.

for function in convert_cases.MODELS:
    model(
        convert_cases.E,
        name=f"convert_{function.__name__}",
        length=convert_cases.N,
        window=convert_cases.N * 3,
    )(function)


@model(E)
def demo(x):
    x = kl.Dense(8)(x)
    x = ct.CircularPositionalEncoding(2 * N - 1, 8)(x)
    x = ct.CoSiTransformerEncoder(N, 8, H, 12)(x)
    return kl.Dense(3)(x[:, -1])


@model(E, window=7, first=2)
def convolutions(x):
    """Return rows of convolutions and pooling, which begin after two steps."""
    y = kl.Conv1D(E, 3, padding="causal", dilation_rate=2, groups=2)(x)
    y = kl.DepthwiseConv1D(2, activation="tanh")(y)
    return kl.MaxPooling1D(2, 1, "valid")(kl.SeparableConv1D(E, 1)(y))


@model(E, window=3)
def recurrent(x):
    x = kl.GRU(E, return_sequences=True)(kl.Conv1D(E, 3, padding="causal")(x))
    x = kl.GRU(5, return_sequences=True, reset_after=False)(x)
    x = kl.SimpleRNN(4, return_sequences=True, activation="sigmoid")(x)
    return kl.LSTM(3)(x)


@model(E)
def pooling_of_the_window(x):
    x = kl.Dense(5, "tanh")(x)
    return kl.Concatenate()([kl.GlobalAveragePooling1D()(x), kl.GlobalMaxPooling1D()(x)])


@model(E, length=None, seq_len=N, window=3 * N)
def deep_causal_stack(x):
    for i in range(3):
        y = kl.MultiHeadAttention(H, D, use_gate=i == 1)(x, x, use_causal_mask=True)
        x = kl.LayerNormalization()(x + y)
        x = x + kl.Dense(E)(kl.Dense(8, activation="gelu")(x))
    return x


@model(E, window=2 * N)
def causal_with_values_of_another_size(x):
    y = kl.Dense(5)(x)
    z = co_si(use_gate=True, single_output=False)(x, y, kl.Dense(4)(x), use_causal_mask=True)
    return kl.MultiHeadAttention(1, 2, value_dim=5)(z, z)[:, -1]


@model(E)
def late_answers(x):
    y = ct.CoResidual(co_si(query_index=0, single_output=False))(x)
    return kl.Dense(2)(kl.LayerNormalization()(y)) + ct.CoDelay(N - 1)(kl.Dense(2)(x))


@model(E)
def causal_query_in_the_middle(x):
    y = co_si(query_index=1, single_output=False)(x, x, use_causal_mask=True)
    return y[:, -3]


@model(E, window=2 * N)
def retroactive_then_anything(x):
    x = ct.CoReTransformerEncoder(N, E, H, 7)(x)
    x = ct.CoReTransformerEncoder(N, E, H, 7, norm_first=True)(x)
    x = kl.MultiHeadAttention(H, D, use_gate=True)(x, x) + x
    pooled = kl.GlobalAveragePooling1D()(x)
    return kl.Concatenate()([pooled, kl.GlobalMaxPooling1D()(x), kl.Flatten()(x), x[:, -2]])


@model(E)
def retroactive_with_residuals(x):
    y = x + ct.CoReMultiHeadAttention(N, H, D)(x)
    z = kl.MultiHeadAttention(H, D)(x, y)  # Queries of the window itself.
    return kl.Concatenate()([(x * y)[:, -2], z[:, -1], y[:, -1]])


@model(E)
def window_then_anything(x):
    x = ct.CoWindow(N)(kl.Dense(4)(x))
    return kl.Concatenate()([kl.Flatten()(kl.Conv1D(2, 3, padding="same")(x)), x[:, 0]])


@model(E, taken_only=True)
def retroactive_then_causal(x):
    x = ct.CoReMultiHeadAttention(N, H, D)(x, x, use_causal_mask=True)
    x = kl.MultiHeadAttention(H, D)(x, x, use_causal_mask=True)
    return kl.MultiHeadAttention(H, D, sliding_window=2)(x, x)


@model(E, first=1)  # The first step has no earlier query.
def retroactive_then_regular_attention_of_ours(x):
    x = ct.CoReMultiHeadAttention(N, H, D, use_bias=False)(x)
    y = ct.CoReMultiHeadAttention(N, H, D)(x)
    first = co_si(query_index=0)(y)
    second = co_si(query_index=-2, sliding_window=2)(y, y, use_causal_mask=True)
    newest = co_si()(y[:, -1:], y)
    return [y, first, second, newest, ct.CoSiTransformerEncoder(N, E, H, 7)(y)]


@model(E)
def retroactive_then_convolution(x):
    x = ct.CoReTransformerEncoder(N, E, H, 7)(x)
    y = kl.Conv1D(5, 2, padding="causal", activation="relu")(x)
    z = kl.Conv1D(3, 3, strides=2, padding="same")(x)
    y = kl.AveragePooling1D(2)(kl.Conv1D(5, 2, dilation_rate=1)(y)[:, :2])
    return kl.Concatenate()([kl.Flatten()(y), kl.Flatten()(kl.MaxPooling1D(2, 1)(z))])


@model(E)
def stack_in_a_model(x):
    x = kl.Dense(8)(x)
    x = ct.TransformerEncoder(2, N, 8, H, 7, kind="retroactive")(x)
    return kl.Dense(2)(kl.Flatten()(x))


# Row by row: operations within one step.

ACTIVATIONS = [
    "celu", "elu", "exponential", "gelu", "glu", "hard_shrink", "hard_sigmoid", "hard_silu",
    "hard_tanh", "leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6",
    "selu", "sigmoid", "silu", "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus",
    "sparse_sigmoid", "sparsemax", "squareplus", "tanh", "tanh_shrink",
]  # fmt: skip


@model(E)
def every_activation(x):
    x = 3 * kl.Dense(8)(x)
    dense = [kl.Dense(4, name)(x) for name in ("gelu", "softmax")]
    names = [name for name in ACTIVATIONS if name != "glu"]  # Keras' layer gives a wrong shape:
    return [kl.Activation(name)(x) for name in names] + dense  # glu halves the features.


@model(E)
def activations_with_numbers(x):
    functions = [
        functools.partial(keras.activations.gelu, approximate=True),
        functools.partial(keras.activations.celu, alpha=0.5),
        functools.partial(keras.activations.relu, negative_slope=0.2, max_value=1.5, threshold=0.3),
        functools.partial(keras.activations.threshold, threshold=0.2, default_value=-3.0),
        functools.partial(keras.activations.squareplus, b=2),
        functools.partial(keras.activations.softmax, axis=-2),
        functools.partial(keras.activations.soft_shrink, threshold=0.1),
        kl.LeakyReLU(0.7),
    ]
    x = kl.Reshape((3, 2))(newest_of(x))  # One step, with several axes.
    return [kl.Activation(f)(x) for f in functions] + [kl.Dense(2, functions[0])(x)]


@model(E)
def activation_layers(x):
    x = 2 * x
    return [
        layer(x)
        for layer in (
            kl.ReLU(negative_slope=0.1, max_value=1.0, threshold=0.5),
            kl.ReLU(6),
            kl.ReLU(max_value=2),
            kl.LeakyReLU(0.2),
            kl.ELU(0.7),
            kl.PReLU(shared_axes=[1]),
            kl.Softmax(),
            kl.Activation(kl.LeakyReLU(0.4)),
        )
    ]


@model(E)
def normalizations(x):
    return [
        layer(x)
        for layer in (
            kl.LayerNormalization(),
            kl.LayerNormalization(epsilon=0.1, center=False),
            kl.LayerNormalization(scale=False),
            kl.RMSNormalization(),
            kl.UnitNormalization(),
            kl.BatchNormalization(),
            kl.BatchNormalization(scale=False, center=False, epsilon=0.1),
            kl.Normalization(),
            kl.Normalization(invert=True),
            kl.Normalization(mean=0.5, variance=2.0),
            kl.Normalization(mean=np.arange(E), variance=np.arange(1.0, E + 1)),
            kl.Normalization(axis=None),
            kl.Rescaling(2.0, -1.0),
            kl.Rescaling(np.arange(E) / 3),
        )
    ]


@model(2, 3)
def of_features_with_several_axes(x):
    return [
        kl.LayerNormalization(axis=[-2, -1])(x),
        kl.LayerNormalization(axis=-2)(x),
        kl.BatchNormalization(axis=2)(x),
        kl.UnitNormalization(axis=[2, 3])(x),
        kl.Softmax(axis=(-2, -1))(x),
        kl.Softmax(axis=2)(x),
        kl.Concatenate(axis=2)([x, 2 * x]),
        kl.Normalization(axis=(2, 3))(x),
        kl.Normalization(axis=2)(x),
        kl.Dense(4)(x),
        kl.TimeDistributed(kl.Dense(4, activation="relu"))(x),
        kl.TimeDistributed(kl.Flatten())(x),
        x * np.arange(6.0).reshape(2, 3) + np.ones((2, 1)),
    ]


@model(2, 3)
def einsums(x):
    def einsum(equation, shape, bias_axes=None, **options):
        return kl.EinsumDense(equation, shape, bias_axes=bias_axes, **options)(x)

    return [
        einsum("abcd,de->abce", (None, 2, 4), "e", activation="relu"),
        einsum("abcd,cde->abe", (None, 4), "e"),
        einsum("abcd,cd->abc", (None, 2), "c"),
        einsum("abcd,cde->abce", (None, 2, 4), "ce"),
        einsum("abcd,cde->abec", (None, 4, 2), "e"),
        einsum("abcd,def->abfce", (None, 3, 2, 4), "fe"),
        einsum("abcd,ce->abed", (None, 4, 3)),
        einsum("abcd,e->abdce", (None, 3, 2, 2)),
        einsum("abcd,cf->abf", (None, 5), "f"),
    ]


@model(E)
def arithmetic(x):
    y = kl.Dense(E)(x)
    row = np.arange(1.0, E + 1)
    return [
        kl.Add()([x, y, x]),
        kl.Subtract()([x, y]),
        kl.Multiply()([x, y]),
        kl.Average()([x, y, y]),
        kl.Maximum()([x, y]),
        kl.Minimum()([x, y, 2 * x]),
        kl.Concatenate()([x, y, x]),
        (x + 1) * 2 - row,
        2 - x,
        x / 3,
        x / 4,
        ops.divide(row, 1 + ops.square(y)),
        x / ops.exp(y),
        ops.power(ops.absolute(x), 1.5),
        ops.power(2.0, y),
        x**2,
        ops.maximum(x, 0.1),
        ops.minimum(row, x),
        -x,
        ops.sqrt(ops.abs(x)) + ops.log(ops.exp(y)) + ops.sin(x) - ops.tanh(y),
        ops.cast(ops.cast(3 * x, "int32"), "float32") * 2,
        x * ops.convert_to_tensor(row.astype("float32")),
    ]


@model(E)
def keras_functions(x):
    """Functions of keras.activations and keras.ops, called as functions."""
    names = [n for n in ACTIVATIONS if n not in ("hard_silu", "mish", "sparsemax")]
    y = [getattr(keras.activations, name)(x) for name in names]
    y += [ops.cos(x), ops.log1p(ops.abs(x)), ops.reciprocal(3 + x * x), ops.rsqrt(1 + x * x)]
    y += [ops.sign(x), ops.relu6(x), ops.threshold(x, 0.5, -1.0), ops.leaky_relu(x, 0.3)]
    y += [ops.clip(x, -0.5, 0.7), ops.gelu(x), ops.concatenate([x, 2 * x], -1)]
    return y


@model(E)
def slices_of_features(x):
    return [x[:, :, 1:4], x[..., ::-2], x[:, :, 2], x[..., None, :], kl.Dense(2)(x[..., -2:])]


@model(2, 3)
def permuted_features(x):
    return [kl.Permute((1, 3, 2))(x), ops.transpose(x, (0, 1, 3, 2)), ops.swapaxes(x, -1, -2)]


@model(E)
def training_only(x):
    for layer in (
        kl.Dropout(0.5), kl.GaussianNoise(1.0), kl.GaussianDropout(0.5), kl.AlphaDropout(0.5),
        kl.Identity(),
    ):  # fmt: skip
        x = layer(x)
    x = kl.SpatialDropout1D(0.5)(ops.expand_dims(newest_of(kl.Dense(2)(x)), 1))
    return kl.ActivityRegularization(0.1)(x)


@model(E)
def sequences_of_layers(x):
    y = kl.TimeDistributed(kl.BatchNormalization())(x)
    y = kl.TimeDistributed(kl.Dropout(0.5))(y)
    shared = kl.Dense(E, activation="tanh")
    return shared(shared(y)) + shared(x)


# On one step only, and on whole windows: any operation.


def newest_of(x):
    return ct.CoDelay(1)(x)[:, -2]


@model(2, 6)
def shapes_of_a_step(x):
    x = newest_of(x)
    return [
        kl.Reshape((3, 4))(x),
        kl.Reshape((-1, 2))(x),
        kl.Flatten()(x),
        kl.Permute((2, 1))(x),
        ops.reshape(x, (-1, 4, 3)),
        ops.transpose(x, (0, 2, 1)),
        ops.swapaxes(x, 1, 2),
        ops.moveaxis(ops.reshape(x, (-1, 2, 3, 2)), 1, -1),
        ops.expand_dims(x, 1),
        ops.squeeze(x[:, :1], 1),
        ops.flip(x, -1),
        ops.flip(x, (1, 2)),
        ops.repeat(x, 2, axis=1),
        ops.tile(x, (1, 2, 1)),
        ops.roll(x, 1, axis=2),
        ops.pad(x, ((0, 0), (1, 0), (0, 2))),
        ops.pad(x, ((0, 0), (0, 0), (2, 1)), constant_values=1.5),
        ops.concatenate([x, 3 * x[:, :1]], 1),
        ops.stack([x, 2 * x], axis=-1),
        *ops.split(x, 3, axis=-1),
        *ops.unstack(x, axis=1),
        ops.take(x, [3, 1, 1], axis=-1),
        ops.take(x, [1, 3, 5], axis=2),
        x[:, 1, 2:5],
        x[:, ::-1, None, -1],
        x[..., 0],
        x[:, :1] + x,
        kl.RepeatVector(3)(kl.Flatten()(x)),
        kl.Cropping1D(1)(ops.tile(x, (1, 2, 1))),
        kl.ZeroPadding1D((1, 2))(x),
        kl.UpSampling1D(2)(x),
        ops.matmul(x, np.arange(12.0, dtype="float32").reshape(6, 2)),
        ops.einsum("abc,cd->abd", x, np.arange(12.0, dtype="float32").reshape(6, 2)),
    ]


@model(2, 6)
def reductions_of_a_step(x):
    x = newest_of(x)
    return [
        ops.mean(x, -1),
        ops.sum(x, (1, 2)),
        ops.max(x, 1, keepdims=True),
        ops.min(x, [-1, 1], keepdims=True),
        ops.var(x, -1),
        ops.std(x, (1, 2), keepdims=True),
        ops.logsumexp(x, -1),
        ops.average(x, 1),
        ops.normalize(x, -1),
        ops.softmax(x, axis=1),
        kl.GlobalAveragePooling1D()(x),
        kl.GlobalMaxPooling1D(keepdims=True)(x),
        kl.GlobalAveragePooling1D(data_format="channels_first")(x),
        kl.GroupNormalization(2)(x),
        kl.GroupNormalization(-1, axis=1, scale=False)(x),
        kl.LayerNormalization(axis=(1, 2))(x),
        kl.Masking()(x),
        kl.TimeDistributed(kl.Dense(3))(x),
        kl.Lambda(lambda y: ops.mean(y, 1) * 2)(x),
        kl.Masking()(x),
    ]


@case
def attention_to_one_row():
    """Keras' own attention, which a StreamingModel calls with only the newest step."""
    x = keras.Input((N, E))
    y = co_si()(x, x)
    y = kl.MultiHeadAttention(H, D, use_gate=True, sliding_window=1)(y, y, use_causal_mask=True)
    return ct.StreamingModel(keras.Model(x, y), warm_up="partial")


# Indices and masks.


def _ids(function, *shape, **options):
    model(*shape, dtype="int32", name=function.__name__, **options)(function)
    return function


@_ids
def tokens(x):
    x = kl.Embedding(5, E)(x)
    return kl.MultiHeadAttention(H, D)(x, x)[:, -1]


@_ids
def tokens_with_gaps(x):
    x = kl.Embedding(5, E, mask_zero=True)(x)
    return kl.Dense(2)(kl.MultiHeadAttention(H, D)(x, x))


@case
def several_tokens_a_step():
    x, ids = keras.Input((N, E)), keras.Input((N, 3), dtype="int64")
    y = kl.Flatten()(kl.Embedding(5, 4)(ids[:, -1]))
    return keras.Model([x, ids], kl.Dense(2)(kl.Concatenate()([y, co_si()(x, x)[:, 0]])))


@model(E, gaps=True)
def masked_attention(x):
    x = kl.Masking()(x)
    y = kl.MultiHeadAttention(H, D)(x, x, use_causal_mask=True)
    return kl.MultiHeadAttention(H, D)(kl.LayerNormalization()(y), y)


@model(E, gaps=True)
def masked_self_attention(x):
    x = kl.Dense(E)(kl.Dropout(0.1)(kl.Masking()(x)))
    return [co_si()(x), ct.CoReMultiHeadAttention(N, H, D)(x)]


@model(E, gaps=True)
def masked_query_that_waits(x):
    x = kl.Masking()(x)
    return co_si(query_index=1, use_gate=True)(x, x, x)


@model(E, gaps=True)
def masks_of_some_inputs(x):
    plain, masked = kl.Dense(E)(x), kl.Masking()(x)
    outputs = []
    for layer in (kl.Add(), kl.Maximum(), kl.Minimum(), kl.Concatenate(), kl.Average()):
        for pair in ([plain, masked], [masked, plain], [masked, kl.Masking(1.0)(x + 1)]):
            y = layer.__class__()(pair)
            outputs.append(co_si(key_dim=2)(y, y))
    return outputs


@model(E, gaps=True)
def masks_that_go_through(x):
    x = kl.Masking()(x)
    for layer in (
        kl.Activation("relu"), kl.Dense(E), kl.LayerNormalization(), kl.Rescaling(2.0),
        kl.Identity(), kl.UnitNormalization(), kl.PReLU(shared_axes=[1]),
    ):  # fmt: skip
        x = layer(x)
    return [co_si()(x, x), co_si()(x + 1, x), co_si()(x, x + 1, x), ct.CoResidual(co_si())(x)]


@model(E, gaps=True)
def masks_that_layers_are_given(x):
    """For layers with a mask argument, Keras adds the mask's computation to the graph."""
    masked = kl.Masking()(x)
    x = kl.BatchNormalization()(masked)
    y = kl.Add()([kl.TimeDistributed(kl.Dense(E))(x), kl.Masking(1.0)(x)])
    x = kl.TimeDistributed(kl.BatchNormalization())(y)
    return [co_si()(x, x), ops.cast(ops.not_equal(x, 0.0), "float32"), ops.not_equal(x, 1.0)]


@_ids
def gaps_that_layers_are_given(x):
    x = kl.BatchNormalization()(kl.Embedding(5, E, mask_zero=True)(x))
    return co_si()(x, x)


@model(E, gaps=True)
def masks_past_residuals(x):
    x = kl.Masking()(x)
    y = ct.CoResidual(ct.CircularPositionalEncoding(3, E))(x)
    z = ct.CoResidual(co_si(single_output=False))(x)
    return [co_si()(y, y), z]


# Several inputs, outputs and models.


@case
def two_inputs():
    first, second = keras.Input((N, E), name="first"), keras.Input((N, 3), name="second")
    x = kl.MultiHeadAttention(H, D)(first, kl.Dense(E)(second))
    return keras.Model([first, second], [x, kl.Dense(2)(x[:, -1])])


@case
def inputs_by_name():
    b, a = keras.Input((N, E), name="b"), keras.Input((N, 3), name="a")
    x = co_si(single_output=False)(b, kl.Dense(E)(a))
    outputs = {"z": x, "newest": kl.Dense(2)(x[:, -1]), "again": x}
    return keras.Model({"b": b, "a": a}, outputs)


@case
def nested_structures():
    a, b, c = (keras.Input((N, 2), name=name) for name in "abc")
    x = kl.Concatenate()([a, ct.CoDelay(0)(b), c])
    return keras.Model({"left": a, "right": [b, c]}, [x, {"a": a, "sum": kl.Add()([a, b])}])


@model(E)
def inputs_as_outputs(x):
    y = ct.CoDelay(0)(x)
    return [x, y, x, kl.Dense(2)(y)]


@model(E)
def models_within_models(x):
    given = keras.Input((N, E))
    inner = keras.Model(given, [kl.Dense(E, name="same")(given), co_si(single_output=False)(given)])
    y, z = inner(x)
    tail = keras.Sequential([kl.Dense(4, name="same", activation="relu"), kl.Dense(E)])
    return tail(y) + tail(z)


@case
def streaming_model_inside_another():
    given = keras.Input((N, E))
    y = kl.MultiHeadAttention(H, D)(given, given)
    inner = ct.convert(keras.Model(given, y), N, warm_up="none", name="inner")
    x = keras.Input((N, E))
    return ct.StreamingModel(keras.Model(x, kl.Dense(2)(inner(x))), warm_up="partial")


@case
def sequential():
    layers = [keras.Input((N, E)), kl.Dense(E), ct.CoSiTransformerEncoder(N, E, H, 7)]
    return keras.Sequential([*layers, kl.Flatten(), kl.Dense(2, activation="softmax")])


@model(E)
def model_of_the_newest_step(x):
    given = keras.Input((E,))
    head = keras.Model(given, kl.Dense(2)(kl.Dense(5, activation="relu")(given)))
    return head(co_si()(x)[:, -1])


# Dtypes.


@case(dtype="float64")
def float64():
    # Keras' regular attention rounds its scale to float32, and its GELU the root of 2. So the
    # scale here is a power of two, and there is no GELU.
    policy = dict(dtype="float64")
    options = dict(kind="retroactive", activation="tanh", key_dim=4, **policy)
    x = keras.Input((N, E), dtype="float64")
    y = kl.Dense(8, **policy)(x)
    y = ct.CircularPositionalEncoding(5, 8, encoding="sinusoidal", **policy)(y)
    y = ct.TransformerEncoder(3, N, 8, H, 7, **options)(y)
    return keras.Model(x, kl.Dense(2, activation="silu", **policy)(y))


for half in HALVES:

    @case(name=f"mixed_{half}", dtype=half)
    def mixed(half=half):
        policy = dict(dtype=f"mixed_{half}")
        x = keras.Input((N, E))
        y = kl.Dense(8, **policy)(x)
        y = ct.CoSiTransformerEncoder(N, 8, H, 7, **policy)(y)
        return keras.Model(x, kl.Dense(2)(y))


@case(dtype="bfloat16")
def narrow_cache():
    x = keras.Input((N, E))
    y = ct.CoSiTransformerEncoder(N, E, H, 7, cache_dtype="bfloat16")(x)
    return keras.Model(x, y)


# The user's own layers and functions whose graph Keras can trace.


@keras.saving.register_keras_serializable("model_cases")
class Scaled(keras.Layer):
    """A layer of a user."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), name="factor")
        self.matrix = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x, other=None, training=None):
        x = x * self.factor if training is not True else x
        if other is not None:
            x = x - 2 * other
        return ops.matmul(ops.softmax(x), self.matrix)


@model(E)
def layers_of_ones_own(x):
    x = newest_of(x)
    y = kl.Lambda(lambda z, factor: factor * ops.tanh(z), arguments={"factor": 3})(x)
    return [Scaled()(x), Scaled()(x, other=y)]


@model(E)
def activation_of_ones_own(x):
    def wave(y, height=2.0):
        return height * ops.sin(y) + y

    x = kl.Dense(4, activation=wave)(x)
    return kl.Activation(functools.partial(wave, height=0.5))(x)
