"""Tables of positions are told apart, and recycled if that is asked for."""

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

import continual_transformers_tf as ct
import reference
from convert_cases import E, N, attention

pytestmark = pytest.mark.sampled(3, rest="slow")

TABLE = np.random.default_rng(5).normal(size=(N, E)).astype("float32")


class AddPositions(kl.Layer):
    """A weight (T, E) that is added to a window."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal", name="table")

    def call(self, x):
        return x + self.table


class TokensAndPositions(kl.Layer):
    """Two embeddings, as in Keras' own examples."""

    def __init__(self, **options):
        super().__init__(**options)
        self.tokens, self.positions = kl.Embedding(20, E), kl.Embedding(N, E)

    def build(self, shape):
        self.tokens.build(shape)
        self.positions.build((N,))

    def call(self, x):
        positions = ops.arange(0, ops.shape(x)[-1], 1)
        return self.tokens(x) + self.positions(positions)


class ScaledPositions(kl.Layer):
    """A layer whose table is only a part of what it does."""

    def build(self, shape):
        self.dense = kl.Dense(E)
        self.dense.build(shape)
        self.table = self.add_weight(shape=(1, *shape[1:]), initializer="random_normal")

    def call(self, x):
        return ops.add(self.table, self.dense(x)) * 0.5


class PositionEmbedding(kl.Layer):
    """The layer of KerasHub: it returns only the rows."""

    def __init__(self, sequence_length, **options):
        super().__init__(**options)
        self.sequence_length = sequence_length

    def build(self, shape):
        self.position_embeddings = self.add_weight(
            shape=(self.sequence_length, shape[-1]), initializer="random_normal"
        )

    def call(self, x):
        return ops.broadcast_to(self.position_embeddings[: x.shape[1]], ops.shape(x))


class SinePositionEncoding(kl.Layer):
    def call(self, x):
        rows = np.sin(np.outer(np.arange(x.shape[1]), np.linspace(0.1, 1, x.shape[2])))
        return ops.broadcast_to(ops.cast(rows, x.dtype), ops.shape(x))


for layer in (PositionEmbedding, SinePositionEncoding):
    layer.__module__ = "keras_hub.src.layers.modeling"


WAYS = {
    "a constant": lambda x: x + TABLE,
    "a constant with an axis of samples": lambda x: ops.add(TABLE[None], x),
    "a column": lambda x: x + TABLE[:, :1],
    "an embedding of constant positions": lambda x: x + kl.Embedding(N, E)(ops.arange(N)),
    "a weight": lambda x: AddPositions()(x),
    "part of a layer": lambda x: ScaledPositions()(x),
    "KerasHub's": lambda x: x + PositionEmbedding(2 * N)(x),
    "KerasHub's sines": lambda x: kl.Add()([x, SinePositionEncoding()(x)]),
}


def model_with(way):
    keras.utils.set_random_seed(4)
    x = keras.Input((N, E))
    y = kl.Dense(E)(x)
    y = WAYS[way](y)
    y = kl.LayerNormalization()(y + attention()(y, y))
    return keras.Model(x, kl.Dense(2)(y[:, -1]))


def check_recycled(model, x):
    """Check that regular calls stay as they were, and that a stream's first window is the same."""
    with pytest.raises(ValueError, match="cannot be run on the steps") as error:
        ct.convert(model, N)
    (line, *more) = [y for y in str(error.value).splitlines() if "recycle" in y]
    assert not more
    assert "adds row i of a table of" in line
    assert "positions='recycle'" in str(ct.explain(model)).replace("\n", " ")
    streaming = ct.convert(model, N, positions="recycle", warm_up="partial")
    expected = model(x[:, :N]).numpy()
    assert reference.relative_error(expected, streaming(x[:, :N]).numpy()) < 5e-6
    session = ct.Session(streaming)
    steps = streaming.call_steps(x)
    for t in range(x.shape[1]):
        y = session.step(x[:, t])
        assert reference.relative_error(steps[:, t].numpy(), y) < 5e-6
        if t == N - 1:
            assert reference.relative_error(expected, y) < 5e-6
    assert "only the first window of a new stream" in ct.explain(streaming).windows
    return streaming


@pytest.mark.parametrize("way", WAYS)
def test_a_table_is_named_and_recycled(random, way):
    streaming = check_recycled(model_with(way), random.normal(size=(2, 3 * N, E)).astype("float32"))
    (encoding,) = [
        layer
        for layer in streaming.model._flatten_layers()
        if isinstance(layer, ct.CircularPositionalEncoding)
    ]
    assert encoding.get_config()["max_len"] == (2 * N if way == "KerasHub's" else N)


def test_tokens_and_positions(random):
    x = keras.Input((N,), dtype="int32")
    y = TokensAndPositions()(x)
    y = y + attention()(y, y)
    model = keras.Model(x, kl.Dense(2)(y[:, -1]))
    check_recycled(model, random.integers(0, 20, (2, 3 * N)).astype("int32"))


def test_a_sequential_model(random):
    layers = [
        keras.Input((N, E)),
        AddPositions(),
        kl.Dense(E),
        ct.CoSiTransformerEncoder(N, E, 2, 8),
    ]
    model = keras.Sequential([*layers, kl.Flatten(), kl.Dense(2)])
    check_recycled(model, random.normal(size=(2, 3 * N, E)).astype("float32"))


def test_positions_under_a_retroactive_stack(random):
    x = keras.Input((N, E))
    y = AddPositions()(x)
    for _ in range(2):
        y = kl.LayerNormalization()(y + attention()(y, y))
    model = keras.Model(x, y[:, -1])
    streaming = ct.convert(model, N, kind="retroactive", positions="recycle", warm_up="partial")
    x = random.normal(size=(2, 2 * N, E)).astype("float32")
    steps = streaming.call_steps(x)
    expected = model(x[:, :N]).numpy()
    assert reference.relative_error(expected, steps[:, N - 1].numpy()) < 5e-6
    session = ct.Session(streaming)
    for t in range(2 * N):
        assert reference.relative_error(steps[:, t].numpy(), session.step(x[:, t])) < 5e-6


def test_what_is_no_table_stays(random):
    """A bias of features, and rows that every step has, are not positions."""
    x = keras.Input((N, E))
    y = x + TABLE[0] + TABLE[:1]
    model = keras.Model(x, attention()(y, y)[:, -1])
    assert ct.convert(model, N).receptive_field == N
