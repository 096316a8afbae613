"""CoSiMultiHeadAttention in graphs, in Keras models of all kinds, under XLA, and in threads."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from co_si_mha_cases import D, E, H, N, newest_of_windows, pair
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")


def test_inside_a_graph_warm_up_is_partial_and_nothing_retraces(backend, random):
    layer, regular = pair(random=random)
    traces = []

    @tf.function
    def step(x):
        traces.append(1)
        return layer.call_step(x)

    x = random.normal(size=(2, N + 3, E)).astype("float32")
    for t in range(N + 3):
        output = step(tf.constant(x[:, t]))
        window = x[:, max(0, t - N + 1) : t + 1]
        assert reference.relative_error(output, regular(window, window)[:, -1].numpy()) < 5e-6
    assert len(traces) == 1
    np.testing.assert_array_equal(layer.ready, [True, True])
    # The eager layer knows how many steps the graph has taken.
    assert layer.call_step(x[:, 0]) is not None

    clean = tf.function(layer.clean_state)
    clean()
    assert layer.call_step(x[:, 0]) is None


def test_a_graph_makes_room_for_as_many_streams_as_come(backend, random):
    layer, _ = pair(random=random)
    step = traced(layer.call_steps, input_signature=[tf.TensorSpec([None, None, E])])
    x = random.normal(size=(3, N, E)).astype("float32")
    assert step(x[:1, :1]).shape == (1, 1, E)
    assert step(x).shape == (3, N, E)
    np.testing.assert_array_equal(layer.get_state()["position"], [N + 1, N, N])


class Subclassed(keras.Model):
    def __init__(self, layer, dense):
        super().__init__()
        self.attention, self.dense = layer, dense

    def call(self, x, streams=None):
        return self.dense(self.attention(x, streams=streams))


def functional(layer, dense):
    inputs = keras.Input((None, E))
    return keras.Model(inputs, dense(layer(inputs)))


def sequential(layer, dense):
    return keras.Sequential([layer, dense])


@pytest.mark.parametrize("make", [functional, sequential, Subclassed], ids=lambda f: f.__name__)
def test_models_take_steps(backend, random, make):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    dense = keras.layers.Dense(3)
    model = make(layer, dense)
    x = random.normal(size=(2, N + 4, E)).astype("float32")
    expected = dense(newest_of_windows(regular, x, N)).numpy()
    assert reference.relative_error(model(x[:, :N])[:, 0], expected[:, 0]) < 5e-6
    with ct.call_mode("steps"):
        eager = model(x)
        layer.clean_state()
        graph = traced(model)(x)
        layer.clean_state()
        predicted = model.predict(x, verbose=0)
    for outputs in (eager, graph, predicted):
        assert reference.relative_error(outputs[:, N - 1 :], expected) < 5e-6
    # A model with a graph expects windows, as it was built. StreamingModel steps its graph.
    streaming = model if make is Subclassed else ct.StreamingModel(model)
    layer.clean_state()
    with ct.call_mode("step"):
        for t in range(N + 4):
            output = streaming(x[:, t])
    assert reference.relative_error(output, expected[:, -1]) < 5e-6


@pytest.mark.parametrize("mode", ["step", "steps", "regular"])
def test_symbolic_shapes(mode):
    layer = ct.CoSiMultiHeadAttention(N, H, D, call_mode=mode)
    lead = (None,) if mode == "step" else (None, None)
    x = keras.KerasTensor((*lead, E))
    output, scores = layer(x, return_attention_scores=True)
    assert (
        output.shape == {"step": (None, E), "steps": (None, None, E), "regular": (None, 1, E)}[mode]
    )
    scores_shapes = {
        "step": (None, H, N),
        "steps": (None, H, None, N),
        "regular": (None, H, 1, None),
    }
    assert scores.shape == scores_shapes[mode]
    assert layer.compute_output_shape(x.shape) == output.shape


# XLA compiles for seconds: `make test` takes one case of each option and each length.
@pytest.mark.parametrize(("t", "options"), [
    (1, dict(use_gate=True, query_index=1)),
    (5, {}),
    pytest.param(1, {}, marks=pytest.mark.slow),
    pytest.param(5, dict(use_gate=True, query_index=1), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_under_xla_the_plain_twin_gives_equal_results(random, t, options):
    """The test makes room for the streams first, because variables cannot grow under XLA."""
    layer_options = dict(warm_up="partial", query_index=options.get("query_index", -1))
    options = {name: x for name, x in options.items() if name != "query_index"}
    layer, _ = pair(random=random, layer_options=layer_options, **options)
    other, _ = pair(random=random, layer_options=layer_options, **options)
    other.set_weights(layer.get_weights())
    layer.ensure_streams(2)
    other.ensure_streams(2)
    compiled = traced(layer.call_steps, jit_compile=True)
    plain = traced(other.call_steps)
    x = random.normal(size=(2, 4 * t, E)).astype("float32")
    for first in range(0, 4 * t, t):
        steps = tf.constant(x[:, first : first + t])
        expected = plain(steps).numpy().astype("float64")
        assert reference.relative_error(compiled(steps), expected) < 5e-6
    for name, array in layer.get_state().items():
        np.testing.assert_allclose(array, other.get_state()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_compiled_for_xla_trains_in_steps(random):
    layer = ct.CoSiMultiHeadAttention(N, H, D, warm_up="partial", call_mode="steps")
    layer.ensure_streams(8)
    model = keras.Sequential([layer, keras.layers.Dense(1)])
    model.compile("adam", "mse", jit_compile=True)
    x = random.normal(size=(16, 9, E)).astype("float32")
    loss = model.fit(
        x, x[..., :1], batch_size=8, epochs=5, verbose=0, callbacks=[ct.CleanState()]
    ).history["loss"]
    assert loss[-1] < loss[0]


def test_steps_from_a_dataset(backend, random):
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    x = random.normal(size=(2, 20, E)).astype("float32")
    expected = newest_of_windows(regular, x, N)
    steps = tf.data.Dataset.from_tensor_slices(x.swapaxes(0, 1))
    outputs = [layer.call_step(step) for step in steps]
    assert reference.relative_error(np.stack(outputs[N - 1 :], 1), expected) < 5e-6
    layer.clean_state()
    layer.ensure_streams(2)
    mapped = steps.map(layer.call_step)  # tf.data maps in order, because the step is stateful.
    outputs = np.stack([output.numpy() for output in mapped], 1)
    assert reference.relative_error(outputs[:, N - 1 :], expected) < 5e-6


def test_two_models_in_two_threads(backend, random):
    """Two models run at the same time, eagerly and as graphs, in different call modes."""
    pairs = [pair(random=random, layer_options=dict(warm_up="partial")) for _ in range(2)]
    x = random.normal(size=(2, 2, 60, E)).astype("float32")
    expected = [newest_of_windows(regular, x[i], N) for i, (_, regular) in enumerate(pairs)]
    outputs, barrier = [None, None], threading.Barrier(2)

    def run(i, mode):
        layer, _ = pairs[i]
        with ct.call_mode(mode):
            graph = traced(layer)
            barrier.wait()
            if mode == "step":
                outputs[i] = [
                    (layer if t % 2 else graph)(tf.constant(x[i, :, t])) for t in range(60)
                ]
            else:
                outputs[i] = [
                    step
                    for t in range(0, 60, 3)
                    for step in tf.unstack(graph(tf.constant(x[i, :, t : t + 3])), axis=1)
                ]

    threads = [threading.Thread(target=run, args=args) for args in ((0, "step"), (1, "steps"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for got, wanted in zip(outputs, expected, strict=True):
        assert reference.relative_error(np.stack(got[N - 1 :], 1), wanted) < 5e-6


def test_threads_step_streams_of_one_layer(random, monkeypatch):
    """Threads step different streams of a fused layer. Each gets the results of one thread."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer, regular = pair(random=random, layer_options=dict(warm_up="partial"))
    layer.ensure_streams(4)
    x = random.normal(size=(4, 50, E)).astype("float32")
    outputs = [None] * 4

    def run(stream):
        outputs[stream] = [
            layer.call_step(x[stream : stream + 1, t], streams=[stream])[0] for t in range(50)
        ]

    threads = [threading.Thread(target=run, args=[stream]) for stream in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    expected = newest_of_windows(regular, x, N)
    assert reference.relative_error(np.array(outputs)[:, N - 1 :], expected) < 5e-6
