"""CoSiMultiHeadAttention with what today's models have, against a float64 reference."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from attention_kinds import KINDS, D, E, H, N, Reference, build, randomize

pytestmark = pytest.mark.sampled(6, rest="slow")

FAR = 10**9 + 7


def steps_of(layer, x):
    """Return the outputs of all steps that have a query: (M, T - delay, E)."""
    outputs = [layer.call_step(x[:, t]) for t in range(x.shape[1])]
    assert all(y is None for y in outputs[: layer.delay])
    return np.stack(outputs[layer.delay :], 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_reference_at_every_age(backend, random, kind, dtype):
    layer = build(kind, random, dtype=dtype)
    x = random.normal(size=(2, 2 * N + 4, E)).astype(dtype)
    got = steps_of(layer, x)
    expected = np.stack([Reference(layer, kind).steps(row) for row in x])
    assert reference.relative_error(got, expected) < reference.BOUNDS[dtype]
    again = build(kind, random, dtype=dtype)
    again.set_weights(layer.get_weights())
    portions = [again.call_steps(x[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 2 * N + 4))]
    assert reference.relative_error(np.concatenate(portions, 1), expected) < reference.BOUNDS[dtype]
    for part, other in zip(
        keras.tree.flatten(layer.get_state()), keras.tree.flatten(again.get_state()), strict=True
    ):
        np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_regular_calls_equal_the_reference(random, kind):
    layer = build(kind, random, single_output=False, dtype="float64")
    x = random.normal(size=(2, N, E))
    of = Reference(layer, kind)
    for causal in (False, True):
        rows = [
            [
                of.row(window, t, np.arange(N) <= t if causal else None)[0] for t in range(N)
            ]
            for window in x
        ]  # fmt: skip
        got = layer(x, use_causal_mask=causal)
        # Keras rounds the scale to float32.
        assert reference.relative_error(got, np.array(rows)) < 1e-6
    _, scores = layer(x, return_attention_scores=True)
    expected = np.stack([[of.row(w, t)[1] for t in range(N)] for w in x]).swapaxes(1, 2)
    assert reference.relative_error(scores, expected) < 1e-6
    chosen = build(kind, random, dtype="float64")
    chosen.set_weights(layer.get_weights())
    np.testing.assert_allclose(
        chosen(x)[:, 0], layer(x)[:, chosen.get_config()["query_index"]], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["rotary", "rotary_interleaved", "rotary_part", "everything"])
def test_an_old_stream_is_as_exact_as_a_young_one(backend, random, kind):
    """No key of the rings has been seen before, so only the position tells the two apart."""
    layer = build(kind, random, dtype="float64")
    x = random.normal(size=(1, 3 * N, E))
    layer.ensure_streams(1)
    state = layer.get_state()
    state["position"] = np.array([FAR])
    state["key_mask"] = np.zeros_like(state["key_mask"])
    layer.set_state(state)
    expected = Reference(layer, kind).steps(x[0])
    got = np.stack([layer.call_step(x[:, t])[0] for t in range(3 * N)])[layer.delay :]
    assert reference.relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("kind", ["grouped", "everything"])
def test_streams_of_any_age_in_any_order_with_gaps(backend, random, kind):
    layer = build(kind, random)
    x = random.normal(size=(3, 20, E)).astype("float32")
    has_key = random.random((3, 20)) > 0.3
    layer.ensure_streams(4)
    taken, got = [0, 0, 0], [[], [], []]
    while min(taken) < 20:
        chosen = [s for s in random.permutation(3) if taken[s] < 20][: 1 + sum(taken) % 3]
        y = layer.call_step(
            np.stack([x[s, taken[s]] for s in chosen]),
            streams=[s + 1 for s in chosen],
            key_mask=[has_key[s, taken[s]] for s in chosen],
        )
        for i, s in enumerate(chosen):
            if taken[s] >= layer.delay:
                got[s].append(y[i].numpy())
            taken[s] += 1
    for s in range(3):
        expected = Reference(layer, kind).steps(x[s], has_key=has_key[s])
        assert reference.relative_error(np.stack(got[s]), expected) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_a_file(random, tmp_path, kind):
    inputs = keras.Input((N, E))
    layer = build(kind, random, name="attention")
    model = keras.Model(inputs, layer(inputs))
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = model(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), expected)
    assert config_of(loaded.get_layer("attention")) == config_of(layer)
    weights = ["/".join(w.path.split("/")[-2:]) for w in layer.weights]
    assert weights == ["/".join(w.path.split("/")[-2:]) for w in loaded.weights]


def config_of(layer):
    return json.dumps(layer.get_config(), sort_keys=True)  # Files have lists for tuples.


@pytest.mark.parametrize("use_gate", [False, True])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_group_query_attention_of_keras(random, use_gate, sliding_window):
    regular = keras.layers.GroupQueryAttention(
        D, H, 2, use_gate=use_gate, sliding_window=sliding_window, name="grouped"
    )
    x = random.normal(size=(3, N, E)).astype("float32")
    regular(x, x)
    randomize(regular, random)
    layer = ct.CoSiMultiHeadAttention.from_regular(regular, N, single_output=False)
    assert layer.name == "grouped"
    for w, of in zip(layer.get_weights(), regular.get_weights(), strict=True):
        np.testing.assert_array_equal(w, of)
    for causal in (False, True):
        got, expected = (f(x, x, use_causal_mask=causal) for f in (layer, regular))
        assert reference.relative_error(got, expected.numpy()) < 1e-6
        scores = [f(x, x, return_attention_scores=True)[1] for f in (layer, regular)]
        assert reference.relative_error(scores[0], scores[1].numpy()) < 1e-6
    newest = regular(x, x)[:, -1].numpy()
    assert reference.relative_error(layer.call_steps(x)[:, -1], newest) < 5e-6
    regular.set_weights(layer.get_weights())  # Both ways.


def test_group_query_attention_in_a_model(random):
    inputs = keras.Input((N, E))
    y = keras.layers.GroupQueryAttention(D, H, 2)(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(y + inputs)[:, -1])
    randomize(model, random)
    x = random.normal(size=(2, N + 3, E)).astype("float32")
    streaming = ct.convert(model, N)
    session = ct.Session(model, streams=2)
    got = [session.step(x[:, t]) for t in range(N + 3)]
    for t in range(N + 3):
        step = streaming.call_step(x[:, t])
        if t >= N - 1:
            expected = model(x[:, t - N + 1 : t + 1]).numpy()
            assert reference.relative_error(step, expected) < 5e-6
            assert reference.relative_error(got[t], expected) < 5e-6


@pytest.mark.parametrize("parallel", [False, True])
def test_blocks_of_today_on_windows_and_steps(random, parallel):
    """Causal blocks with RMS norms and SwiGLU: one after the other, or attention beside it."""
    inputs = keras.Input((None, E))
    x = inputs
    for _ in range(2):
        y = keras.layers.RMSNormalization()(x)
        attended = keras.layers.GroupQueryAttention(D, H, 2, sliding_window=N)(
            y, y, use_causal_mask=True
        )
        if not parallel:
            x = x + attended
            y = keras.layers.RMSNormalization()(x)
        gate = keras.layers.Dense(12, activation="silu")(y) * keras.layers.Dense(12)(y)
        x = x + keras.layers.Dense(E)(gate) + (attended if parallel else 0)
    model = keras.Model(inputs, keras.layers.RMSNormalization()(x))
    randomize(model, random)
    x = random.normal(size=(2, 4 * N, E)).astype("float32")
    expected = model(x).numpy()
    streaming = ct.convert(model, N, warm_up="partial")
    session = ct.Session(model, seq_len=N)
    for t in range(4 * N):
        for y in (streaming.call_step(x[:, t]), session.step(x[:, t])):
            assert reference.relative_error(y, expected[:, t]) < 2e-5
    assert ct.explain(model, N).equals_windows


@pytest.mark.parametrize("kind", ["rotary", "rotary_interleaved", "rotary_part", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_old_stream_of_a_session_is_as_exact_as_a_young_one(random, kind, dtype):
    layer = build(kind, random, dtype=dtype)
    x = random.normal(size=(2, 3 * N, E)).astype(dtype)
    layer.ensure_streams(2)
    state = layer.get_state()
    state["position"] = np.array([FAR, 2**62])
    state["key_mask"] = np.zeros_like(state["key_mask"])
    if "query_mask" in state:  # A session has no mask of queries.
        state["query_mask"] = np.ones_like(state["query_mask"])
    session = ct.Session(layer)
    ids = session.open(2)
    session.set_state(state, ids)
    halves = [session.steps(x[:, :N], streams=ids), session.steps(x[:, N:], streams=ids)]
    got = np.concatenate(halves, 1)[:, layer.delay :]
    expected = np.stack([Reference(layer, kind).steps(row) for row in x])
    assert reference.relative_error(got, expected) < reference.BOUNDS[dtype]


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("kind", ["grouped", "rotary", "everything"])
def test_narrow_rings_of_a_session(random, kind, cache_dtype):
    layer = build(kind, random)
    x = random.normal(size=(3, 3 * N, E)).astype("float32")
    narrow = ct.Session(layer, cache_dtype=cache_dtype)
    has_key = random.random((3, 3 * N)) > 0.2
    got = narrow.steps(x, streams=narrow.open(3), key_mask=has_key)[:, layer.delay :]
    expected = np.stack(
        [Reference(layer, kind).steps(*row) for row in zip(x, [N] * 3, has_key, strict=True)]
    )
    bound = {"bfloat16": 3e-2, "float16": 4e-3, "int8": 6e-2}[cache_dtype]
    assert 1e-6 < reference.relative_error(got, expected) < bound


@pytest.mark.parametrize("kind", ["grouped", "everything"])
def test_threads_that_share_the_rows_of_a_long_window(random, kind):
    n = 900
    layer = build(kind, random, seq_len=n)
    x = random.normal(size=(1, 2 * n, E)).astype("float32")
    outputs = []
    for threads in (1, 2):
        session = ct.Session(layer, threads=threads)
        ids = session.open(1)
        session.steps(x[:, :-3], streams=ids)
        outputs.append(np.stack([session.step(x[:, t], streams=ids) for t in (-3, -2, -1)], 1))
    expected = Reference(layer, kind).steps(x[0, -n - 2 :], n)[-3:][None]
    for got in outputs:
        assert reference.relative_error(got, expected) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_windows_and_steps_agree(random, kind):
    """The newest row of a window is that of a stream's N-th step, for every weight."""
    layer = build(kind, random, dtype="float64")
    x = tf.constant(random.normal(size=(2, N, E)))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x)))
    weights = [w.value for w in layer.trainable_weights]
    of_windows = tape.gradient(loss, weights)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer.call_steps(x)[:, -1]))
    of_steps = tape.gradient(loss, weights)
    assert all(g is not None for g in of_windows)
    of_windows, of_steps = (
        [tf.convert_to_tensor(g).numpy() for g in of] for of in (of_windows, of_steps)
    )
    largest = max(np.abs(g).max() for g in of_windows)
    for w, a, b in zip(layer.trainable_weights, of_windows, of_steps, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest)
        # A bias of keys adds the same to all logits of a query, so its gradient is zero.
        assert np.abs(a).max() > 1e-4 * largest or w.path.endswith("key/bias"), w.path


@pytest.mark.parametrize("kind", ["grouped", "everything"])
def test_scores_and_masks_of_steps(backend, random, kind):
    layer = build(kind, random, dtype="float64")
    x = random.normal(size=(1, N, E))
    layer.call_steps(x[:, :-1])
    mask = random.random((1, H, N)) > 0.3
    at = N - 1 - layer.delay
    of = Reference(layer, kind)
    _, scores = layer.call_step(x[:, -1], return_attention_scores=True, update_state=False)
    assert reference.relative_error(scores[0], of.row(x[0], at)[1]) < 1e-12
    _, scores = layer.call_step(x[:, -1], return_attention_scores=True, attention_mask=mask)
    expected = np.stack([of.row(x[0], at, mask[0, h])[1][h] for h in range(H)])
    assert reference.relative_error(scores[0], expected) < 1e-12


def test_rotary_positions_of_whole_turns():
    """2^-64 of a turn: the product of any two positions is exact."""
    rotary = ct.Rotary(max_wavelength=1e4)
    turns = [int(t) % 2**64 for t in rotary.turns(4)]
    assert turns == [round(f / (2 * np.pi) * 2**64) for f in (1.0, 0.01)]
    x = tf.ones((1, 3, 1, 4), tf.float64)
    far = [FAR, 2**62 - 1, 2**40]
    y = rotary.rotate(x, tf.constant([far], tf.int64)).numpy()
    for t, p in enumerate(far):
        for i in range(2):
            angle = (p * turns[i] % 2**64) / 2**64 * 2 * np.pi
            a, b = np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)
            np.testing.assert_allclose(y[0, t, 0, [i, i + 2]], [a, b], atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_key_value_heads=3), "divide num_heads, 4, but got 3"),
        (dict(num_key_value_heads=0), "num_key_value_heads to be an integer >= 1"),
        (dict(rotary="yes"), "Expected rotary to be a ct.Rotary or None, but got 'yes'"),
        (dict(rotary=ct.Rotary(size=10)), "size to be at most key_dim, 8, but got 10"),
        (dict(position_bias=0.5), "Expected position_bias to be a ct.ALiBi"),
        (dict(logit_soft_cap=0), "Expected logit_soft_cap to be a positive number"),
        (
            dict(use_sinks=True, attention_axes=2, single_output=False),
            "Expected attention along time, but got attention_axes=2",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ct.CoSiMultiHeadAttention(N, H, D, **options)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Expected size to be even"):
        ct.Rotary(size=3)
    with pytest.raises(ValueError, match="Expected max_wavelength to be a positive number"):
        ct.Rotary(max_wavelength=-1)
    with pytest.raises(ValueError, match="Expected key_dim to be even"):
        ct.CoSiMultiHeadAttention(N, H, 5, rotary=ct.Rotary())
    with pytest.raises(ValueError, match="max_distance to be an integer >= 17"):
        ct.RelativePositionBias(32, 16)
    with pytest.raises(ValueError, match="num_buckets to be an integer >= 4"):
        ct.RelativePositionBias(2, 16, bidirectional=True)


def test_a_layer_of_rotary_positions(backend, random):
    layer, rotary = ct.RotaryEmbedding(size=4), ct.Rotary(size=4)
    x = random.normal(size=(2, 9, 3, D)).astype("float32")
    expected = rotary.rotate(tf.constant(x), tf.range(9, dtype=tf.int64)[tf.newaxis]).numpy()
    np.testing.assert_array_equal(layer(x), expected)
    steps = [layer.call_step(x[:, t]) for t in range(4)]
    np.testing.assert_array_equal(np.stack(steps, 1), expected[:, :4])
    np.testing.assert_array_equal(layer.call_steps(x[:, 4:]), expected[:, 4:])
    for bad in (x[0], x[..., :-1], x.astype("int32")):
        with pytest.raises(ValueError, match="Expected x of"):
            layer.call_steps(bad)
    assert layer.position.numpy().tolist() == [9, 9]


def test_rotary_embedding_of_keras_hub(random):
    hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    for options in (dict(), dict(max_wavelength=500, scaling_factor=3.0)):
        inputs = keras.Input((N, D))
        x = hub.layers.RotaryEmbedding(name="turned", **options)(inputs)
        model = keras.Model(inputs, keras.layers.GroupQueryAttention(D, H, 2)(x, x)[:, -1])
        streaming = ct.convert(model, N, warm_up="partial")
        x = random.normal(size=(2, N, D)).astype("float32")
        session = ct.Session(streaming)
        for t in range(N):
            outputs = streaming.call_step(x[:, t]), session.step(x[:, t])
        for y in outputs:
            assert reference.relative_error(y, model(x).numpy()) < 5e-6
    x = hub.layers.RotaryEmbedding(rope_type="yarn", name="yarn")(inputs)
    model = keras.Model(inputs, keras.layers.GroupQueryAttention(D, H, 2)(x, x))
    with pytest.raises(ValueError, match="yarn .*Expected rope_type='linear', but got 'yarn'"):
        ct.convert(model, N)
