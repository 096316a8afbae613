"""Tests of the streams that all layers of a model share: one owner, all or nothing, never torn."""

import functools
import itertools
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct

N, E, TOKENS = 5, 6, 4


def attention(**options):
    return ct.CoSiMultiHeadAttention(N, 2, 3, warm_up="partial", **options)


def encoder(kind):
    return ct.TransformerEncoder(
        2, N, E, num_heads=2, ff_dim=8, kind=kind, warm_up="partial", dropout_rate=0
    )


def model_with_tokens(build):
    """A model that looks tokens up last: a bad token fails after the other layers ran."""
    x = keras.Input((N, E), name="x")
    tokens = keras.Input((N,), dtype="int32", name="tokens")
    y = build(x)
    looked_up = keras.layers.Embedding(TOKENS, E)(tokens)
    last = ct.CoSiMultiHeadAttention(N, 2, 3)
    if len(y.shape) == 3 and y.shape[1] == 1:
        return keras.Model([x, tokens], y + looked_up[:, -1:])
    return keras.Model([x, tokens], last(y + looked_up)[:, -1])


def causal(x):
    x = ct.CircularPositionalEncoding(2 * N - 1, E)(x)
    return attention(single_output=False)(x, use_causal_mask=True)


def delayed(x):
    return ct.CoDelay(2)(causal(x))[:, -3:-2]


def residual(x):
    return ct.CoResidual(attention(query_index=2, use_gate=True))(x)


def retroactive(x):
    rows = ct.CoReMultiHeadAttention(N, 2, 3, use_gate=True)(x, x)
    return keras.layers.GlobalAveragePooling1D(keepdims=True)(rows)


def retroactive_block(x):
    rows = ct.CoReTransformerEncoder(N, E, num_heads=2, ff_dim=8, dropout_rate=0)(x)
    return rows[:, -1:]


def stack(x):
    return encoder("single_output")(x)


def retroactive_stack(x):
    return encoder("retroactive")(x)


BUILDS = [causal, delayed, residual, retroactive, retroactive_block, stack, retroactive_stack]


def streaming(build):
    keras.utils.set_random_seed(1)
    return ct.StreamingModel(model_with_tokens(build), warm_up="partial")


def eagerly(model):
    return lambda x, tokens: model.call_steps([x, tokens])


def in_a_function(model):
    # AutoGraph would double the time of tracing. The tests of single layers use it.
    @tf.function(
        input_signature=[tf.TensorSpec([None, None, E]), tf.TensorSpec([None, None], tf.int32)],
        autograph=False,
    )
    def steps(x, tokens):
        return model.call_steps([x, tokens], streams=tf.range(tf.shape(x)[0]))

    model.ensure_streams(2)
    return lambda x, tokens: steps(tf.constant(x), tf.constant(tokens))


def one_by_one(model):
    return lambda x, tokens: np.stack(
        [model.call_step([x[:, t], tokens[:, t]]) for t in range(x.shape[1])], 1
    )


WAYS = [eagerly, in_a_function, one_by_one]
PORTIONS = [slice(0, 3), slice(3, 4), slice(4, N + 6), slice(N + 6, N + 7), slice(N + 7, N + 11)]


@functools.cache
def undisturbed(backend, build):
    """Return steps x, tokens, and the outputs of calls without an error. `backend` is in use."""
    model, random = streaming(build), np.random.default_rng(20260611)
    x = random.normal(size=(2, N + 11, E)).astype("float32")
    tokens = random.integers(0, TOKENS, x.shape[:2]).astype("int32")
    return x, tokens, [np.asarray(model.call_steps([x[:, p], tokens[:, p]])) for p in PORTIONS]


# A sample for `make test`: every model, and every way with some of them. In plain TensorFlow, only
# the ops of single layers differ.
SAMPLE = [
    *(("fused", build, WAYS[i % len(WAYS)]) for i, build in enumerate(BUILDS)),
    ("fused", retroactive_stack, in_a_function),
    ("tensorflow", causal, in_a_function),
]


@pytest.mark.parametrize(
    ("backend", "build", "way"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.every_case)
        for case in itertools.product(("fused", "tensorflow"), BUILDS, WAYS)
    ],
    indirect=["backend"],
)
def test_a_step_that_fails_half_way_leaves_every_layer_as_it_was(backend, build, way):
    model = streaming(build)
    steps = way(model)
    x, tokens, expected = undisturbed(backend, build)
    for portion, want in zip(PORTIONS, expected, strict=True):
        bad = np.array(tokens[:, portion])
        bad[1, 0] = TOKENS
        with pytest.raises(tf.errors.InvalidArgumentError):
            steps(x[:, portion], bad)
        position = np.asarray(model.position).tolist()
        assert position == [portion.start] * len(position)
        got = steps(x[:, portion], tokens[:, portion])
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=str(portion))


def test_a_failed_step_of_a_saved_model_leaves_every_layer_as_it_was(random, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "tensorflow")
    ct.export(streaming(causal), tmp_path, streams=2)
    loaded, undisturbed = (tf.saved_model.load(tmp_path).signatures["step"] for _ in range(2))
    streams = tf.constant([0, 1])
    for t in range(8):
        x = tf.constant(random.normal(size=(2, E)), tf.float32)
        if t == 4:
            with pytest.raises(tf.errors.InvalidArgumentError):
                loaded(x=x, tokens=tf.constant([0, TOKENS]), streams=streams)
        tokens = tf.constant([0, 1])
        got, want = (step(x=x, tokens=tokens, streams=streams) for step in (loaded, undisturbed))
        for name, y in want.items():
            np.testing.assert_array_equal(got[name], y)


def test_an_error_in_a_users_layer_leaves_every_layer_as_it_was(backend, random):
    fails = []

    @keras.saving.register_keras_serializable("test_streams")
    def activation(x):
        if fails:
            raise RuntimeError("of the user")
        return keras.ops.tanh(x)

    inputs = keras.Input((N, E))
    y = attention(single_output=False)(inputs, use_causal_mask=True)
    y = attention()(keras.layers.Activation(activation)(y))
    model = ct.StreamingModel(keras.Model(inputs, y), warm_up="partial")
    x = random.normal(size=(12, 2, E)).astype("float32")
    want = [np.asarray(model.call_step(step)) for step in x]
    model.clean_state()
    for t, step in enumerate(x):
        fails.append(t)
        with pytest.raises(RuntimeError, match="of the user"):
            model.call_step(step)
        fails.clear()
        np.testing.assert_array_equal(model.call_step(step), want[t])


def test_all_layers_have_one_position(backend, random):
    model = streaming(residual)
    model.call_step([random.normal(size=(2, E)).astype("float32"), np.zeros(2, "int32")])
    for part in model.parts:
        assert part.position is model.position
    model.parts[0].ensure_streams(5)
    assert [len(np.asarray(part.position)) for part in model.parts] == [5] * len(model.parts)
    model.parts[-1].clean_state(streams=[1])
    assert np.asarray(model.position).tolist() == [1, 0, 0, 0, 0]


def test_a_layer_has_one_owner():
    layer = attention(single_output=False)
    inputs = keras.Input((N, E))
    y = layer(inputs, use_causal_mask=True)
    newest = attention()(y)
    first = ct.StreamingModel(keras.Model(inputs, newest[:, -1]), name="first")
    with pytest.raises(ValueError, match=r"(?s)of first\..*clone_model"):
        ct.StreamingModel(keras.Model(inputs, attention()(y)[:, -1]), name="second")
    # A model with some of the layers is refused too: the other layers would miss its steps.
    with pytest.raises(ValueError, match="of first"):
        ct.StreamingModel(keras.Model(inputs, y[:, -1:] + 1), name="third")
    # Two models of exactly the same layers may share their streams.
    again = ct.StreamingModel(first.model, warm_up="partial", name="again")
    x = np.ones((2, E), "float32")
    again.call_step(x)
    first.call_step(x)
    assert np.asarray(layer.position).tolist() == [2, 2]


def test_a_layer_of_a_whole_takes_no_step_alone(backend):
    model = streaming(causal)
    layer, x = model.parts[1], np.ones((2, E), "float32")
    for call, steps in ((layer.call_step, x), (layer.call_steps, x[:, None])):
        with pytest.raises(ValueError, match=f"Expected a step of {model.name}"):
            call(steps)
    with pytest.raises(ValueError, match="Expected the state of all"):
        layer.set_state(layer.get_state())
    assert len(np.asarray(model.position)) == 0
    whole = encoder("single_output")
    whole.build((None, None, E))
    with pytest.raises(ValueError, match=f"Expected a step of {whole.name}"):
        whole.blocks[0].call_step(x)


def test_layers_that_have_taken_other_steps_make_no_whole():
    inputs = keras.Input((N, E))
    first, second = attention(single_output=False), attention()
    y = second(first(inputs, use_causal_mask=True))
    first.call_step(np.ones((1, E), "float32"))
    with pytest.raises(ValueError, match=r"(?s)have taken \[\[1\], \[0\]\].*clean_state"):
        ct.StreamingModel(keras.Model(inputs, y[:, -1]))


# Threads.


def saved(model, folder):
    ct.export(model, folder, streams=8)
    signatures = tf.saved_model.load(folder).signatures
    return (
        lambda x, s: signatures["step"](x=tf.constant(x), streams=tf.constant(s, tf.int32))["y"],
        lambda s: signatures["clean"](streams=tf.constant(s, tf.int32)),
        lambda n: signatures["ensure_streams"](count=tf.constant(n)),
    )


def called(model, folder):
    return (lambda x, s: model.call_step(x, streams=s)), model.clean_state, model.ensure_streams


def traced(model, folder):
    step = tf.function(
        lambda x, s: model.call_step(x, streams=s),
        input_signature=[tf.TensorSpec([None, E]), tf.TensorSpec([None], tf.int32)],
        autograph=False,  # With it, tracing would take twice as long.
    )
    clean = tf.function(model.clean_state, input_signature=[tf.TensorSpec([None], tf.int32)])
    return (
        lambda x, s: step(tf.constant(x), tf.constant(s, tf.int32)),
        lambda s: clean(tf.constant(s, tf.int32)),
        model.ensure_streams,
    )


def of_keras_layers():
    x = inputs = keras.Input((N, E))
    x = ct.CircularPositionalEncoding(2 * N - 1, E)(x)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    return ct.convert(keras.Model(inputs, x[:, -1]), seq_len=N, warm_up="partial")


MODELS = {
    "attention": attention,
    "delayed": lambda: attention(query_index=2, use_gate=True),
    "retroactive": lambda: ct.CoReMultiHeadAttention(N, 2, 3, warm_up="partial"),
    "block": lambda: ct.CoReTransformerEncoder(N, E, 2, 8, warm_up="partial"),
    "stack": lambda: encoder("single_output"),
    "retroactive stack": lambda: encoder("retroactive"),
    "model": of_keras_layers,
}


def made(name):
    keras.utils.set_random_seed(3)
    model = MODELS[name]()
    if not model.built:
        model.build((None, N, E))
    model.ensure_streams(8)
    return model


# A sample for CI: every way, in both backends where they differ. `make test` runs a part of it.
THREADS = {
    ("fused", "retroactive stack", called): (),
    ("fused", "model", traced): pytest.mark.slow,
    ("fused", "attention", saved): (),
    ("tensorflow", "delayed", traced): (),
    ("tensorflow", "model", saved): pytest.mark.slow,
}
PLAIN_GRAPHS = ("stack", "delayed", "model")


@pytest.mark.parametrize(
    ("backend", "name", "way"),
    [
        pytest.param(*case, marks=THREADS.get(case, pytest.mark.every_case))
        for case in itertools.product(("fused", "tensorflow"), MODELS, (called, traced, saved))
        # Eager calls take turns in the same way in both backends. Graphs of the plain backend have
        # another lock, whose use does not depend on the model.
        if case[0] == "fused" or (case[2] is not called and case[1] in PLAIN_GRAPHS)
    ],
    indirect=["backend"],
)
def test_six_threads_against_a_replay(backend, random, tmp_path, name, way):
    """Two threads step while others make room, read, clean and save. A replay gives the same."""
    model = made(name)
    step, clean, ensure = way(model, tmp_path / "model")
    x = random.normal(size=(20, 2, E)).astype("float32")
    alone = made(name)
    want = [
        None if y is None else np.asarray(y)
        for y in (alone.call_step(tokens, streams=[0, 1]) for tokens in x)
    ]
    outputs, states, errors = {0: [], 2: []}, [], []
    done = threading.Event()

    def steps(first):
        for tokens in x:
            outputs[first].append(step(tokens, [first, first + 1]))

    def until_done(action):
        count = 0
        while not done.wait(0.002):
            action(count)
            count += 1

    def read(count):
        if way is not saved:
            states.append(model.get_state(streams=[1, 0]))

    def clean_others(count):
        step(x[0], [4, 5])
        clean([5, 4])

    def save(count):
        if way is not saved:
            with ct.hold_streams(model):
                tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))

    def guarded(function, *arguments):
        try:
            function(*arguments)
        except BaseException as error:  # Reported in the test's own thread.
            errors.append(error)

    others = [
        threading.Thread(target=guarded, args=(until_done, action))
        for action in (lambda count: ensure(9 + count), read, clean_others, save)
    ]
    steppers = [threading.Thread(target=guarded, args=(steps, first)) for first in outputs]
    for thread in (*others, *steppers):
        thread.start()
    for thread in steppers:
        thread.join(120)
    done.set()
    for thread in others:
        thread.join(60)
    assert not any(thread.is_alive() for thread in (*others, *steppers))
    assert not errors, errors[0]
    for got in outputs.values():
        for y, expected in zip(got, want, strict=True):
            if expected is None:  # An eager step while a delay fills.
                assert y is None or way is not called
            elif y is not None:
                np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    replay = made(name)
    for state in states[:: max(1, len(states) // 5)]:
        replay.set_state(state, streams=[1, 0])
        taken = np.asarray(replay.position)[:2].tolist()
        assert taken[0] == taken[1]
        if taken[0] < len(x) and want[taken[0]] is not None:
            y = replay.call_step(x[taken[0]], streams=[0, 1])
            np.testing.assert_allclose(y, want[taken[0]], rtol=0, atol=2e-6)
    if way is not saved:
        restored = made(name)
        tf.train.Checkpoint(model=restored).read(str(tmp_path / "checkpoint")).expect_partial()
        taken = np.asarray(restored.position)[:2]
        for i in range(2):
            if taken[i] < len(x) and want[taken[i]] is not None:
                y = restored.call_step(x[taken[i]][i : i + 1], streams=[i])
                np.testing.assert_allclose(y, want[taken[i]][i : i + 1], rtol=0, atol=2e-6)
