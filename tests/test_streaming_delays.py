"""StreamingModel with delays, and with windows that change at every step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from errors import BAD_INPUT

pytestmark = pytest.mark.sampled(6)

N, H, D, E = 6, 2, 3, 5


def late(name="late", query_index=-4, **options):
    return ct.CoSiMultiHeadAttention(N, H, D, query_index=query_index, name=name, **options)


def residual(x):
    x = keras.layers.LayerNormalization()(ct.CoResidual(late())(keras.layers.Dense(E)(x)))
    return keras.layers.Flatten()(keras.layers.Dense(2)(x))


def two_windows(x):
    """Return rows of two windows with the same delay."""
    x = late(single_output=False)(x) + ct.CoDelay(3)(x)
    return keras.layers.Dense(2, "tanh")(x)


def row_of_two_windows(x):
    return keras.layers.Dense(2)(two_windows(x)[:, -4])


def late_beside_newest(x):
    """Return a late row beside the newest row: both are single rows of the same window."""
    return keras.layers.Concatenate()([late()(x), x[:, -1:]])


def delayed_convolution(x):
    """Return a convolution on one step: any layer may follow a single row."""
    return keras.layers.Conv1D(3, 1)(ct.CoDelay(2)(ct.CoResidual(ct.CoDelay(1))(x))[:, -4:-3])


def retroactive_stack(x):
    x = ct.CoReTransformerEncoder(N, E, H, 7)(x)
    x = ct.CoReTransformerEncoder(N, E, H, 7, norm_first=True)(x)
    return keras.layers.Dense(2)(ct.CoSiTransformerEncoder(N, E, H, 7)(x))


def retroactive_attention(x):
    """Return whole windows, followed by any kind of Keras layer."""
    x = keras.layers.Dense(E)(x)
    x = keras.layers.LayerNormalization()(ct.CoReMultiHeadAttention(N, H, D)(x, x))
    x = x + keras.layers.MultiHeadAttention(H, D)(x[:, ::-1], x)
    x = x + late(query_index=-1, single_output=False)(x)
    pooled = keras.layers.GlobalAveragePooling1D()(keras.layers.Conv1D(4, 3, padding="same")(x))
    return keras.layers.Concatenate()([pooled, x[:, -1], keras.layers.LSTM(3)(x)])


def causal_and_retroactive(x):
    x = ct.CoReMultiHeadAttention(N, H, D)(x, x, use_causal_mask=True)
    return keras.layers.Dense(1)(ct.CoSiMultiHeadAttention(N, H, D)(x[:, -1:], x))


def whole_windows(x):
    return keras.layers.Dense(2)(ct.CoReMultiHeadAttention(N, H, D)(x))


def nested(x):
    inputs = keras.Input((N, E))
    inner = keras.Model(inputs, ct.CoReTransformerEncoder(N, E, H, 7)(inputs), name="inner")
    after = keras.Sequential([keras.Input((N, E)), keras.layers.Flatten(), keras.layers.Dense(2)])
    return after(inner(x))


# Each model's receptive field and delay.
MODELS = {
    residual: (N, 3),
    two_windows: (N, 3),
    row_of_two_windows: (N, 3),
    late_beside_newest: (N, 3),
    delayed_convolution: (4, 3),
    retroactive_stack: (N, 0),
    retroactive_attention: (N, 0),
    causal_and_retroactive: (N, 0),
    whole_windows: (N, 0),
    nested: (N, 0),
}


def model_of(function, random, length=N, **options):
    inputs = keras.Input((length, E))
    model = keras.Model(inputs, function(inputs))
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(random.normal(scale=0.4, size=weight.shape))
    return ct.StreamingModel(model, **options)


def of_a_step(model, window):
    """Return the output of a regular call on a window, in the form that the last step gives."""
    y = model(window).numpy()
    rows = model.model.outputs[0].shape[1:-1] == (N,) and model.delay > 0
    return y[:, -1 - model.delay] if rows else y


@pytest.mark.parametrize("function", MODELS, ids=lambda f: f.__name__)
def test_steps_are_regular_calls_on_sliding_windows(backend, random, function):
    model = model_of(function, random)
    assert (model.receptive_field, model.delay) == MODELS[function]
    first = model.receptive_field - 1
    steps = 2 * N + 1
    x = random.normal(size=(2, steps, E)).astype("float32")
    windows = np.concatenate([x[:, t : t + N] for t in range(N + 2)])  # One call is faster.
    of_windows = np.split(of_a_step(model, windows), N + 2)
    together = model.call_steps(x)
    model.clean_state()
    for t in range(steps):
        peeks = (t - first) % 2 == 0  # The first output, and every other one.
        peeked = model.call_step(x[:, t], update_state=False) if peeks else None
        output = model.call_step(x[:, t])
        assert (output is None) == (t < first)
        assert not peeks or (peeked is None) == (t < first)
        np.testing.assert_array_equal(model.ready, [t >= first] * 2)
        if t >= max(first, N - 1):
            expected = of_windows[t - N + 1]
            output = tf.reshape(output, expected.shape)
            assert reference.relative_error(output, expected) < 2e-5, t
            row = tf.reshape(together[:, t - first], expected.shape)
            assert reference.relative_error(row, expected) < 2e-5, t
            if peeks:
                peeked = tf.reshape(peeked, expected.shape)
                assert reference.relative_error(peeked, expected) < 2e-5, t


@pytest.mark.parametrize("function", [residual, retroactive_stack], ids=lambda f: f.__name__)
def test_in_a_graph_of_streams_of_different_ages(backend, random, function):
    model = model_of(function, random)
    model.ensure_streams(3)
    x = random.normal(size=(3, N + 5, E)).astype("float32")
    for t in range(4):
        model.call_step(x[1:2, t], streams=[1])
    step = tf.function(
        lambda x, streams: model.call_step(x, streams=streams),
        input_signature=[tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)],
        # AutoGraph doubles the time of tracing, and converts the same code in both backends.
        autograph=backend == "fused",
    )
    # One call for all windows: each op in eager mode costs more than its work.
    windows = np.concatenate([x[:, t : t + N] for t in range(6)])
    expected = of_a_step(model, windows).reshape(6, 3, -1)
    for t in range(N + 1):
        output = step(np.stack([x[2, t], x[1, t + 4]]), [2, 1])
        for row, (stream, newest) in enumerate([(2, t), (1, t + 4)]):
            if newest >= N - 1:
                wanted = expected[newest - N + 1, stream]
                assert reference.relative_error(output[row], wanted) < 2e-5, (stream, newest)
    state = model.get_state(streams=[2])
    other = ct.StreamingModel(keras.models.clone_model(model.model))
    other.set_weights(model.get_weights())
    other.set_state(state)
    expected = model.call_step(x[2:, -1], streams=[2])
    np.testing.assert_allclose(other.call_step(x[2:, -1]), expected, rtol=1e-5, atol=1e-6)


def test_windows_that_are_not_full_yet_are_those_of_shorter_sequences(backend, random):
    model = model_of(retroactive_stack, random, length=None, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    together = model.call_steps(x, update_state=False)
    for t in range(N):
        expected = model(x[:, : t + 1]).numpy()[:, 0]
        assert reference.relative_error(model.call_step(x[:, t]), expected) < 2e-5
        assert reference.relative_error(together[:, t], expected) < 2e-5


def test_delays_and_receptive_fields_add_up(backend, random):
    """Causal rows may be delayed once more, because they do not change as the window moves on."""
    inputs = keras.Input((None, E))
    x = late(single_output=False, query_index=-2)(inputs, inputs, use_causal_mask=True)
    outputs = keras.layers.Dense(2)(ct.CoDelay(2)(x))
    model = ct.StreamingModel(keras.Model(inputs, outputs), warm_up="partial")
    assert (model.receptive_field, model.delay) == (N + 2, 3)
    x = random.normal(size=(2, N, E)).astype("float32")
    steps = model.call_steps(x)
    for t in range(3, N):
        expected = model(x[:, : t + 1])[:, -4].numpy()
        assert reference.relative_error(steps[:, t], expected) < 2e-5


def test_a_model_with_delays_is_saved_and_converted(random, tmp_path):
    for function in (residual, retroactive_stack):
        model = model_of(function, random)
        x = random.normal(size=(1, N + 2, E)).astype("float32")
        expected = model.call_steps(x)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(again.call_steps(x), expected, rtol=1e-5, atol=1e-6)
        other = ct.convert(model.model, N)
        np.testing.assert_allclose(other.call_steps(x), expected, rtol=1e-5, atol=1e-6)


def test_the_cost_of_a_retroactive_model_is_that_of_its_layers(random):
    inputs = keras.Input((N, E))
    first, last = ct.CoReTransformerEncoder(N, E, H, 7), ct.CoSiTransformerEncoder(N, E, H, 7)
    model = keras.Model(inputs, last(keras.layers.Dense(E)(first(inputs))))
    expected = ct.cost(first) + ct.cost(last, "regular")
    expected += ct.cost(model.layers[2], "regular", seq_len=N)
    assert ct.cost(ct.StreamingModel(model)) == expected


def windows_of_two_delays(x):
    return keras.layers.Add(name="sum")([late(single_output=False)(x), ct.CoDelay(1)(x)])


CANNOT = {
    "two delays": (
        windows_of_two_delays,
        r"sum \(Add\) is given .* late delays one by 3 steps, the delay of another is 1\."
        r".*CoDelay\(2\).*CoResidual",
    ),
    "a residual that is not delayed": (
        lambda x: late(single_output=False)(x) + x, r"late delays one by 3 steps.*CoDelay\(3\)"
    ),
    "outputs of two delays": (
        lambda x: [ct.CoDelay(2, name="slow")(x), x], r"its outputs are windows.*slow.*CoDelay\(2\)"
    ),
    "rows that see later steps, delayed": (
        lambda x: ct.CoDelay(1, name="slow")(late(single_output=False)(x)),
        "slow .* delays rows that see later steps.*query_index",
    ),
    "another row": (
        lambda x: late(single_output=False)(x)[:, -1], "takes row -1 .* a step gives row -4"
    ),
    "attention to what is late": (
        lambda x: ct.CoSiMultiHeadAttention(N, H, D, name="after")(ct.CoDelay(2, name="slow")(x)),
        "after .* that slow delays by 2 steps.*put slow after it",
    ),
    "retroactive attention to what sees later steps": (
        lambda x: ct.CoReMultiHeadAttention(N, H, D, name="after")(
            ct.CoSiMultiHeadAttention(N, H, D, single_output=False)(x)
        ),
        "after .* attends to the outputs of another attention",
    ),
    "an encoder of what sees later steps": (
        lambda x: ct.CoSiTransformerEncoder(N, E, H, 7, name="after")(
            ct.CoSiMultiHeadAttention(N, H, D, single_output=False)(x)
        ),
        "after .* attends to the outputs of another attention",
    ),
    "whole windows and rows": (
        lambda x: ct.CoDelay(1)(x) + ct.CoReMultiHeadAttention(N, H, D)(x), "no rows can be kept"
    ),
    "a delay of whole windows": (
        lambda x: ct.CoDelay(1, name="slow")(ct.CoReMultiHeadAttention(N, H, D)(x)),
        "slow .* given whole windows at every step",
    ),
    "another window": (
        lambda x: ct.CoReMultiHeadAttention(N - 1, H, D, name="short")(x),
        f"short .* its seq_len, {N - 1} steps, but those of the model have {N}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CANNOT)
def test_what_does_not_fit_is_named_at_construction(random, what):
    function, message = CANNOT[what]
    with pytest.raises(ValueError, match=message):
        model_of(function, random)


def test_a_residual_around_whole_windows_is_refused():
    with pytest.raises(ValueError, match="returns the whole window.*CoReTransformerEncoder"):
        ct.CoResidual(ct.CoReMultiHeadAttention(N, H, D))


@pytest.mark.parametrize("function", [residual, retroactive_stack], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [dict(streams=[0, 7]), dict(streams=[1, 1])], ids=str)
def test_bad_streams_change_nothing(backend, random, function, bad):
    model = model_of(function, random, warm_up="partial")
    x = np.ones((2, E), "float32")
    model.call_step(x)
    before = keras.tree.flatten(model.get_state())
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        model.call_step(x, **bad)
    for now, then in zip(keras.tree.flatten(model.get_state()), before, strict=True):
        np.testing.assert_array_equal(now, then)
