"""StreamingModel: the streams of a whole model, their state, and its inputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from convert_cases import (
    E,
    H,
    N,
    attention,
    causal_stack,
    causal_then_full,
    model_of,
    one_block,
)
from traced import traced

pytestmark = pytest.mark.sampled(3, rest="slow")


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
    """The encoding's index wraps around. The model's position does not."""
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
    for bad in (others, behind, {**others, "position": [[]]}, None, {**before["1"], "keys": "k"}):
        with pytest.raises(ValueError, match="Expected"):
            streaming.set_state({**before, "1": bad})
    second = streaming.parts[1]._stream_state

    def no_memory(*args):
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory")

    monkeypatch.setattr(second, "arrays_of", no_memory)
    zeros = keras.tree.map_structure(np.zeros_like, before)
    with pytest.raises(tf.errors.ResourceExhaustedError):
        streaming.set_state(zeros)
    for name, layer in streaming.get_state().items():
        for part, array in layer.items():
            np.testing.assert_array_equal(array, before[name][part])


def test_several_inputs_and_outputs(backend, random):
    """Two inputs of cross-attention step together. Inputs and outputs have names."""
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
    """Each layer accepts its own input. The layers that combine them come later."""
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
        call_steps = traced(lambda *x: streaming.call_steps(x), input_signature=steps)
        call_step = traced(lambda *x: streaming.call_step(x), input_signature=step)
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
    """Keras calls such inputs keras_tensor and a number."""
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


def test_a_streaming_model_is_converted_as_what_it_holds(random):
    streaming = ct.convert(model_of(one_block, random), seq_len=N, warm_up="partial")
    again = ct.convert(streaming, seq_len=N, warm_up="partial")
    x = random.normal(size=(2, N, E)).astype("float32")
    np.testing.assert_array_equal(again.call_steps(x), streaming.call_steps(x))


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


@pytest.mark.parametrize("several", [False, True])
def test_keras_own_export_of_a_model_that_was_called(random, tmp_path, several):
    x = keras.Input((N, E), name="x")
    y = ct.CoSiMultiHeadAttention(N, 2, 4)(x)[:, 0]
    if several:
        other = keras.Input((N, 2), name="other")
        model = keras.Model({"x": x, "other": other}, y + keras.layers.Dense(E)(other)[:, -1])
    else:
        model = keras.Model(x, y)
    streaming = ct.StreamingModel(model)
    windows = {
        spec.name: random.normal(size=(3, *spec.shape[1:])).astype("float32")
        for spec in model.inputs
    }
    inputs = windows if several else windows["x"]
    expected = streaming(inputs)
    streaming.export(str(tmp_path / "model"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(loaded.serve(inputs), expected, atol=1e-5)
