"""ct.row_wise: a layer or function of the user's own that works row by row."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl
from keras import ops

import continual_transformers_tf as ct
import reference
from convert_cases import E, N, attention

pytestmark = pytest.mark.sampled(3, rest="slow")

STEPS = N + 3


@keras.saving.register_keras_serializable("test_row_wise_mark")
@ct.row_wise
class Gate(kl.Layer):
    """It computes by TensorFlow, which is not read."""

    def build(self, shape):
        self.slope = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * tf.nn.sigmoid(self.slope * x[..., ::-1])


class Sharper(Gate):
    """A subclass with a call of its own: the mark does not speak of it."""

    def call(self, x):
        return super().call(x) - tf.reduce_mean(x, 1, keepdims=True)


class Wider(Gate):
    """A subclass with the call that was marked."""


@ct.row_wise
class Centred(kl.Layer):
    """A mark that is wrong: it looks along time."""

    def call(self, x):
        return x - tf.reduce_mean(x, 1, keepdims=True)


@ct.row_wise
class Counted(kl.Layer):
    """A mark that is wrong only in windows of other lengths."""

    def call(self, x):
        return x / tf.cast(tf.shape(x)[1], x.dtype)


@ct.row_wise
class Fixed(kl.Layer):
    def call(self, x):
        return x + tf.zeros((1, N, 1))


@ct.row_wise
class OfKeras(kl.Layer):
    """Its operations are those of Keras, so a session takes it."""

    def build(self, shape):
        self.dense = kl.Dense(E)
        self.dense.build(shape)

    def call(self, x):
        return ops.flip(self.dense(x), -1) * ops.mean(x, -1, keepdims=True)


@keras.saving.register_keras_serializable("test_row_wise_mark")
@ct.row_wise
def leaky(x):
    return tf.nn.leaky_relu(x) + tf.reduce_max(x, -1, keepdims=True)


@ct.row_wise
def along_time(x):
    return tf.cumsum(x, 1)


def model_of(function):
    keras.utils.set_random_seed(2)
    x = keras.Input((N, E))
    y = function(x)
    return keras.Model(x, kl.Dense(2)(attention()(y, y)[:, -1]))


def check(model, random, session):
    streaming = ct.convert(model, N, warm_up="partial")
    x = random.normal(size=(2, STEPS, E)).astype("float32")
    steps = streaming.call_steps(x)
    for t in range(N - 1, STEPS):
        expected = model(x[:, t + 1 - N : t + 1])
        assert reference.relative_error(expected.numpy(), steps[:, t].numpy()) < 5e-6
    if session:
        served = ct.Session(model)
        for t in range(STEPS):
            y = served.step(x[:, t])
            assert reference.relative_error(steps[:, t].numpy(), y) < 5e-6
    else:
        with pytest.raises(ValueError, match=r"computes by other means than keras\.ops"):
            ct.Session(model)
    return streaming


MARKED = {
    "a layer": lambda x: Gate()(x),
    "a subclass": lambda x: Wider()(x),
    "a Lambda": lambda x: kl.Lambda(leaky)(x),
    "an Activation": lambda x: kl.Activation(leaky)(x),
    "an activation": lambda x: kl.Dense(E, activation=leaky)(x),
    "within a wrapper": lambda x: kl.SpectralNormalization(kl.Dense(E, activation=leaky))(x),
}


@pytest.mark.parametrize("name", MARKED)
def test_what_is_marked_streams(random, name):
    check(model_of(MARKED[name]), random, session=False)


def test_a_session_takes_what_is_made_of_keras_ops(random):
    check(model_of(lambda x: OfKeras()(x)), random, session=True)


def test_a_mark_survives_saving(random, tmp_path):
    model = model_of(lambda x: kl.Activation(leaky)(Gate()(x)))
    model.save(tmp_path / "model.keras")
    check(keras.models.load_model(tmp_path / "model.keras"), random, session=False)
    ct.convert(model, N).save(tmp_path / "streaming.keras")
    loaded = keras.models.load_model(tmp_path / "streaming.keras")
    x = random.normal(size=(1, N, E)).astype("float32")
    assert reference.relative_error(model(x).numpy(), loaded.call_steps(x)[:, -1].numpy()) < 5e-6


WRONG = {
    "along time": (lambda x: Centred(name="mine")(x), r"row 0 .* changes if the other rows change"),
    "by the length": (lambda x: Counted(name="mine")(x), "row 0 .* changes if it comes alone"),
    "of one length": (lambda x: Fixed(name="mine")(x), "expected a row for each row"),
    "a function": (lambda x: kl.Lambda(along_time, name="mine")(x), "changes if the other rows"),
    "an activation": (lambda x: kl.Dense(E, along_time, name="mine")(x), "if the other rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mark_is_told(name):
    function, difference = WRONG[name]
    with pytest.raises(
        ValueError, match=rf"mine \(.*\) is marked with ct.row_wise, but .*{difference}"
    ):
        ct.convert(model_of(function), N)


UNMARKED = {
    "a subclass with its own call": lambda x: Sharper(name="mine")(x),
    "a function of TensorFlow": lambda x: kl.Lambda(lambda y: tf.nn.relu(y), name="mine")(x),
    "an activation": lambda x: kl.Activation(lambda y: tf.cumsum(y, 1), name="mine")(x),
    "an activation of a layer": lambda x: kl.Dense(E, lambda y: tf.cumsum(y, 1), name="mine")(x),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMARKED)
def test_what_is_not_marked_is_refused_with_the_way_out(name):
    with pytest.raises(ValueError, match=r"mine \(.*ct\.row_wise"):
        ct.convert(model_of(UNMARKED[name]), N)


def test_only_classes_and_functions_are_marked():
    assert ct.row_wise(leaky) is leaky
    for wrong in (Gate(), 3, int):
        with pytest.raises(TypeError, match=r"Expected a class of keras\.layers\.Layer"):
            ct.row_wise(wrong)
    with pytest.raises(TypeError, match="can have a mark"):
        ct.row_wise(len)


def test_random_numbers_are_checked_with_any_input(random):
    """Tokens, two inputs, and an open length."""

    @ct.row_wise
    class Pair(kl.Layer):
        def call(self, ids, x):
            return x * tf.cast(ids, x.dtype)[..., tf.newaxis]

    ids, x = keras.Input((None,), dtype="int32"), keras.Input((None, E))
    y = Pair()(ids, x)
    model = keras.Model([ids, x], attention()(y, y)[:, -1])
    with pytest.raises(ValueError, match="cannot be run on the steps"):
        ct.convert(model, N)  # The ranks differ.
    assert np.isfinite(model([np.ones((1, N), "int32"), np.ones((1, N, E))])).all()
