"""Keras models of every kind that streams, for the tests of ct.convert and StreamingModel."""

import keras

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
