"""Subclasses that override `call`: steps run that code, or ct refuses the class."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference

pytestmark = pytest.mark.sampled(3, rest="slow")

N, E = 6, 8
ENCODER = dict(seq_len=N, embed_dim=E, num_heads=2, ff_dim=8)
OWN_CALL = r"has a call of its own. Steps would leave it out"


@keras.saving.register_keras_serializable("test_own_calls")
class Calibrated(keras.Model):
    """A subclass. It is functional if it is made with inputs and outputs."""

    def call(self, x, training=None):
        return 2.0 * super().call(x, training=training)


@keras.saving.register_keras_serializable("test_own_calls")
class CalibratedSequential(keras.Sequential):
    def call(self, x, training=None, mask=None):
        return 2.0 * super().call(x, training=training, mask=mask)


@keras.saving.register_keras_serializable("test_own_calls")
class CalledTwice(keras.Model):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 2.0


@keras.saving.register_keras_serializable("test_own_calls")
class Named(keras.Model):
    """A functional subclass that computes what its graph does."""

    def describe(self):
        return "mine"


@keras.saving.register_keras_serializable("test_own_calls")
class NamedSequential(keras.Sequential):
    pass


@keras.saving.register_keras_serializable("test_own_calls")
class SummedOverTime(keras.layers.EinsumDense):
    def call(self, x):
        return keras.ops.cumsum(super().call(x), axis=1)


@keras.saving.register_keras_serializable("test_own_calls")
class NamedEinsumDense(keras.layers.EinsumDense):
    pass


@keras.saving.register_keras_serializable("test_own_calls")
class Reversed(keras.layers.Concatenate):
    def _merge_function(self, inputs):
        return keras.ops.flip(super()._merge_function(inputs), axis=1)


@keras.saving.register_keras_serializable("test_own_calls")
class AddTwice(keras.layers.Add):
    def _merge_function(self, inputs):
        return 2.0 * super()._merge_function(inputs)


@keras.saving.register_keras_serializable("test_own_calls")
class StandardizedConv(keras.layers.Conv1D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel))


@keras.saving.register_keras_serializable("test_own_calls")
class DoubledStreaming(ct.StreamingModel):
    def call_regular(self, inputs, training=None):
        return 2.0 * super().call_regular(inputs, training)

    def call_steps(self, inputs, training=None, **options):
        return 2.0 * super().call_steps(inputs, training, **options)


@keras.saving.register_keras_serializable("test_own_calls")
class DoubledEncoder(ct.CoSiTransformerEncoder):
    def call(self, x, **options):
        return 2.0 * super().call(x, **options)


@keras.saving.register_keras_serializable("test_own_calls")
class DoubledAttention(ct.CoSiMultiHeadAttention):
    def call(self, query, value=None, key=None, **options):
        return 2.0 * super().call(query, value, key, **options)


@keras.saving.register_keras_serializable("test_own_calls")
class StepsDoubled(ct.CoSiTransformerEncoder):
    def call_step(self, x, *args, **options):
        return 2.0 * super().call_step(x, *args, **options)


@keras.saving.register_keras_serializable("test_own_calls")
class AttentionWithin(keras.layers.Layer):
    """Calls a continual layer from its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = ct.CoSiMultiHeadAttention(N, 2, 4, single_output=False)

    def call(self, x):
        return self.attention(x)


def attention(x):
    return ct.CoSiMultiHeadAttention(N, 2, 4, single_output=False)(x)


def functional(cls=Calibrated):
    x = keras.Input((N, E))
    return cls(x, attention(x)[:, -1])


def sequential(cls=CalibratedSequential):
    return cls([keras.Input((N, E)), ct.CoSiMultiHeadAttention(N, 2, 4)])


def nested(cls=Calibrated):
    x = keras.Input((N, E))
    inner = cls(x, keras.layers.Dense(E)(x))
    x = keras.Input((N, E))
    return keras.Model(x, attention(inner(x))[:, -1])


def nested_attention(cls=Calibrated):
    x = keras.Input((N, E))
    inner = cls(x, attention(x))
    x = keras.Input((N, E))
    return keras.Model(x, inner(x)[:, -1])


def nested_twice(cls=Calibrated):
    inner = nested(cls)
    x = keras.Input((N, E))
    return keras.Model(x, inner(x))


def head(cls=Calibrated):
    """The subclass is called on the newest row only."""
    x = keras.Input((E,))
    inner = cls(x, keras.layers.Dense(3)(x))
    x = keras.Input((N, E))
    return keras.Model(x, inner(attention(x)[:, -1]))


def einsum_dense(cls=SummedOverTime):
    x = keras.Input((N, E))
    y = cls("abc,cd->abd", output_shape=(None, E))(x)
    return keras.Model(x, attention(y)[:, -1])


def concatenate(cls=Reversed):
    x = keras.Input((N, E))
    return keras.Model(x, attention(cls()([x, x]))[:, -1])


def streaming(cls=DoubledStreaming):
    x = keras.Input((N, E))
    inner = cls(keras.Model(x, attention(x)))
    x = keras.Input((N, E))
    return keras.Model(x, inner(x)[:, -1])


def encoder_on_whole(cls=DoubledEncoder):
    x = keras.Input((N, E))
    y = ct.CoReTransformerEncoder(**ENCODER)(x)
    return keras.Model(x, cls(**ENCODER)(y)[:, -1])


def within_layer(cls=AttentionWithin):
    """A window of one row, in a layer of the user's own."""
    x = keras.Input((N, E))
    return keras.Model(x, cls()(attention(x)[:, -1:]))


def distributed(cls=keras.layers.TimeDistributed):
    x = keras.Input((N, 2, E))
    return keras.Model(x, cls(ct.CoSiMultiHeadAttention(2, 2, 4))(x))


REFUSED = {
    "functional": functional,
    "__call__": lambda: functional(CalledTwice),
    "sequential": sequential,
    "nested": nested,
    "nested __call__": lambda: nested(CalledTwice),
    "nested attention": nested_attention,
    "nested twice": nested_twice,
    "einsum_dense": einsum_dense,
    "concatenate": concatenate,
    "streaming": streaming,
    "encoder_on_whole": encoder_on_whole,
    "within_layer": within_layer,
    "distributed": distributed,
}
SENTENCES = "of its own. Steps|may look at several steps|by itself, which takes steps"


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_steps_would_leave_out_is_refused(make):
    model = make()
    with pytest.raises(ValueError, match=SENTENCES):
        ct.StreamingModel(model)
    with pytest.raises(ValueError, match=SENTENCES):
        ct.convert(model, N)
    with pytest.raises(ValueError, match=SENTENCES):
        ct.Session(model)
    with pytest.raises(ValueError, match=SENTENCES):
        ct.cost(model)


def test_the_regular_cost_of_a_graph_is_not_that_of_a_call_around_it():
    with pytest.raises(ValueError, match=OWN_CALL):
        ct.cost(functional(), mode="regular", seq_len=N)


STREAMS = {
    "functional": lambda: functional(Named),
    "sequential": lambda: sequential(NamedSequential),
    "nested": lambda: nested(Named),
    "nested attention": lambda: nested_attention(Named),
    "head": lambda: head(Named),
    "head with a call of its own": head,
    "einsum_dense": lambda: einsum_dense(NamedEinsumDense),
    "streaming": lambda: streaming(ct.StreamingModel),
    "DoubledAttention": lambda: attention_of(DoubledAttention),
    "DoubledEncoder": lambda: attention_of(DoubledEncoder),
}


def attention_of(cls):
    x = keras.Input((N, E))
    layer = cls(**ENCODER) if cls is DoubledEncoder else cls(N, 2, 4)
    return keras.Model(x, layer(x)[:, -1])


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_steps_are_the_regular_call(backend, random, request, make):
    model = make()
    for w in model.weights:
        w.assign(random.normal(size=w.shape) / 2)
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    expected = np.asarray(model(x[:, -N:]))
    stream = ct.StreamingModel(model)
    for t in range(2 * N):
        y = stream.call_step(x[:, t])
    y = np.asarray(y)
    assert reference.relative_error(y.reshape(expected.shape), expected) < 5e-6
    if "of its own" in request.node.name or "Doubled" in request.node.name:
        with pytest.raises(ValueError, match="cannot be run by a session"):
            ct.Session(model)
        return
    session = ct.Session(model)
    for t in range(2 * N):
        y = session.step(x[:, t])
    assert reference.relative_error(y.reshape(expected.shape), expected) < 5e-6


@pytest.mark.parametrize("cls", [AddTwice, StandardizedConv])
def test_a_session_computes_what_a_subclass_does(random, cls):
    """After the newest row any layer may follow, also one that overrides a part of Keras' call."""
    x = keras.Input((N, E))
    y = attention(x)[:, -1]
    if cls is AddTwice:
        y = cls()([y, y])
    else:
        y = cls(3, 2)(keras.layers.Reshape((4, 2))(y))
    model = keras.Model(x, y)
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    if cls is StandardizedConv:  # TensorFlow's convolution has no symbols to be traced with.
        with pytest.raises(ValueError, match=cls.__name__):
            ct.Session(model)
        return
    session = ct.Session(model)
    for t in range(2 * N):
        y = session.step(x[:, t])
    assert reference.relative_error(y, np.asarray(model(x[:, -N:]))) < 5e-6


@pytest.mark.parametrize("cls", [DoubledEncoder, StepsDoubled])
def test_a_session_refuses_a_layer_that_computes_in_its_own_way(cls):
    layer = cls(**ENCODER)
    layer.build((None, N, E))
    with pytest.raises(ValueError, match=f"{cls.__name__}.* computes in its own way"):
        ct.Session(layer)
    with pytest.raises(ValueError, match=f"{cls.__name__}.* does not compute as"):
        ct.cost(layer)


@pytest.mark.parametrize("use", [lambda m: ct.convert(m, N), ct.Session, ct.cost])
def test_a_streaming_model_with_steps_of_its_own_is_refused(use):
    model = DoubledStreaming(functional(keras.Model))
    with pytest.raises(ValueError, match=OWN_CALL):
        use(model)


def plain_attention_and(head):
    x = keras.Input((N, E))
    return keras.Model(x, head(keras.layers.MultiHeadAttention(2, 4)(x, x)[:, -1]))


def functional_head(cls):
    x = keras.Input((E,))
    return cls(x, keras.layers.Dense(3)(x))


class WithOptions(Calibrated):
    """Keras copies a subclass with another constructor as a plain functional model."""

    def __init__(self, inputs, outputs, scale=1.0, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.scale = scale

    def call(self, x, training=None):
        return self.scale * super().call(x, training=training)


def test_a_copy_keeps_the_call_of_a_head(random):
    model = plain_attention_and(functional_head(Calibrated))
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    stream = ct.convert(model, N)
    for t in range(2 * N):
        y = stream.call_step(x[:, t])
    assert reference.relative_error(y, np.asarray(model(x[:, -N:]))) < 5e-6


@pytest.mark.parametrize(
    "head",
    [
        lambda: CalibratedSequential([keras.Input((E,)), keras.layers.Dense(3)]),
        lambda: functional_head(lambda i, o: WithOptions(i, o, scale=3.0)),
    ],
)
def test_a_copy_that_would_lose_a_call_is_refused(head):
    model = plain_attention_and(head())
    with pytest.raises(ValueError, match=OWN_CALL):
        ct.convert(model, N)
    with pytest.raises(ValueError, match=OWN_CALL):
        ct.Session(model)
