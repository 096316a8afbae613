"""Keras models that stream, and that do not, for the tests of ct.convert and ct.explain."""

import keras
import numpy as np

import continual_transformers_tf as ct

N, E, H, D = 6, 8, 2, 4


def attention(name=None, **options):
    return keras.layers.MultiHeadAttention(H, D, name=name, **options)


def one_block(x):
    """Return a pre-norm block and a head on its newest row, with operators between the layers."""
    y = keras.layers.LayerNormalization()(x)
    x = x + attention()(y, y)
    y = keras.layers.TimeDistributed(keras.layers.LayerNormalization())(x)
    y = keras.layers.Dense(2 * E, activation="gelu")(y)
    x = keras.layers.Add()([x, keras.layers.Dropout(0.1)(keras.layers.Dense(E)(y))])
    return keras.layers.Dense(3, activation="softmax")(x[:, -1])


def causal_stack(x):
    for _ in range(3):
        x = keras.layers.LayerNormalization()(x + attention()(x, x, use_causal_mask=True))
    return keras.layers.Dense(3)(x)


def causal_then_full(x):
    x = x + attention()(x, x, use_causal_mask=True)
    x = keras.layers.BatchNormalization()(x + attention()(x, x))
    return keras.layers.Dense(2)(keras.layers.BatchNormalization()(x[:, -1, :]))


def query_from_later(x):
    """Return attention whose query comes from an attention that sees the whole window.

    This works for the newest query, because it is used only once.
    """
    y = attention()(x, x)
    return attention()(y, x)[:, -1]


def row_by_row(x):
    for equation in ("abc,cd->abd", "...x,xy->...y"):
        shape = (None, E) if equation[1] == "b" else E
        x = keras.layers.EinsumDense(equation, shape, bias_axes=equation[-1])(x)
    return attention()(x, x)


def of_the_newest_alone(x):
    """Return a model with any kind of layers after x[:, -1:]: they run on each step."""
    y = attention(use_gate=True, value_dim=3)(x, x)[:, -1:]
    y = keras.layers.Flatten()(keras.layers.Conv1D(4, 1)(y))
    return keras.layers.Reshape((2, 2))(keras.layers.Dense(4)(y))


def nested(x):
    inner_input = keras.Input((None, E))
    inner = keras.Model(inner_input, attention()(inner_input, inner_input) + inner_input)
    return keras.layers.Dense(2)(keras.Sequential([inner, keras.layers.ReLU()])(x))


def masked(x):
    x = keras.layers.Masking()(x)
    return keras.layers.Dense(2)(attention()(x, x))


def already_ours(x):
    x = ct.CircularPositionalEncoding(2 * N, E, call_update_index_steps=0)(x)
    return keras.layers.Dense(2)(keras.layers.Flatten()(ct.CoSiTransformerEncoder(N, E, H, 9)(x)))


MODELS = [
    one_block, causal_stack, causal_then_full, row_by_row, query_from_later, of_the_newest_alone,
    nested, masked, already_ours,
]  # fmt: skip


def model_of(function, random, length=N):
    inputs = keras.Input((length, E))
    model = keras.Model(inputs, function(inputs))
    model.set_weights([0.1 + random.random(size=w.shape) * 0.6 for w in model.weights])
    return model


def newest(y, x):
    """Return the newest step's row of y, if y has a row for every step of x; otherwise y."""
    return y[:, -1] if len(y.shape) == 3 and y.shape[1] == x.shape[1] else y


# Models that do not stream.


def twice(x):
    layer = attention("shared")
    return layer(x, x) + layer(x, x)


def newest_embedding(x):
    # The shape is (B, 1, E), but the row is computed from all steps.
    return keras.layers.Conv1D(E, N, name="embedding")(x)


def with_positions(x):
    return attention()(x, x) + np.ones((N, E), "float32")


class Exp(keras.layers.Layer):
    def call(self, x):
        return keras.ops.cumsum(x, 1)


# Name: (function, a pattern of the error).
CANNOT = {
    "convolution": (
        lambda x: keras.layers.Conv1D(E, 3, name="conv")(attention()(x, x)), "conv"
    ),
    "pooling": (
        lambda x: keras.layers.GlobalAveragePooling1D(name="pool")(attention()(x, x)), "pool"
    ),
    "flatten": (lambda x: keras.layers.Flatten(name="flat")(attention()(x, x)), "flat"),
    "recurrence": (lambda x: keras.layers.LSTM(4, name="memory")(attention()(x, x)), "memory"),
    "norm over time": (
        lambda x: keras.layers.LayerNormalization(axis=1, name="norm")(attention()(x, x)), "norm"
    ),
    "softmax over time": (
        lambda x: keras.layers.Softmax(axis=-2, name="soft")(attention()(x, x)), "soft"
    ),
    "concatenation in time": (
        lambda x: keras.layers.Concatenate(axis=1, name="longer")([attention()(x, x), x]), "longer"
    ),
    "a row for each step": (with_positions, "Add"),
    "an array over tokens": (
        lambda x: attention()(*[keras.layers.Dense(E)(x) + np.ones((1, N, 1), "float32")] * 2),
        "Add",
    ),
    "one row for all": (
        lambda x: attention()(*[keras.layers.Add(name="spread")([x, newest_embedding(x)])] * 2),
        "spread|embedding",
    ),
    "other lengths": (
        lambda x: attention("uneven")(x, keras.layers.ZeroPadding1D(1)(x)), "uneven"
    ),
    "another row": (lambda x: attention()(x, x)[:, 2], "GetItem"),
    "windows with their newest": (lambda x: attention()(x, x) + x[:, -1:], "only the newest step"),
    "attention to attention": (
        lambda x: attention("second")(*[attention("first")(x, x)] * 2), "second"
    ),
    "twice": (twice, "shared"),
    "a mask of windows": (
        lambda x: attention("veiled")(x, x, attention_mask=np.ones((1, N, N), bool)), "veiled"
    ),
    "no attention": (lambda x: keras.layers.Dense(2)(x), "no layer of"),
    "other axes": (
        lambda x: attention("squares", attention_axes=(1, 2))(x[:, :, None], x[:, :, None]),
        "squares|GetItem",
    ),
    "a kernel over time": (
        lambda x: attention()(
            *[keras.layers.EinsumDense("abc,bcd->abd", (N, E), name="each")(x)] * 2
        ),
        "each",
    ),
    "a bias over time": (
        lambda x: attention()(
            *[keras.layers.EinsumDense("abc,cd->abd", (N, E), bias_axes="bd", name="each")(x)] * 2
        ),
        "each",
    ),
    "a product over time": (
        lambda x: attention()(
            *[keras.layers.EinsumDense("...tx,ts->...sx", (N, E), name="across")(x)] * 2
        ),
        "across",
    ),
    "axes without a stream": (
        lambda x: attention("over", attention_axes=(2,))(x[:, :, None], x[:, :, None])[:, -1],
        "over .CoSiMultiHeadAttention. takes no steps",
    ),
    "a layer of the name of an op": (lambda x: attention()(Exp(name="mine")(x), x), "mine"),
    "the newest alone": (
        lambda x: ct.CoSiMultiHeadAttention(N, H, D, name="after")(
            ct.CoSiMultiHeadAttention(N, H, D)(x)
        ),
        "after",
    ),
}  # fmt: skip
