"""Models that cannot be converted or run on steps are refused, and the layer is named."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
from convert_cases import D, E, H, N, attention, model_of, one_block


def test_what_needs_more_than_the_newest_is_named():
    inputs = keras.Input((None, E))
    x = keras.layers.Conv1D(3, 3, name="wide")(attention()(inputs, inputs)[:, -1:])
    with pytest.raises(ValueError, match="wide .Conv1D. cannot run on only the newest step"):
        ct.convert(keras.Model(inputs, x), seq_len=N)


def test_what_mixes_tokens_is_refused():
    inputs = keras.Input((N,), dtype="int32")
    x = keras.layers.Dense(N, name="mixed")(keras.layers.Identity()(inputs))
    x = keras.layers.Embedding(20, E)(x)
    with pytest.raises(ValueError, match="mixed"):
        ct.convert(keras.Model(inputs, attention()(x, x)), seq_len=N)


def test_a_streaming_model_that_sees_later_steps_is_attended_to_by_none(random):
    inputs = keras.Input((N, E))
    inner = ct.convert(keras.Model(inputs, attention()(inputs, inputs)), N)
    inputs = keras.Input((N, E))
    outer = keras.Model(inputs, attention("second")(*[inner(inputs)] * 2))
    with pytest.raises(ValueError, match="second .* attends to the outputs of another attention"):
        ct.convert(outer, N)


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


CANNOT = {
    "convolution": (lambda x: attention()(*[keras.layers.Conv1D(E, 3)(x)] * 2), "conv1d"),
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
    "grouped queries": (
        lambda x: keras.layers.GroupQueryAttention(4, 2, 1, name="grouped")(x, x), "grouped"
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


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_converted_is_named(random, what):
    function, named = CANNOT[what]
    model = model_of(function, random)
    before = model.get_weights()
    with pytest.raises(ValueError, match=rf"cannot be (converted|run on).*[\s\S]*{named}"):
        ct.convert(model, seq_len=N)
    for w, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(w, other)


def test_all_that_stands_in_the_way_is_named_at_once(random):
    def function(x):
        x = keras.layers.Conv1D(E, 3, padding="same", name="conv")(x)
        x = attention("first")(x, x) + x
        return keras.layers.Dense(2)(keras.layers.Flatten(name="flat")(attention("second")(x, x)))

    with pytest.raises(ValueError, match="cannot be run on the steps") as error:
        ct.convert(model_of(function, random), seq_len=N)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(" (")[0] for line in lines] == ["- conv", "- second", "- flat"]


def test_other_options_of_layers_are_named(random):
    model = model_of(one_block, random)
    with pytest.raises(ValueError, match="only warm_up.*but got weights_dtype.*from_regular"):
        ct.convert(model, N, weights_dtype="bfloat16")


class Subclassed(keras.Model):
    def call(self, x):
        return x


def test_models_without_a_graph_and_other_things_are_refused():
    subclassed = Subclassed(name="mine")
    subclassed(np.ones((1, N, E)))
    with pytest.raises(ValueError, match="mine is neither a functional nor"):
        ct.convert(subclassed, seq_len=N)
    with pytest.raises(ValueError, match="never been called"):
        ct.convert(keras.Sequential([keras.layers.Dense(2)]), seq_len=N)
    with pytest.raises(ValueError, match=r"Expected a keras\.Model"):
        ct.convert(attention(), seq_len=N)
    inputs = keras.Input((E,))
    with pytest.raises(ValueError, match="no axis of time"):
        ct.convert(keras.Model(inputs, keras.layers.Dense(2)(inputs)), seq_len=N)
    with pytest.raises(ValueError, match="warm_up"):
        ct.StreamingModel(keras.Sequential([keras.Input((N, E))]), warm_up="cold")
