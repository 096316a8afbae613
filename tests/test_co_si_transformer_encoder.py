"""CoSiTransformerEncoder against a regular encoder of Keras' layers with the same weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.ops.layer_step import ENCODER_STEP, handles, layer_step
from encoder_cases import FF, E, H, N, RegularEncoder
from errors import BAD_INPUT

pytestmark = pytest.mark.sampled(4, rest="slow")


@pytest.fixture
def layer(random):
    layer = ct.CoSiTransformerEncoder(N, E, H, FF)
    layer.build((None, N, E))
    layer.set_weights([random.normal(scale=0.5, size=w.shape) for w in layer.weights])
    return layer


def test_modes_equal_the_regular_encoder(backend, random, layer):
    regular = RegularEncoder(layer)
    x = random.normal(size=(3, 3 * N, E)).astype("float32")
    for t in range(2 * N):
        output = layer.call_step(x[:, t])
        if t < N - 1:
            assert output is None
            continue
        window = x[:, t - N + 1 : t + 1]
        expected = regular.newest(window)
        assert output.shape == (3, E)
        assert reference.relative_error(output, expected) < 1e-5
        assert reference.relative_error(layer(window)[:, 0], expected) < 1e-5
    steps = layer.call_steps(x[:, 2 * N :])
    assert steps.shape == (3, N, E)
    assert reference.relative_error(steps[:, -1], regular.newest(x[:, -N:])) < 1e-5


@pytest.mark.parametrize("options", [
    dict(norm_first=True, use_bias=False),
    dict(activation="relu", key_dim=3),
    dict(activation="linear", epsilon=0.1),
    dict(activation="silu", norm_first=True),
    dict(activation="gelu", dtype="float64"),
    dict(norm_first=True, activation="relu", dtype="float64"),
], ids=str)  # fmt: skip
def test_what_a_block_may_be(backend, random, executed_ops, options):
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, **options)
    layer.build((None, N, E))
    layer.set_weights([random.normal(scale=0.5, size=w.shape) for w in layer.weights])
    dtype = options.pop("dtype", "float32")
    regular = RegularEncoder(layer, **options)
    x = random.normal(size=(3, 2 * N, E)).astype(dtype)
    # Keras rounds the attention's scale to float32, also in float64.
    bound = 1e-5 if dtype == "float32" else 1e-7
    # One call for all windows: each op in eager mode costs more than its work.
    windows = np.concatenate([x[:, t : t + N] for t in range(N + 1)])
    rows = np.split(regular.newest(windows), N + 1)
    own = np.split(layer(windows)[:, 0].numpy(), N + 1)
    for t in range(2 * N):
        output = layer.call_step(x[:, t])
        if t >= N - 1:
            expected = rows[t - N + 1]
            assert output.dtype == dtype
            assert reference.relative_error(output, expected) < bound
            assert reference.relative_error(own[t - N + 1], expected) < bound
    fused = backend == "fused" and options.get("activation") != "silu"
    assert ("ContinualTransformers>CoSiTransformerEncoderStep" in executed_ops) == fused
    layer.clean_state()
    steps = layer.call_steps(x)
    assert reference.relative_error(steps[:, -1], output.numpy()) < bound
    again = ct.CoSiTransformerEncoder.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("options", [
    {}, dict(norm_first=True), dict(activation="relu"), dict(dtype="float64"),
    dict(cache_dtype="bfloat16", weights_dtype="bfloat16"),
], ids=str)  # fmt: skip
def test_one_op_is_the_several_ops(monkeypatch, random, rows, options):
    """Streams have any order and age. Features fill more than one vector register."""
    bound = {"float64": 1e-12}.get(options.get("dtype"), 5e-6)
    if "weights_dtype" in options:
        bound = 2e-2
    layers = {}
    for backend in ("fused", "tensorflow"):
        monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
        layers[backend] = layer = ct.CoSiTransformerEncoder(
            5, 37, 2, 75, key_dim=9, warm_up="partial", **options
        )
        layer.build((None, 5, 37))
        weights = np.random.default_rng(5)
        layer.set_weights([weights.normal(scale=0.3, size=w.shape) for w in layer.weights])
        layer.ensure_streams(9)
    for step in range(8):
        x = random.normal(size=(rows, 37)) * 3
        arguments = dict(streams=random.permutation(9)[:rows], update_state=step % 3 != 2)
        outputs = {}
        for backend, layer in layers.items():
            monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
            outputs[backend] = layer.call_step(x.astype(layer.compute_dtype), **arguments)
        assert reference.relative_error(outputs["fused"], outputs["tensorflow"].numpy()) < bound
    assert layers["fused"]._fused_step is not None


def test_a_step_that_leaves_the_position(monkeypatch, random):
    """The step writes the rings as usual. The caller only has to advance the position."""
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, warm_up="partial")
    layer.build((None, N, E))
    layer.set_weights([random.normal(scale=0.5, size=w.shape) for w in layer.weights])
    step, cache = layer._make_fused_step(), layer.attention._stream_state
    for t in range(2 * N):
        x = tf.constant(random.normal(size=(1, E)).astype("float32"))
        layer.ensure_streams(1)
        state = layer.get_state()
        expected = layer.call_step(x).numpy()
        after = layer.get_state()
        layer.set_state(state)
        for _ in range(2):
            (result,) = layer_step(
                step._fused, ENCODER_STEP, x, handles(step._variables), [],
                advance_position=False, sequence_first=True, **layer._fused_attributes(),
            )  # fmt: skip
            np.testing.assert_array_equal(result, expected)
        assert cache.position.numpy() == t
        cache.position.assign_add([1])
        for name, array in layer.get_state().items():
            np.testing.assert_array_equal(array, after[name], name)


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("options", [dict(norm_first=True), dict(use_bias=False)], ids=str)
def test_in_float64_with_small_variances(monkeypatch, random, scale, options):
    """If epsilon were rounded to float32, the one op or plain TensorFlow would fail here."""
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, dtype="float64", warm_up="partial", **options)
    layer.build((None, E))
    layer.set_weights([random.normal(scale=0.4, size=w.shape) for w in layer.weights])
    x = scale * random.normal(size=(2, E))
    outputs = []
    for backend in ("fused", "tensorflow"):
        monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", backend)
        layer._fused_step = None
        outputs.append(layer.call_step(x, update_state=False).numpy())
    assert reference.relative_error(*outputs) < 1e-12


def test_in_a_graph_and_exported_it_is_the_same_op(monkeypatch, random, layer):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    x = random.normal(size=(2, E)).astype("float32")
    for _ in range(N):
        layer.call_step(x)
    graph = tf.function(layer.call_step)
    before = layer.get_state()
    expected = layer.call_step(x).numpy()
    layer.set_state(before)
    np.testing.assert_array_equal(graph(x), expected)
    types = {op.type for op in graph.get_concrete_function(x).graph.get_operations()}
    assert "ContinualTransformers>CoSiTransformerEncoderStep" in types
    with tf.GradientTape() as tape:  # Under a tape the step is several ops, which have gradients.
        y = tf.reduce_sum(layer.call_step(x))
    assert all(g is not None for g in tape.gradient(y, layer.trainable_weights))


def test_weights_that_change_are_heeded(monkeypatch, random, layer):
    monkeypatch.setenv("CONTINUAL_TRANSFORMERS_BACKEND", "fused")
    x = random.normal(size=(1, E)).astype("float32")
    layer.call_steps(np.repeat(x[:, None], N, 1))
    first = layer.call_step(x, update_state=False).numpy()
    layer.feed_forward.kernel.assign(2 * layer.feed_forward.kernel)
    changed = layer.call_step(x, update_state=False).numpy()
    assert reference.relative_error(changed, first) > 1e-2
    layer.feed_forward.enable_lora(2)  # The op does not support LoRA.
    np.testing.assert_allclose(layer.call_step(x, update_state=False), changed, atol=1e-5)
    assert layer._fused_step is None


def test_a_program_written_for_the_original_package(random):
    layer = ct.CoSiTransformerEncoder(
        seq_len=10, embed_dim=2, num_heads=2, ff_dim=16, dropout_rate=0.1, call_mode="regular"
    )
    x = random.normal(size=(3, 11, 2)).astype("float32")
    first, second = layer(x[:, :10]), layer(x[:, 1:])
    assert first.shape == (3, 1, 2)
    assert layer.call_steps(x[:, :1]) is None
    assert layer.call_step(x[:, 1]) is None
    np.testing.assert_allclose(layer.call_steps(x[:, 2:10]), first, atol=1e-5)
    np.testing.assert_allclose(layer.call_step(x[:, 10]), second[:, 0], atol=1e-5)


def test_weights_and_their_order(layer):
    paths = [weight.path.split("/", 1)[1] for weight in layer.weights]
    assert paths[:8] == [
        f"attention/{part}/{kind}"
        for part in ("query", "key", "value", "attention_output")
        for kind in ("kernel", "bias")
    ]
    assert len(paths) == 16


def test_partial_warm_up_streams_and_state(backend, random):
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, warm_up="partial", call_mode="step")
    x = random.normal(size=(2, N, E)).astype("float32")
    layer.ensure_streams(2)
    assert layer(x[:1, 0], streams=[1]).shape == (1, E)
    for t in range(N):
        layer(x[:, t])
    np.testing.assert_array_equal(layer.ready, [True, True])
    state = layer.get_state()
    peek = layer(x[:, 0], update_state=False)
    expected = layer(x[:, 0])
    np.testing.assert_array_equal(peek, expected)
    layer.clean_state(streams=[0])
    np.testing.assert_array_equal(layer.ready, [False, True])
    layer.set_state(state)
    np.testing.assert_array_equal(layer(x[:, 0]), expected)
    with pytest.raises(ValueError, match="Expected"):
        layer.set_state({"position": state["position"]})
    assert (layer.receptive_field, layer.delay, layer.seq_len) == (N, 0, N)


def test_the_state_of_a_model_is_that_of_its_layers(random):
    position = ct.CircularPositionalEncoding(2 * N - 1, E)
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, warm_up="partial")
    model = keras.Sequential([position, layer])
    ct.ensure_streams(model, 3)
    x = random.normal(size=(2, E)).astype("float32")
    with ct.call_mode("step"):
        first = model(x)
        assert (model(x).numpy() != first.numpy()).any()
        ct.clean_state(model, streams=[1])
        second = model(x)
        np.testing.assert_array_equal(second[1], first[1])
        assert (second[0].numpy() != first[0].numpy()).any()
        ct.clean_state(model)
        np.testing.assert_array_equal(model(x), first)
    assert layer.get_state()["position"].shape == (3,)
    with pytest.raises(ValueError, match="Expected"):
        ct.clean_state(model, streams=[3])


def test_dropout_acts_in_training_only(random):
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, dropout_rate=0.5)
    x = random.normal(size=(2, N, E)).astype("float32")
    np.testing.assert_array_equal(layer(x), layer(x, training=False))
    assert (layer(x, training=True).numpy() != layer(x).numpy()).any()


def test_trains_on_windows_and_comes_back_from_a_file(tmp_path, random):
    inputs = keras.Input((N, E))
    layer = ct.CoSiTransformerEncoder(N, E, H, FF)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(layer(inputs))))
    x = random.normal(size=(64, N, E)).astype("float32")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)  # Otherwise fit traces its graph twice.
    losses = model.fit(x, x[:, 0, :1] + x[:, -1, 1:2], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x[:2]), model(x[:2]), atol=1e-6)
    again = loaded.layers[1]
    assert again.get_config() == layer.get_config()
    np.testing.assert_allclose(again.call_steps(x[:2]), layer.call_steps(x[:2]), atol=1e-6)


@pytest.mark.parametrize("mode", ["step", "steps", "regular"])
def test_symbolic_shapes(mode):
    layer = ct.CoSiTransformerEncoder(N, E, H, FF, call_mode=mode)
    lead = (None,) if mode == "step" else (None, None)
    expected = {"step": (None, E), "steps": (None, None, E), "regular": (None, 1, E)}[mode]
    assert layer(keras.KerasTensor((*lead, E))).shape == expected


@pytest.mark.parametrize(
    "what",
    [
        dict(seq_len=0),
        dict(embed_dim=0),
        dict(ff_dim=1.5),
        dict(key_dim=0),
        dict(activation="none"),
        dict(weights_dtype="int8"),
        dict(cache_dtype="int8"),
    ],
    ids=str,
)
def test_bad_construction(what):
    with pytest.raises(ValueError, match="Expected|activation|key_dim"):
        ct.CoSiTransformerEncoder(
            **{**dict(seq_len=N, embed_dim=E, num_heads=H, ff_dim=FF), **what}
        )


@pytest.mark.parametrize(
    "call",
    [
        dict(x=np.zeros((2, 1, E), np.float32)),
        dict(x=np.zeros((2, E + 1), np.float32)),
        dict(x=np.zeros((2, E), np.int64)),
        dict(x=np.zeros((2, E), np.float32), streams=[0, 9]),
        dict(x=np.zeros((2, E), np.float32), streams=[0, 0]),
        dict(x=np.zeros((2, E), np.float32), streams=[0]),
        dict(x=None),
    ],
)
def test_bad_input_changes_nothing(backend, random, layer, call):
    layer.call_steps(random.normal(size=(2, N, E)))
    before = layer.get_state()
    with pytest.raises(BAD_INPUT, match="(?i)expected"):
        layer.call_step(**call)
    for name, array in layer.get_state().items():
        np.testing.assert_array_equal(array, before[name])
    assert layer.call_step(np.zeros((2, E), np.float32)).shape == (2, E)
