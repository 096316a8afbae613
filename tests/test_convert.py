"""ct.convert and StreamingModel: Keras models that stream with the weights that they have."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference

N, E, H, D = 6, 8, 2, 4


def attention(name=None, **options):
    return keras.layers.MultiHeadAttention(H, D, name=name, **options)


def one_block(x):
    """A pre-norm block and a head on its newest row, with operators between layers."""
    y = keras.layers.LayerNormalization()(x)
    x = x + attention()(y, y)
    y = keras.layers.TimeDistributed(keras.layers.LayerNormalization())(x)
    y = keras.layers.Dense(2 * E, activation="gelu")(y)
    x = keras.layers.Add()([x, keras.layers.Dropout(0.1)(keras.layers.Dense(E)(y))])
    return keras.layers.Dense(3, activation="softmax")(x[:, -1])


def causal_stack(x):
    for _ in range(3):
        x = keras.layers.LayerNormalization()(x + attention()(x, x, use_causal_mask=True))
    return keras.layers.Dense(3)(x)


def causal_then_full(x):
    x = x + attention()(x, x, use_causal_mask=True)
    x = keras.layers.BatchNormalization()(x + attention()(x, x))
    return keras.layers.Dense(2)(keras.layers.BatchNormalization()(x[:, -1, :]))


def query_from_later(x):
    """The newest query may come from an attention that sees everything: it is asked but once."""
    y = attention()(x, x)
    return attention()(y, x)[:, -1]


def row_by_row(x):
    for equation in ("abc,cd->abd", "...x,xy->...y"):
        shape = (None, E) if equation[1] == "b" else E
        x = keras.layers.EinsumDense(equation, shape, bias_axes=equation[-1])(x)
    return attention()(x, x)


def of_the_newest_alone(x):
    """After x[:, -1:] a layer may do what it likes: it is run on every step by itself."""
    y = attention(use_gate=True, value_dim=3)(x, x)[:, -1:]
    y = keras.layers.Flatten()(keras.layers.Conv1D(4, 1)(y))
    return keras.layers.Reshape((2, 2))(keras.layers.Dense(4)(y))


def nested(x):
    inner_input = keras.Input((None, E))
    inner = keras.Model(inner_input, attention()(inner_input, inner_input) + inner_input)
    return keras.layers.Dense(2)(keras.Sequential([inner, keras.layers.ReLU()])(x))


def masked(x):
    x = keras.layers.Masking()(x)
    return keras.layers.Dense(2)(attention()(x, x))


def already_ours(x):
    x = ct.CircularPositionalEncoding(2 * N, E, call_update_index_steps=0)(x)
    return keras.layers.Dense(2)(keras.layers.Flatten()(ct.CoSiTransformerEncoder(N, E, H, 9)(x)))


MODELS = [
    one_block, causal_stack, causal_then_full, row_by_row, query_from_later, of_the_newest_alone,
    nested, masked, already_ours,
]  # fmt: skip


def model_of(function, random, length=N):
    inputs = keras.Input((length, E))
    model = keras.Model(inputs, function(inputs))
    model.set_weights([0.1 + random.random(size=w.shape) * 0.6 for w in model.weights])
    return model


def newest(y, x):
    """The row of the newest step, where there are rows of all."""
    return y[:, -1] if len(y.shape) == 3 and y.shape[1] == x.shape[1] else y


@pytest.mark.parametrize("function", MODELS, ids=lambda f: f.__name__)
def test_steps_give_what_a_regular_call_gives_for_the_newest_step(backend, random, function):
    model = model_of(function, random)
    streaming = ct.convert(model, seq_len=N, warm_up="partial")
    for w, other in zip(streaming.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(w, other)
    x = random.normal(size=(3, N, E)).astype("float32")
    if function is masked:
        x[1, :2] = 0
    whole = model(x).numpy()
    assert reference.relative_error(streaming(x), whole.astype("float64")) < 1e-6
    expected = newest(whole, x).astype("float64")
    together = streaming.call_steps(x)
    assert reference.relative_error(together[:, -1], expected) < 2e-5
    streaming.clean_state()
    apart = [streaming.call_step(x[:, t]) for t in range(N)]
    assert reference.relative_error(apart[-1], expected) < 2e-5
    assert reference.relative_error(np.stack(apart, 1), together.numpy().astype("float64")) < 2e-5


@pytest.mark.parametrize("function", [one_block, of_the_newest_alone, nested])
def test_with_one_attention_it_is_the_model_on_every_sliding_window(backend, random, function):
    model = model_of(function, random)
    streaming = ct.convert(model, seq_len=N)
    x = random.normal(size=(2, 4 * N, E)).astype("float32")
    step = [streaming.call_step(x[:, t]) for t in range(N + 5)]
    assert step[: N - 1] == [None] * (N - 1)
    with ct.call_mode("step"):
        graph = tf.function(streaming)
        step += [graph(tf.constant(x[:, t])) for t in range(N + 5, 4 * N)]
    for t in range(N - 1, 4 * N):
        window = x[:, t - N + 1 : t + 1]
        expected = newest(model(window).numpy(), window).astype("float64")
        assert reference.relative_error(step[t], expected) < 2e-5
    np.testing.assert_array_equal(streaming.ready, [True, True])


def test_a_causal_stack_goes_on_as_one_with_a_sliding_window(backend, random):
    model = model_of(causal_stack, random, length=None)
    streaming = ct.convert(model, seq_len=N)
    sliding = keras.models.clone_model(
        model,
        clone_function=lambda layer: layer.__class__.from_config(
            {**layer.get_config(), "sliding_window": N}
            if isinstance(layer, keras.layers.MultiHeadAttention)
            else layer.get_config()
        ),
    )
    sliding.set_weights(model.get_weights())
    x = random.normal(size=(2, 5 * N, E)).astype("float32")
    field = 1 + 3 * (N - 1)
    assert streaming.receptive_field == field
    outputs = streaming.call_steps(x)
    assert outputs.shape == (2, 5 * N - field + 1, 3)
    expected = sliding(x).numpy()[:, field - 1 :].astype("float64")
    assert reference.relative_error(outputs, expected) < 2e-5


def test_streams_and_state(backend, random):
    streaming = ct.convert(model_of(causal_then_full, random), seq_len=N, warm_up="partial")
    alone = ct.convert(streaming.model, seq_len=N, warm_up="partial")
    streaming.ensure_streams(4)
    x = random.normal(size=(2, 9, E)).astype("float32")
    got = [streaming.call_step(x[:, t], streams=[3, 1]) for t in range(4)]
    peek = streaming.call_step(x[:, 4], streams=[3, 1], update_state=False)
    expected = [alone.call_step(x[:, t]) for t in range(5)]
    np.testing.assert_allclose([*got, peek], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(streaming.position, [0, 4, 0, 4])
    state = streaming.get_state(streams=[1])
    streaming.set_state(state, streams=[0])
    got = streaming.call_steps(np.stack([x[1, 4:], x[0, 4:]]), streams=[0, 3])
    alone.clean_state()
    expected = alone.call_steps(x)[:, 4:].numpy()
    np.testing.assert_allclose(got, expected[::-1], rtol=1e-5, atol=1e-6)
    streaming.clean_state(streams=[3])
    np.testing.assert_array_equal(streaming.position, [9, 4, 0, 0])
    before = streaming.get_state()
    with pytest.raises(ValueError, match="Expected"):
        streaming.set_state({**state, "1": {}}, streams=[0])
    bad = [dict(streams=[1, 9]), dict(streams=[1, 1])]
    for options in bad:
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="(?i)expected"):
            streaming.call_step(x[:, 0], **options)
    for wrong in (x[:, 0, :3], x[:, :1], x):
        with pytest.raises(ValueError, match=r"of shape \(M, 8\)"):
            streaming.call_step(wrong)
    for name, layer in streaming.get_state().items():
        for part, array in layer.items():
            np.testing.assert_array_equal(array, before[name][part])


def test_state_of_a_model_that_begins_with_an_encoding(random):
    """Whose index goes round, where the model's position does not."""
    inputs = keras.Input((N, E))
    x = ct.CircularPositionalEncoding(N, E)(inputs)
    streaming = ct.convert(keras.Model(inputs, attention()(x, x)), seq_len=N)
    x = random.normal(size=(2, N + 1, E)).astype("float32")
    assert streaming.call_steps(x) is not None
    state = streaming.get_state()
    streaming.clean_state()
    streaming.set_state(state)
    np.testing.assert_array_equal(streaming.position, [N + 1, N + 1])
    assert streaming.ready.numpy().all()
    with pytest.raises(ValueError, match="Expected"):
        streaming.set_state({**state, "1": {}})
    np.testing.assert_array_equal(streaming.position, [N + 1, N + 1])
    assert streaming.call_step(x[:, 0]) is not None


def test_a_state_that_does_not_fit_leaves_every_layer_as_it_was(random, monkeypatch):
    streaming = ct.convert(model_of(causal_then_full, random), seq_len=N)
    streaming.call_steps(random.normal(size=(2, 3, E)).astype("float32"))
    before = streaming.get_state()
    others = {name: array[:1] for name, array in before["1"].items()}
    behind = {**before["1"], "position": before["1"]["position"] - 1}
    for bad in (others, behind, {**others, "position": [[]]}, None, {**before["1"], "key": "k"}):
        with pytest.raises(ValueError, match="Expected"):
            streaming.set_state({**before, "1": bad})
    second = streaming._graph.layers[1]._stream_state
    set_state = second.set_state

    def no_memory(*args):
        monkeypatch.setattr(second, "set_state", set_state)
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory")

    monkeypatch.setattr(second, "set_state", no_memory)
    zeros = {i: {part: 0 * x for part, x in layer.items()} for i, layer in before.items()}
    with pytest.raises(tf.errors.ResourceExhaustedError):
        streaming.set_state(zeros)
    for name, layer in streaming.get_state().items():
        for part, array in layer.items():
            np.testing.assert_array_equal(array, before[name][part])


def test_several_inputs_and_outputs(backend, random):
    """Cross-attention between two streams that step together; inputs and outputs by name."""
    first, second = keras.Input((N, E), name="first"), keras.Input((N, 3), name="second")
    x = attention()(first, keras.layers.Dense(E)(second))
    outputs = {"all": x, "newest": keras.layers.Dense(2)(x[:, -1])}
    model = keras.Model({"first": first, "second": second}, outputs)
    streaming = ct.convert(model, seq_len=N, warm_up="partial")
    inputs = {
        "first": random.normal(size=(2, N, E)).astype("float32"),
        "second": random.normal(size=(2, N, 3)).astype("float32"),
    }
    expected = model(inputs)
    for t in range(N):
        got = streaming.call_step({name: x[:, t] for name, x in inputs.items()})
    assert set(got) == {"all", "newest"}
    np.testing.assert_allclose(got["all"], expected["all"][:, -1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["newest"], expected["newest"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 inputs"):
        streaming.call_step(inputs["first"][:, 0])


@pytest.mark.parametrize("call", ["eager", "graph"])
def test_inputs_that_do_not_fit_each_other_move_no_layer(backend, random, call):
    """Where each attends to its own, and only what comes after them could tell."""
    first, second = keras.Input((N, E), name="first"), keras.Input((N, E), name="second")
    x = attention()(first, first) + attention()(second, second)
    streaming = ct.convert(keras.Model([first, second], x), seq_len=N, warm_up="partial")
    x = random.normal(size=(3, 4, E)).astype("float32")
    streaming.call_steps([x, x])
    bad = (x[:2, :2], x[:, :2]), (x[:, :2], x[:2, :2]), (x[:1, :2], x[:, :2]), (x, x[:, :1])
    call_steps, call_step, error = streaming.call_steps, streaming.call_step, ValueError
    if call == "graph":
        error = tf.errors.InvalidArgumentError
        steps, step = ([tf.TensorSpec([None] * i + [E])] * 2 for i in (2, 1))
        call_steps = tf.function(lambda *x: streaming.call_steps(x), input_signature=steps)
        call_step = tf.function(lambda *x: streaming.call_step(x), input_signature=step)
    for pair in bad:
        with pytest.raises(error, match="Expected"):
            call_steps(*pair) if call == "graph" else call_steps(pair)
        if len(pair[0]) != len(pair[1]):
            pair = [x[:, 0] for x in pair]
            with pytest.raises(error, match="Expected"):
                call_step(*pair) if call == "graph" else call_step(pair)
    for layer in streaming._graph.layers:
        np.testing.assert_array_equal(layer.position, [4, 4, 4])


def test_messages_know_inputs_without_a_name_by_their_place():
    """Keras calls them keras_tensor of some number."""
    inputs = keras.Input((N, E))
    streaming = ct.convert(keras.Model(inputs, attention()(inputs, inputs)), seq_len=N)
    sequential = keras.Sequential([ct.CoSiTransformerEncoder(N, E, H, 9)])
    sequential.build((None, N, E))
    for model in (streaming, ct.StreamingModel(sequential)):
        for call, shape in ((model.call_step, (1, 3)), (model.call_steps, (1, N, 3))):
            with pytest.raises(ValueError, match=r"Expected inputs of shape \(M, "):
                call(np.zeros(shape))
        with pytest.raises(ValueError, match=r"Expected a tensor, but got \['x'\]"):
            model.call_step({"x": np.zeros((1, E))})
    second = keras.Input((N, 3))
    cross = ct.convert(keras.Model([inputs, second], attention()(inputs, second)), seq_len=N)
    with pytest.raises(ValueError, match=r"Expected inputs\[1\] of shape \(M, 3\)"):
        cross.call_step([np.zeros((1, E)), np.zeros((1, E))])
    with pytest.raises(ValueError, match=r"Expected 2 tensors, but got \['x', 'y'\]"):
        cross.call_step({"x": np.zeros((1, E)), "y": np.zeros((1, 3))})
    ids = keras.Input((N,), dtype="int32")
    embedded = keras.layers.Embedding(4, E)(ids)
    streaming = ct.convert(keras.Model(ids, attention()(embedded, embedded)), seq_len=N)
    with pytest.raises(ValueError, match="Expected inputs of integers"):
        streaming.call_step(np.zeros(1))


def test_inputs_by_other_names_are_refused(random):
    first, second = keras.Input((N, E), name="first"), keras.Input((N, E), name="second")
    y = attention()(first, second)
    x, z = random.normal(size=(2, 2, E)).astype("float32")
    for inputs in ({"b": first, "a": second}, [first, second]):
        model = ct.convert(keras.Model(inputs, y), seq_len=N, warm_up="partial")
        names = list(inputs) if isinstance(inputs, dict) else ["first", "second"]
        expected = model.call_step(dict(zip(names, (x, z), strict=True)), update_state=False)
        got = model.call_step(dict(zip(names[::-1], (z, x), strict=True)), update_state=False)
        np.testing.assert_array_equal(got, expected)
        if isinstance(inputs, dict):
            with pytest.raises(ValueError, match="Expected inputs by the names of 'b' and 'a'"):
                model.call_step([x, z])
        else:
            np.testing.assert_array_equal(model.call_step((x, z), update_state=False), expected)
        with pytest.raises(ValueError, match="Expected inputs by the names"):
            model.call_step({"b": x, "second": z})
        np.testing.assert_array_equal(model.position, [0, 0])


def pooled(a):
    return keras.layers.GlobalAveragePooling1D()(a)


def convolved(a):
    return keras.layers.Conv1D(3, 1)(keras.layers.Dense(4)(a))


def row(a):
    return keras.layers.Dense(3)(a[:, 0])


@pytest.mark.parametrize("length", [None, N])
@pytest.mark.parametrize("of_newest", [pooled, convolved, row], ids=lambda f: f.__name__)
def test_the_newest_is_known_where_the_window_is_of_any_length(backend, random, of_newest, length):
    """Its axis of time is there, though the shape of x[:, -1:] does not tell that it is 1."""
    model = model_of(lambda x: of_newest(attention()(x, x)[:, -1:]), random, length)
    streaming = ct.convert(model, seq_len=N, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = model(x).numpy().astype("float64")
    steps = streaming.call_steps(x)[:, -1]
    streaming.clean_state()
    for t in range(N):
        step = streaming.call_step(x[:, t])
    if of_newest is convolved:
        expected = expected[:, 0]
    assert reference.relative_error(steps, expected) < 2e-5
    assert reference.relative_error(step, expected) < 2e-5


@pytest.mark.parametrize("length", [None, N])
def test_the_newest_token_may_be_embedded(backend, random, length):
    inputs = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(20, E)(inputs)
    newest = keras.layers.Embedding(20, E)(inputs[:, -1:])
    model = keras.Model(inputs, attention()(x, x)[:, -1:] + newest)
    streaming = ct.convert(model, seq_len=N, warm_up="partial")
    tokens = random.integers(0, 20, size=(2, N))
    for t in range(N):
        got = streaming.call_step(tokens[:, t])
    np.testing.assert_allclose(got, model(tokens)[:, 0], rtol=1e-5, atol=1e-6)


def test_what_needs_more_than_the_newest_is_named():
    inputs = keras.Input((None, E))
    x = keras.layers.Conv1D(3, 3, name="wide")(attention()(inputs, inputs)[:, -1:])
    with pytest.raises(ValueError, match="wide .Conv1D. cannot be run on the newest step alone"):
        ct.convert(keras.Model(inputs, x), seq_len=N)


def test_numbers_of_tokens_stream(backend, random):
    inputs = keras.Input((N,), dtype="int32")
    x = keras.layers.Embedding(20, E)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(20)(attention()(x, x)))
    streaming = ct.convert(model, seq_len=N, warm_up="partial")
    tokens = random.integers(0, 20, size=(2, N))
    for t in range(N):
        got = streaming.call_step(tokens[:, t])
    np.testing.assert_allclose(got, model(tokens)[:, -1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Expected .* of integers, but got float64"):
        streaming.call_step(tokens[:, 0] + 0.5)


def test_what_mixes_tokens_is_refused():
    inputs = keras.Input((N,), dtype="int32")
    x = keras.layers.Dense(N, name="mixed")(keras.layers.Identity()(inputs))
    x = keras.layers.Embedding(20, E)(x)
    with pytest.raises(ValueError, match="mixed"):
        ct.convert(keras.Model(inputs, attention()(x, x)), seq_len=N)


def test_saved_cloned_and_trained(backend, random, tmp_path):
    streaming = ct.convert(model_of(one_block, random), seq_len=N, warm_up="partial")
    x = random.normal(size=(8, N, E)).astype("float32")
    streaming.compile("adam", "mse", jit_compile=False)
    loss = streaming.fit(x, np.ones((8, 3)), epochs=3, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    streaming.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = streaming.call_steps(x).numpy()
    np.testing.assert_allclose(loaded.call_steps(x), expected, rtol=1e-5, atol=1e-6)
    assert (loaded.warm_up, loaded.call_mode) == ("partial", "regular")
    loaded.save_weights(tmp_path / "model.weights.h5")
    streaming.load_weights(tmp_path / "model.weights.h5")
    other = ct.StreamingModel.from_config(streaming.get_config())
    other.set_weights(streaming.get_weights())
    np.testing.assert_allclose(other.call_steps(x), expected, rtol=1e-5, atol=1e-6)
    with ct.call_mode("steps"):
        predicted = other.predict(x, verbose=0, callbacks=[ct.CleanState()])
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)
    quantized = ct.convert(model_of(one_block, random), seq_len=N, cache_dtype="bfloat16")
    (layer,) = quantized._graph.layers
    assert layer.get_config()["cache_dtype"] == "bfloat16"


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_under_policies_of_keras(backend, random, policy):
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        model = model_of(causal_then_full, random)
        streaming = ct.convert(model, seq_len=N, warm_up="partial")
        x = random.normal(size=(2, N, E))
        got, expected = streaming.call_steps(x)[:, -1], model(x)
        assert got.dtype == expected.dtype == model.compute_dtype
        bound = 1e-6 if policy == "float64" else 8 * reference.ROUNDING[model.compute_dtype]
        got, expected = (tf.cast(y, "float64").numpy() for y in (got, expected))
        assert reference.relative_error(got, expected) < bound
    finally:
        keras.config.set_dtype_policy(before)


def test_a_streaming_model_is_converted_as_what_it_holds(random):
    streaming = ct.convert(model_of(one_block, random), seq_len=N, warm_up="partial")
    again = ct.convert(streaming, seq_len=N, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    np.testing.assert_array_equal(again.call_steps(x), streaming.call_steps(x))


@pytest.mark.parametrize("function", [one_block, already_ours])
def test_what_streams_already_takes_the_options_that_are_given(random, function):
    """Whatever made it: its own are kept where they are left out."""
    streaming = ct.convert(
        model_of(function, random, None), N, warm_up="partial", call_mode="steps", name="mine"
    )
    again = ct.convert(streaming, seq_len=4)
    assert (again.receptive_field, again.warm_up, again.call_mode) == (4, "partial", "steps")
    assert (again.name, streaming.receptive_field) == ("mine", N)
    x = random.normal(size=(2, 4, E)).astype("float32")
    expected = newest(streaming.model(x).numpy(), x).astype("float64")
    assert reference.relative_error(again(x)[:, -1], expected) < 2e-5
    assert ct.convert(streaming, 4, warm_up="none").warm_up == "none"
    half = ct.convert(streaming, N, cache_dtype="bfloat16")
    for model in (half, ct.convert(half, N)):
        assert model._graph.layers[-1].get_config()["cache_dtype"] == "bfloat16"


def test_a_streaming_model_inside_another(backend, random):
    inner = ct.convert(model_of(causal_stack, random), N, warm_up="none", name="inner")
    inputs = keras.Input((N, E))
    outer = keras.Model(inputs, keras.layers.Dense(2)(inner(keras.layers.ReLU()(inputs))))
    streaming = ct.StreamingModel(outer, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    expected = outer(x).numpy().astype("float64")
    assert reference.relative_error(streaming.call_steps(x), expected) < 2e-5
    assert streaming.receptive_field == inner.receptive_field
    state = streaming.get_state()
    streaming.clean_state()
    streaming.set_state(state)
    np.testing.assert_array_equal(streaming.position, [N, N])
    shorter = ct.convert(streaming, 3, cache_dtype="bfloat16")
    assert shorter.receptive_field == 1 + 3 * 2
    for w, other in zip(shorter.get_weights(), streaming.get_weights(), strict=True):
        np.testing.assert_array_equal(w, other)


def test_a_streaming_model_that_sees_later_steps_is_attended_to_by_none(random):
    inputs = keras.Input((N, E))
    inner = ct.convert(keras.Model(inputs, attention()(inputs, inputs)), N)
    inputs = keras.Input((N, E))
    outer = keras.Model(inputs, attention("second")(*[inner(inputs)] * 2))
    with pytest.raises(ValueError, match="second .* itself sees later steps"):
        ct.convert(outer, N)


def twice(x):
    layer = attention("shared")
    return layer(x, x) + layer(x, x)


def newest_embedding(x):
    return keras.layers.Conv1D(E, N, name="embedding")(x)  # (B, 1, E), of all the steps.


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
    "windows with their newest": (lambda x: attention()(x, x) + x[:, -1:], "newest step alone"),
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


def test_other_options_of_layers_are_named(random):
    model = model_of(one_block, random)
    with pytest.raises(ValueError, match="alone, but got weights_dtype.*from_regular"):
        ct.convert(model, N, weights_dtype="bfloat16")


def test_from_regular(backend, random):
    regular = keras.layers.MultiHeadAttention(H, D, value_dim=3, use_gate=True, name="mine")
    x = random.normal(size=(2, N, E)).astype("float32")
    with pytest.raises(ValueError, match="mine was never called"):
        ct.CoSiMultiHeadAttention.from_regular(regular, seq_len=N)
    regular(x, x)
    layer = ct.CoSiMultiHeadAttention.from_regular(regular, seq_len=N, warm_up="partial")
    assert (layer.name, layer.seq_len, layer.warm_up) == ("mine", N, "partial")
    expected = regular(x, x)[:, -1].numpy()
    assert reference.relative_error(layer.call_steps(x)[:, -1], expected) < 5e-6
    assert layer(x).shape == (2, 1, E)
    again = ct.CoSiMultiHeadAttention.from_regular(layer, seq_len=3)
    assert (again.seq_len, again.warm_up) == (3, "partial")

    with pytest.raises(ValueError, match="Expected a keras"):
        ct.CoSiMultiHeadAttention.from_regular(keras.layers.Dense(2), seq_len=N)
    regular.query_dense.enable_lora(2)
    with pytest.raises(ValueError, match="low-rank"):
        ct.CoSiMultiHeadAttention.from_regular(regular, seq_len=N)


@pytest.mark.parametrize(
    "name", ["call", "_compute_attention", "_compute_attention_mask", "_masked_softmax"]
)
def test_an_attention_of_ones_own_is_refused(random, name):
    def call(self, query, value, key=None, **kwargs):
        return keras.layers.MultiHeadAttention.call(self, query, value, key, **kwargs)

    def other(self, *args, **kwargs):
        return getattr(keras.layers.MultiHeadAttention, name)(self, *args, **kwargs)

    own = {name: call if name == "call" else other}
    layer = type("Own", (keras.layers.MultiHeadAttention,), own)(H, D, name="mine")
    x = random.normal(size=(2, N, E)).astype("float32")
    layer(x, x, use_causal_mask=True)
    with pytest.raises(ValueError, match=f"Expected the {name} of .*mine .Own. has one of its own"):
        ct.CoSiMultiHeadAttention.from_regular(layer, seq_len=N)
    inputs = keras.Input((N, E))
    with pytest.raises(ValueError, match="cannot be converted.*[\\s\\S]*mine .Own. has one of its"):
        ct.convert(keras.Model(inputs, layer(inputs, inputs)), seq_len=N)


def test_a_subclass_of_the_streaming_layer_takes_what_it_is(random):
    class Mine(ct.CoSiMultiHeadAttention):
        def call(self, query, value=None, **kwargs):
            return super().call(query, value, **kwargs)

    x = random.normal(size=(2, N, E)).astype("float32")
    layer = ct.CoSiMultiHeadAttention(N, H, D)
    layer(x)
    mine = Mine.from_regular(Mine.from_regular(layer, seq_len=N), seq_len=N)
    np.testing.assert_array_equal(mine(x), layer(x))
    with pytest.raises(ValueError, match="has one of its own"):
        ct.CoSiMultiHeadAttention.from_regular(mine, seq_len=N)
