"""Models as people bring them: what streams of them, and what ct.explain and ct.convert say."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl
from keras import ops

N, E, H, D = 8, 6, 2, 3


class TransformerBlock(kl.Layer):
    """The block of Keras' example of text classification."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention = kl.MultiHeadAttention(H, D)
        self.feed_forward = keras.Sequential([kl.Dense(8, activation="relu"), kl.Dense(E)])
        self.norm_1, self.norm_2 = kl.LayerNormalization(), kl.LayerNormalization()

    def call(self, x):
        y = self.norm_1(x + self.attention(x, x))
        return self.norm_2(y + self.feed_forward(y))


class Mine(kl.Layer):
    def call(self, x):
        return tf.nn.relu(x)


class Classifier(keras.Model):
    """A subclassed model: it has no graph."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention, self.head = kl.MultiHeadAttention(H, D, name="heads"), kl.Dense(2)

    def call(self, x):
        return self.head(self.attention(x, x)[:, -1])


class Scaled(keras.Model):
    """A functional model with a call of its own."""

    def call(self, x):
        return 2 * super().call(x)


def attend(x, **options):
    return kl.LayerNormalization()(x + kl.MultiHeadAttention(H, D)(x, x, **options))


def functional(function, *shape, length=N, dtype=None):
    x = keras.Input((length, *shape), dtype=dtype)
    return keras.Model(x, function(x))


def of_rows(function, **options):
    return lambda: functional(function, E, **options)


def masked_language_model(tokens):
    x = kl.Embedding(20, E)(tokens) + np.linspace(0, 1, N * E).reshape(N, E).astype("float32")
    x = attend(attend(x))
    return kl.Dense(20, activation="softmax")(kl.Dense(E, activation="gelu")(x))


def subclassed():
    model = Classifier(name="classifier")
    model(np.zeros((1, N, E), "float32"))
    return model


def two_inputs():
    x, y = keras.Input((N, E)), keras.Input((3,))
    return keras.Model([x, y], kl.Concatenate()([attend(x)[:, -1], y]))


def of_functions():
    inner = functional(lambda x: x[:, -1], E)
    return functional(lambda x: inner(attend(x)), E)


# Name: (what makes the model, parts of the lines that ct.explain prints; none: it streams).
BROUGHT = {
    "one block": (of_rows(lambda x: kl.Dense(2)(attend(x)[:, -1])), []),
    "a positional embedding": (
        of_rows(lambda x: attend(x + kl.Embedding(N, E)(ops.arange(N)))[:, -1]),
        ["adds row i of a table of 8 rows", "positions='recycle'"],
    ),
    "a convolution": (of_rows(lambda x: attend(kl.Conv1D(E, 3, padding="same")(x))[:, -1]), None),
    "a recurrence": (of_rows(lambda x: attend(kl.GRU(E, return_sequences=True)(x))[:, -1]), None),
    "pooling": (of_rows(lambda x: kl.Dense(2)(kl.GlobalAveragePooling1D()(attend(x)))), None),
    "a Lambda of TensorFlow": (
        of_rows(lambda x: attend(kl.Lambda(lambda y: tf.nn.relu(y))(x))[:, -1]), ["@ct.row_wise"],
    ),
    "slices of features": (of_rows(lambda x: attend(x[..., 1:4] * x[..., :1])[:, -1]), []),
    "slices of time": (of_rows(lambda x: attend(x)[:, 2:5]), ["x[:, -1]"]),
    "the first row": (of_rows(lambda x: kl.Dense(2)(attend(x)[:, 0])), ["x[:, -1]"]),
    "a block of the user's own": (
        of_rows(lambda x: TransformerBlock(name="block")(x)[:, -1]),
        ["calls multi_head_attention", "put the layers inside it into the graph"],
    ),
    "a layer of the user's own": (of_rows(lambda x: attend(Mine()(x))[:, -1]), ["@ct.row_wise"]),
    "two blocks": (of_rows(lambda x: attend(attend(x))[:, -1]), ["kind='retroactive'"]),
    "a masked language model": (
        lambda: functional(masked_language_model, dtype="int32"),
        ["adds row i of a table of 8 rows", "kind='retroactive'"],
    ),
    "several outputs": (
        of_rows(lambda x: {"row": attend(x)[:, -1], "all": attend(x), "mean": ops.mean(x, 1)}),
        ["ct.CoWindow"],
    ),
    "group normalization": (
        of_rows(lambda x: attend(kl.GroupNormalization(2)(x))[:, -1]), ["TimeDistributed"],
    ),
    "Flatten": (of_rows(lambda x: kl.Dense(2)(kl.Flatten()(attend(x)))), ["kind='retroactive'"]),
    "a mask of attention": (
        of_rows(lambda x: attend(x, attention_mask=np.tril(np.ones((1, N, N), bool)))[:, -1]),
        ["attention_mask"],
    ),
    "an open length": (of_rows(lambda x: attend(x)[:, -1], length=None), ["seq_len"]),
    "a subclassed model": (subclassed, ["has no graph to read"]),
    "a call of its own": (
        lambda: Scaled(x := keras.Input((N, E)), attend(x)[:, -1]), ["has a call of its own"],
    ),
    "a model never called": (lambda: keras.Sequential([kl.Dense(2)]), ["never been called"]),
    "an input without time": (two_inputs, ["no axis of time"]),
    "texts": (
        lambda: functional(lambda x: kl.StringLookup(vocabulary=["a"])(x), 2, dtype="string"), None
    ),
    "no attention": (of_rows(lambda x: kl.Dense(2)(x)), []),
    "a model in a model": (of_functions, None),
    "images": (
        lambda: functional(lambda x: kl.Dense(2)(kl.Flatten()(kl.Conv2D(2, 3)(x))), 9, 3), None
    ),
}  # fmt: skip
