"""Keras masks: steps and regular calls both heed them, or both ignore them."""

import warnings

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import reference

pytestmark = pytest.mark.sampled(9)

N, E = 6, 8
ENCODER = dict(seq_len=N, embed_dim=E, num_heads=2, ff_dim=8)


def co_si(**options):
    return ct.CoSiMultiHeadAttention(N, 2, 4, **options)


def co_re(**options):
    return ct.CoReMultiHeadAttention(N, 2, 4, **options)


# Each layer, and whether it heeds a mask. (A single-output stack sees more than N steps.)
LAYERS = {
    "co_si": (co_si, True),
    "co_si with gate and delay": (lambda: co_si(use_gate=True, query_index=-3), True),
    "co_re": (co_re, True),
    "co_re with gate": (lambda: co_re(use_gate=True), True),
    "co_si encoder": (lambda: ct.CoSiTransformerEncoder(**ENCODER), False),
    "co_si encoder, norm first": (
        lambda: ct.CoSiTransformerEncoder(norm_first=True, **ENCODER),
        False,
    ),
    "co_re encoder": (lambda: ct.CoReTransformerEncoder(**ENCODER), False),
    "co_re encoder, norm first": (
        lambda: ct.CoReTransformerEncoder(norm_first=True, **ENCODER),
        False,
    ),
    "stack": (lambda: ct.TransformerEncoder(2, **ENCODER), False),
    "retroactive stack": (lambda: ct.TransformerEncoder(3, kind="retroactive", **ENCODER), False),
    "residual": (lambda: ct.CoResidual(co_si()), True),
    "residual with delay": (lambda: ct.CoResidual(co_si(query_index=-3)), True),
    "residual of encoder": (lambda: ct.CoResidual(ct.CoSiTransformerEncoder(**ENCODER)), False),
}


@pytest.fixture
def x(random):
    """Recordings with gaps: in the middle, at the newest step, and at both."""
    x = random.normal(size=(3, 2 * N, E)).astype("float32")
    x[0, 8] = x[1, -1] = x[2, 7:9] = x[2, -1] = 0
    return x


def given_weights(layer, random):
    for w in layer.weights:
        w.assign(random.normal(size=w.shape) / 2)
    return layer


def masked(x):
    return keras.layers.Masking()(x)


def stepped(layer, x, mode):
    """Return the newest outputs of steps, of one call or of several."""
    layer.clean_state()
    with ct.call_mode(mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras: a layer that does not support masking.
        if mode == "steps":
            return np.asarray(layer(masked(x)))[:, -1]
        for t in range(x.shape[1]):
            y = layer(masked(x[:, t]))
    return np.asarray(y)


@pytest.mark.parametrize("mode", ["step", "steps"])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_the_regular_call(backend, random, x, name, mode):
    make, heeds = LAYERS[name]
    layer = make()
    layer.build((None, N, E))
    given_weights(layer, random)
    window = x[:, -layer.receptive_field :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regular = np.asarray(layer(masked(window)))
    plain = np.asarray(layer(window))
    assert (reference.relative_error(regular, plain) > 1e-2) == heeds
    y = stepped(layer, x, mode)
    assert reference.relative_error(y.reshape(regular.shape), regular) < 5e-6


@pytest.mark.parametrize("name", LAYERS)
def test_methods_heed_no_mask_of_a_tensor(backend, random, x, name):
    layer = LAYERS[name][0]()
    layer.build((None, N, E))
    given_weights(layer, random)
    for method in (layer.call_regular, layer.call_steps):
        layer.clean_state()
        plain = np.asarray(method(x[:, -layer.receptive_field :]))
        layer.clean_state()
        np.testing.assert_array_equal(method(masked(x[:, -layer.receptive_field :])), plain)


def test_a_query_given_with_its_value(backend, random, x):
    """In such a call, Keras passes the query's mask as an argument."""
    for make in (co_si, co_re):
        layer = make()
        layer.build((None, N, E))
        given_weights(layer, random)
        window = masked(x[:, -N:])
        regular = np.asarray(layer(window, window))
        steps = masked(x)
        with ct.call_mode("steps"):
            y = np.asarray(layer(steps, steps))[:, -1]
        assert reference.relative_error(y.reshape(regular.shape), regular) < 5e-6


def test_the_caller_keeps_the_mask(x):
    """A layer that ignores the mask does not take it off the caller's tensor."""
    window = masked(x[:, -N:])
    layer = ct.CoReTransformerEncoder(**ENCODER)
    with pytest.warns(UserWarning, match="does not support masking"):
        layer(window)
    assert window._keras_mask is not None


def model_of(function, random):
    inputs = keras.Input((N, E))
    return given_weights(keras.Model(inputs, function(masked(inputs))), random)


def model_within(layer, *args):
    inputs = keras.Input((N, E))
    return keras.Model(inputs, layer(*args)(inputs))


MODELS = {
    "co_si": lambda x: co_si()(x),
    "co_si of two": lambda x: co_si()(x, x),
    "co_re": lambda x: co_re()(x),
    "co_re encoder": lambda x: ct.CoReTransformerEncoder(**ENCODER)(x),
    "encoders": lambda x: ct.CoSiTransformerEncoder(**ENCODER)(
        ct.CoReTransformerEncoder(**ENCODER)(x)
    ),
    "retroactive stack": lambda x: ct.TransformerEncoder(2, kind="retroactive", **ENCODER)(x),
    "residual of encoder": lambda x: co_si()(ct.CoResidual(ct.CoDelay(0))(x)),
    "residual": lambda x: ct.CoResidual(co_si())(x),
    "behind a delay": lambda x: co_si()(ct.CoDelay(0)(x)),
    "recurrence on the newest": lambda x: keras.layers.LSTM(3)(co_si()(x)),
    "model within": lambda x: model_within(co_si)(x),
    "model within, and then": lambda x: co_si()(model_within(keras.layers.Dense, E)(x)),
    "mask taken off": lambda x: keras.layers.MultiHeadAttention(2, 4)(
        *[keras.ops.multiply(co_re()(x), 1.0)] * 2
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
def test_models_and_sessions(backend, random, x, name):
    model = model_of(MODELS[name], random)
    stream = ct.StreamingModel(model)
    regular = np.asarray(stream(x[:, -N:]))
    session = ct.Session(model) if "recurrence" not in name else None
    for t in range(2 * N):
        y = stream.call_step(x[:, t])
        z = y if session is None else session.step(x[:, t])
    for output in (y, z, np.asarray(stream.call_steps(x))[:, -1]):
        output = np.asarray(output).reshape(regular.shape)
        assert reference.relative_error(output, regular) < 5e-6


WHOLE = {
    "attention": lambda x: keras.layers.MultiHeadAttention(2, 4)(*[co_re()(x)] * 2),
    "retroactive": lambda x: co_re()(co_re()(x)),
    "co_si": lambda x: co_si()(keras.layers.Dropout(0.5)(co_re()(x))),
    "pooling": lambda x: keras.layers.GlobalAveragePooling1D()(co_re()(x)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_mask_behind_retroactive_attention_is_refused(random, name):
    """A regular call heeds such a mask, but steps do not keep a window's masks."""
    model = model_of(WHOLE[name], random)
    for use in (ct.StreamingModel, ct.Session):
        with pytest.raises(ValueError, match="is given the mask of a window"):
            use(model)


def test_a_mask_behind_retroactive_attention_of_a_model_within_is_refused(random):
    inputs = keras.Input((N, E))
    inner = keras.Model(inputs, WHOLE["attention"](inputs))
    model = model_of(lambda x: inner(x), random)
    with pytest.raises(ValueError, match="is given the mask of a window"):
        ct.StreamingModel(model)


def test_a_streaming_model_heeds_the_mask_of_its_input(backend, random, x):
    inputs = keras.Input((N, E))
    model = given_weights(keras.Model(inputs, co_si()(inputs)), random)
    stream = ct.StreamingModel(model)
    regular = np.asarray(stream(masked(x[:, -N:])))
    assert reference.relative_error(regular, np.asarray(stream(x[:, -N:]))) > 1e-2
    for mode in ("step", "steps"):
        y = stepped(stream, x, mode)
        assert reference.relative_error(y.reshape(regular.shape), regular) < 5e-6
