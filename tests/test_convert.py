"""ct.convert: Keras models that stream with the weights they have."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from convert_cases import (
    MODELS,
    E,
    N,
    already_ours,
    attention,
    causal_stack,
    causal_then_full,
    masked,
    model_of,
    nested,
    newest,
    of_the_newest_alone,
    one_block,
)
from traced import traced

pytestmark = pytest.mark.sampled(4, rest="slow")


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
        graph = traced(streaming)
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


def pooled(a):
    return keras.layers.GlobalAveragePooling1D()(a)


def convolved(a):
    return keras.layers.Conv1D(3, 1)(keras.layers.Dense(4)(a))


def row(a):
    return keras.layers.Dense(3)(a[:, 0])


@pytest.mark.parametrize("length", [None, N])
@pytest.mark.parametrize("of_newest", [pooled, convolved, row], ids=lambda f: f.__name__)
def test_the_newest_is_known_where_the_window_is_of_any_length(backend, random, of_newest, length):
    """x[:, -1:] has a time axis, although its shape does not say that its length is 1."""
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


def test_python_functions_in_a_model_are_kept(backend, random):
    """Keras itself makes no copy of a Lambda with a Python lambda."""
    inputs = keras.Input((N, E))
    factor = 3.0
    x = keras.layers.Lambda(lambda y, add: factor * y + add, arguments={"add": 1.0})(inputs)
    model = keras.Model(inputs, attention()(x, x)[:, -1])
    x = random.normal(size=(2, N, E)).astype("float32")
    np.testing.assert_allclose(ct.Session(model).steps(x)[:, -1], model(x), rtol=1e-5, atol=1e-6)
    y = ct.convert(model, seq_len=N).call_steps(x)[:, -1]
    np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-6)
    for function in (
        lambda y: y - keras.ops.mean(y, 1, keepdims=True),
        lambda y: keras.ops.cumsum(y, 1),
        lambda y: y + y[:, :1],
        lambda y: y + np.ones((N, 1), "float32"),
        lambda y: tf.cumsum(y, 1),
    ):
        x = keras.layers.Lambda(function, output_shape=(N, E), name="looks")(inputs)
        with pytest.raises(ValueError, match=r"looks \(Lambda\) may look at several steps"):
            ct.convert(keras.Model(inputs, attention()(x, x)), seq_len=N)


def test_saved_cloned_and_trained(random, tmp_path):
    streaming = ct.convert(model_of(one_block, random), seq_len=N, warm_up="partial")
    x = random.normal(size=(8, N, E)).astype("float32")
    streaming.compile("adam", "mse", jit_compile=False)
    streaming.optimizer.build(
        streaming.trainable_variables
    )  # Otherwise fit traces its graph twice.
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


@pytest.mark.parametrize("function", [one_block, already_ours])
def test_what_streams_already_takes_the_options_that_are_given(random, function):
    """An option that is not given keeps its value, for any kind of streaming model."""
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
