"""Gradients of CoSiMultiHeadAttention, and training in every call mode."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, pair
from traced import traced

pytestmark = pytest.mark.sampled(6)

T = N + 4


def plain_steps(weights, x, seq_len, gate=None):
    """Return T steps' outputs from a clean state, in plain TensorFlow: a band of attention."""
    wq, bq, wk, bk, wv, bv, wo, bo = weights
    query, key, value = (tf.einsum("mte,ehd->mthd", x, w) + b for w, b in
                         ((wq, bq), (wk, bk), (wv, bv)))  # fmt: skip
    logits = tf.einsum("mthd,mshd->mhts", query, key) / np.sqrt(wq.shape[-1])
    age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    logits = tf.where((age >= 0) & (age < seq_len), logits, -np.inf)
    return tf.einsum("mhts,mshd,hde->mte", tf.nn.softmax(logits), value, wo) + bo


def gradients_of(function, variables):
    with tf.GradientTape() as tape:
        tape.watch(variables)
        loss = tf.reduce_sum(tf.sin(function()))
    return tape.gradient(loss, variables)


@pytest.mark.parametrize("graph", [False, True])
def test_gradients_of_steps_are_those_of_plain_tensorflow(backend, random, graph):
    layer, _ = pair(random=random, dtype="float64", layer_options=dict(warm_up="partial"))
    x = tf.Variable(random.normal(size=(2, T, E)))
    weights = [w.value for w in layer.weights]
    expected = gradients_of(lambda: plain_steps(weights, x, N), [x, *weights])

    def gradients():
        layer.clean_state()
        return gradients_of(lambda: layer.call_steps(x), [x, *weights])

    got = (traced(gradients) if graph else gradients)()
    largest = max(np.abs(wanted).max() for wanted in expected)  # The keys' bias has no gradient.
    for gradient, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-12 * largest)


@pytest.mark.parametrize("call", ["regular", "steps", "step by step"])
@pytest.mark.parametrize("options", [{}, dict(use_gate=True), dict(sliding_window=3)], ids=str)
def test_gradients_are_those_of_finite_differences(backend, random, call, options):
    layer, _ = pair(
        random=random, dtype="float64", layer_options=dict(warm_up="partial"), **options
    )
    x = tf.Variable(random.normal(size=(2, T, E)))
    variables = [x, *(w.value for w in layer.weights)]

    def loss():
        layer.clean_state()
        if call == "regular":
            output = layer.call_regular(x)
        elif call == "steps":
            output = layer.call_steps(x)
        else:
            # Keys and values in the ring are constants for later steps.
            output = layer.call_step(x[:, -1])
        return tf.reduce_sum(tf.sin(output))

    with tf.GradientTape() as tape:
        value = loss()
    for variable, gradient in zip(variables, tape.gradient(value, variables), strict=True):
        direction = random.normal(size=variable.shape)
        ends = []
        for epsilon in (1e-6, -2e-6):
            variable.assign_add(epsilon * direction)
            ends.append(float(loss()))
        variable.assign_add(1e-6 * direction)
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope - float(tf.reduce_sum(gradient * direction))) < 1e-5 * max(1, abs(slope))


def test_a_regular_call_has_the_gradients_of_keras_layer(random):
    layer, regular = pair(random=random)
    x = tf.Variable(random.normal(size=(2, N, E)).astype("float32"))
    got = gradients_of(lambda: layer(x), [x, *(w.value for w in layer.weights)])
    expected = gradients_of(lambda: regular(x, x)[:, -1:], [x, *(w.value for w in regular.weights)])
    for gradient, wanted in zip(got, expected, strict=True):
        # The gradient of the keys' bias is zero, except for rounding.
        if np.abs(wanted).max() > 1e-5:
            assert reference.relative_error(gradient, wanted.numpy()) < 1e-4


@pytest.mark.slow
def test_a_model_learns_in_steps_mode_what_then_streams(backend, random):
    """fit, evaluate and predict in "steps" mode, from clean states; then single steps."""
    layer = ct.CoSiMultiHeadAttention(N, H, D, warm_up="partial", dropout=0.1)
    model = keras.Sequential([layer, keras.layers.Dense(1)])
    x = random.normal(size=(48, 3 * N, E)).astype("float32")
    y = np.stack([x[:, max(0, t - 2) : t + 1, :1].mean(1) for t in range(3 * N)], 1)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    clean = [ct.CleanState()]
    with ct.call_mode("steps"):
        model.build((None, *x.shape[1:]))
        model.optimizer.build(model.trainable_variables)  # Otherwise fit traces its graph twice.
        losses = model.fit(x, y, batch_size=20, epochs=12, verbose=0, callbacks=clean)
        predicted = model.predict(x, batch_size=20, verbose=0, callbacks=clean)
        loss = model.evaluate(x, y, batch_size=20, verbose=0, callbacks=clean)
    losses = losses.history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert predicted.shape == y.shape
    assert abs(np.mean((predicted - y) ** 2) - loss) < 1e-4
    layer.clean_state()
    dense = model.layers[-1]
    steps = [dense(layer.call_step(x[:, t])) for t in range(3 * N)]
    assert reference.relative_error(np.stack(steps, 1), predicted.astype("float64")) < 2e-5


def test_dropout_acts_on_the_scores_in_training_alone(backend, random):
    layer, _ = pair(random=random, dropout=0.5, seed=3, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(64, T, E)).astype("float32")

    def run(**kwargs):
        layer.clean_state()
        return layer.call_steps(x, **kwargs).numpy()

    plain = run()
    np.testing.assert_array_equal(run(training=False), plain)
    trained = [run(training=True) for _ in range(8)]
    assert np.abs(trained[0] - trained[1]).max() > 0.1
    # Dropout keeps the expectation: the mean over streams and draws is near the plain output.
    apart = np.mean(trained, 0) - plain
    assert np.abs(apart.mean(0)).max() < 0.1 * np.abs(plain).max()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer.call_steps(x, training=True) ** 2)
    assert all(g is not None for g in tape.gradient(loss, layer.trainable_variables))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_dropout_in_half_precision(random, dtype):
    """Keras' dropout returns its own compute dtype, but the scores are float32."""
    layer = ct.CoSiMultiHeadAttention(N, H, D, dropout=0.5, dtype=dtype, warm_up="partial")
    x = random.normal(size=(4, T, E)).astype("float32")
    with tf.GradientTape() as tape:
        output = layer.call_steps(x, training=True)
    assert output.dtype == layer.compute_dtype
    gradients = tape.gradient(output, layer.trainable_variables)
    assert all(np.isfinite(tf.cast(g, "float32")).all() for g in (output, *gradients))


def test_regularized_activity_and_constraints_in_steps(backend, random):
    """Training by steps also applies what Keras' sublayers do besides their product."""
    layer, _ = pair(random=random, activity_regularizer="l2", kernel_constraint="non_neg")
    regular, _ = pair(random=random, activity_regularizer="l2")
    regular.set_weights(layer.get_weights())
    x = random.normal(size=(2, N, E)).astype("float32")
    layer.call_steps(x)
    assert layer.losses == []
    layer.clean_state()
    with tf.GradientTape():
        steps = layer.call_steps(x, training=True)
    assert len(layer.losses) == 4
    assert reference.relative_error(steps, regular(x).numpy()) < 5e-6
    assert isinstance(layer.query_dense.kernel.constraint, keras.constraints.NonNeg)
