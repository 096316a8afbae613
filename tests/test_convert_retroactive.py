"""ct.convert(kind="retroactive"): stacks of plain attention stream exactly, and CoWindow."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import continual_transformers_tf as ct
import reference
from convert_cases import D, E, H, N, model_of

pytestmark = pytest.mark.sampled(4, rest="slow")

BOUND = 5e-6
STEPS = N + 4


def block(x, causal, norm_first):
    y = kl.LayerNormalization()(x) if norm_first else x
    y = kl.MultiHeadAttention(H, D)(y, y, use_causal_mask=causal)
    x = kl.Add()([x, y]) if norm_first else kl.LayerNormalization()(x + y)
    y = kl.Dense(E)(kl.Dropout(0.1)(kl.Dense(2 * E, activation="relu")(x)))
    return kl.Add()([x, y]) if norm_first else kl.LayerNormalization()(x + y)


def stack(depth, causal, norm_first):
    def function(x):
        x = kl.Dense(E)(x)
        for _ in range(depth):
            x = block(x, causal, norm_first)
        return kl.Dense(3)(x[:, -1])

    return function


def pooled(x):
    x = block(block(x, False, True), False, True)
    return kl.Dense(2)(
        kl.Concatenate()([kl.GlobalAveragePooling1D()(x), kl.GlobalMaxPooling1D()(x)])
    )


def cross(x):
    """Return attention from a window to the outputs of attention, and two uses of one window."""
    y = kl.MultiHeadAttention(H, D)(x, x)
    z = kl.MultiHeadAttention(H, D)(x, y)
    return [kl.Concatenate()([x, y, z])[:, -1], (x * y)[:, -2]]


def within(x):
    """Return a stack whose first block is a model of its own."""
    given = keras.Input((N, E))
    inner = keras.Model(given, block(given, False, False))
    return block(inner(x), False, False)[:, -1]


def of_all_rows(x):
    return kl.Dense(2)(block(block(x, False, True), True, False))


CASES = {
    f"{depth} blocks{', causal' * causal}{', norm first' * first}": stack(depth, causal, first)
    for depth in (1, 2, 3)
    for causal in (False, True)
    for first in (False, True)
} | {"pooled": pooled, "cross": cross, "within": within, "of all rows": of_all_rows}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_model_on_windows(random, name):
    model = model_of(CASES[name], random)
    streaming = ct.convert(model, N, kind="retroactive", warm_up="partial")
    x = random.normal(size=(2, STEPS, E)).astype("float32")
    np.testing.assert_allclose(
        keras.tree.flatten(streaming(x[:, :N]))[0], keras.tree.flatten(model(x[:, :N]))[0], 1e-5
    )
    parts = [keras.tree.flatten(streaming.call_steps(x[:, i:j])) for i, j in ((0, 3), (3, STEPS))]
    steps = [np.concatenate(pair, 1) for pair in zip(*parts, strict=True)]
    session = ct.Session(streaming)
    for t in range(STEPS):
        taken = keras.tree.flatten(session.step(x[:, t]))
        # While the window fills, rows of steps that were never taken have no meaning.
        for y, z in [] if name == "of all rows" and t < N - 1 else zip(taken, steps, strict=True):
            assert reference.relative_error(z[:, t], y) < BOUND
        if t >= N - 1:
            expected = keras.tree.flatten(model(x[:, t + 1 - N : t + 1]))
            for y, z in zip(taken, expected, strict=True):
                assert reference.relative_error(z.numpy(), y) < BOUND
    if name not in ("of all rows", "cross"):
        assert ct.explain(streaming).equals_windows
    assert streaming.receptive_field == N


def test_a_stream_is_moved_to_a_session(random):
    model = model_of(CASES["2 blocks"], random)
    streaming = ct.convert(model, N, kind="retroactive", warm_up="partial")
    x = random.normal(size=(3, N + 2, E)).astype("float32")
    streaming.call_steps(x[:, :-1])
    session = ct.Session(streaming)
    ids = session.open(2)
    session.set_state(streaming.get_state(streams=[2, 0]), ids)
    expected = streaming.call_step(x[[2, 0], -1], streams=[2, 0])
    assert reference.relative_error(expected.numpy(), session.step(x[[2, 0], -1], ids)) < BOUND


def test_a_copy_from_its_configuration_has_the_same_states(random, tmp_path):
    model = model_of(CASES["2 blocks"], random)
    streaming = ct.convert(model, N, kind="retroactive", warm_up="partial")
    streaming.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = random.normal(size=(1, N + 2, E)).astype("float32")
    streaming.call_steps(x[:, :-1])
    loaded.set_state(streaming.get_state())
    np.testing.assert_allclose(loaded.call_step(x[:, -1]), streaming.call_step(x[:, -1]), atol=1e-6)


@pytest.mark.slow
def test_steps_in_a_graph_train(random):
    model = model_of(CASES["2 blocks"], random)
    streaming = ct.convert(model, N, kind="retroactive", warm_up="partial", call_mode="steps")
    streaming.compile("sgd", "mse")
    x = random.normal(size=(4, N, E)).astype("float32")
    before = streaming.get_weights()
    streaming.fit(x, np.zeros((4, N, 3)), verbose=0, callbacks=[ct.CleanState()])
    assert any((a != b).any() for a, b in zip(before, streaming.get_weights(), strict=True))


def test_any_layer_follows_a_window(random):
    """CoWindow alone: recurrence, convolutions and pooling on the window at every step."""
    x = keras.Input((N, E))
    y = ct.CoWindow(N)(kl.Dense(4)(x))
    z = kl.Concatenate()([kl.GRU(3)(y), kl.Flatten()(kl.Conv1D(2, 3, padding="same")(y))])
    model = keras.Model(x, z)
    streaming = ct.StreamingModel(model, warm_up="partial")
    x = random.normal(size=(2, STEPS, E)).astype("float32")
    steps = streaming.call_steps(x)
    for t in range(N - 1, STEPS):
        expected = model(x[:, t + 1 - N : t + 1])
        assert reference.relative_error(expected.numpy(), steps[:, t].numpy()) < BOUND
    assert ct.explain(streaming).equals_windows


def test_windows_that_cannot_be_kept_are_refused(random):
    x = keras.Input((N, E))
    sees_later = ct.CoSiMultiHeadAttention(N, H, D, single_output=False)(x)
    whole = ct.CoReMultiHeadAttention(N, H, D)(x)
    with pytest.raises(ValueError, match="of which no rows can be kept"):
        ct.StreamingModel(keras.Model(x, sees_later + whole))
    late = ct.CoDelay(1)(x)
    with pytest.raises(ValueError, match="of which no rows can be kept"):
        ct.StreamingModel(keras.Model(x, late + whole))


def test_what_convert_takes():
    model = keras.Sequential([keras.Input((N, E))])
    with pytest.raises(ValueError, match=r"Expected kind to be one of.*but got 'causal'"):
        ct.convert(model, N, kind="causal")
    with pytest.raises(ValueError, match="Expected positions to be None or 'recycle'"):
        ct.convert(model, N, positions="relative")
