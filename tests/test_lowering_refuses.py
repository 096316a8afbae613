"""Models that cannot be lowered to a plan, and the error messages."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as kl
from keras import ops

import continual_transformers_tf as ct
from continual_transformers_tf.models.lowering import lower

N, E, H, D = 4, 6, 2, 3


def co_si(**options):
    return ct.CoSiMultiHeadAttention(N, H, D, **options)


def refused(model, **options):
    """Return the lines of the error, the first without the model's name."""
    with pytest.raises(ValueError, match=".") as error:
        lower(model, **options)
    return str(error.value).splitlines()


def lines_of(function, *shape, dtype=None):
    x = keras.Input((N, *shape), dtype=dtype)
    return refused(keras.Model(x, function(x), name="given"))


def test_every_layer_that_cannot_be_lowered_is_named_at_once():
    x = keras.Input((N, E))
    y = kl.Bidirectional(kl.LSTM(3), name="memory")(x)
    z = co_si()(x, x)[:, -1]
    z = kl.Dense(2, activation=tf.nn.crelu, name="tf_function")(z)
    z = kl.Lambda(lambda v: tf.math.cumsum(v, 1), output_shape=(4,), name="tf_lambda")(z)
    z = kl.Reshape((2, 2), name="fine")(z)
    z = kl.Bidirectional(kl.LSTM(3), name="memory_of_a_step")(z)
    w = ops.dot(z, z)
    first, *lines = refused(keras.Model(x, [y, z, w], name="given"))
    assert first == "given cannot be run by a session:"
    expected = [
        r"- memory \(Bidirectional\) may look at several steps of the window",
        r"- tf_function \(Dense\) computes by other means than keras.ops",
        r"- tf_lambda \(Lambda\) computes by other means than keras.ops",
        r"- memory_of_a_step \(Bidirectional\) is a layer that a plan has no node for",
        r"- dot\w* \(Dot\) multiplies two tensors, which would mix samples",
    ]
    assert len(lines) == len(expected)
    for pattern in expected:
        assert sum(bool(re.match(pattern, line)) for line in lines) == 1, (pattern, lines)


def test_what_conversion_refuses_is_listed_with_the_rest():
    class Own(kl.GroupQueryAttention):
        def _masked_softmax(self, scores, attention_mask=None):
            return scores

    x = keras.Input((N, E))
    y = Own(3, 2, 1, name="own")(x, x)
    z = kl.MultiHeadAttention(H, D)(x, x)[:, -1]
    lines = refused(keras.Model(x, [y, kl.LSTM(2, name="memory")(ops.expand_dims(z, 1))]))
    assert any(
        line.startswith("- own (Own) cannot be converted: Expected the _masked_softmax of keras.")
        for line in lines
    )
    assert any(line.startswith("- memory (LSTM) is a layer") for line in lines)


def test_models_without_a_graph():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    model = Subclassed(name="subclassed")
    model.build((None, N, E))
    (line,) = refused(model)
    assert line.startswith("subclassed (Subclassed) has no graph to read")
    assert "keras.Model(inputs, outputs)" in line
    (line,) = refused(keras.Sequential([kl.Dense(2)], name="unbuilt"))
    assert line == "Expected a built model, but unbuilt has never been called: call it once"
    (line,) = refused(co_si(name="unbuilt"))
    assert line == "Expected a built layer, but unbuilt has never been called: call it once"
    for other in (None, "model.keras", keras.layers.Dense(3)):
        (line,) = refused(other)
        assert line.startswith("Expected a functional or built sequential keras.Model")
    (line,) = refused(kl.MultiHeadAttention(H, D, name="plain"))
    assert "CoSiMultiHeadAttention.from_regular" in line


def test_plain_attention_wants_a_window():
    def model_of(length):
        x = keras.Input((length, E))
        return keras.Model(x, kl.MultiHeadAttention(H, D)(x, x), name="given")

    def window_of(plan):
        return next(x["attributes"]["window"] for x in plan["nodes"] if x["op"] == "attention")

    (line,) = refused(model_of(None))
    assert line.startswith("Expected seq_len, the window of the attention in given")
    assert window_of(lower(model_of(None), 7).plan) == 7
    assert window_of(lower(model_of(9)).plan) == 9
    assert window_of(lower(model_of(9), seq_len=5).plan) == 5


def test_layers_that_are_continual_already_keep_their_window():
    x = keras.Input((None, E))
    y = co_si(single_output=False)(x, x, use_causal_mask=True)
    model = keras.Model(x, kl.MultiHeadAttention(H, D)(y, y))
    windows = [
        node["attributes"]["window"]
        for node in lower(model, 9).plan["nodes"]
        if node["op"] == "attention"
    ]
    assert windows == [N, 9]


@pytest.mark.parametrize("dtype", ["int32", "int8", "float16", "bfloat16", "float64"])
def test_dtypes_of_caches_and_weights(dtype):
    layer = ct.CoSiTransformerEncoder(N, E, H, 7)
    layer.build((None, N, E))
    layer.built = True
    narrow = {"cache_dtype": ("float16", "bfloat16", "int8"), "weights_dtype": ("bfloat16", "int8")}
    for name, allowed in narrow.items():
        if dtype in allowed:
            assert lower(layer, **{name: dtype}).plan[name] == dtype
            continue
        with pytest.raises(ValueError, match=f"Expected {name} to be None or the compute dtype"):
            lower(layer, **{name: dtype})


def test_dtypes_that_layers_agree_on():
    def plan_of(*layers):
        x = y = keras.Input((N, E))
        for layer in layers:
            y = layer(y, y, use_causal_mask=True)
        return lower(keras.Model(x, y)).plan

    options = dict(single_output=False)
    narrow = co_si(cache_dtype="bfloat16", weights_dtype="bfloat16", **options)
    plan = plan_of(narrow)
    assert (plan["cache_dtype"], plan["weights_dtype"]) == ("bfloat16", "bfloat16")
    plan = plan_of(narrow, co_si(**options))
    assert (plan["cache_dtype"], plan["weights_dtype"]) == ("float32", "float32")
    plan = plan_of(co_si(dtype="mixed_bfloat16", **options))
    assert (plan["compute_dtype"], plan["cache_dtype"]) == ("float32", "bfloat16")


def test_narrow_weights_are_those_of_dense_nodes(random):
    x = keras.Input((N,), dtype="int32")
    y = ct.CoSiTransformerEncoder(N, E, H, 7)(kl.Embedding(5, E)(x))
    model = keras.Model(x, y)
    wide, narrow = (lower(model, weights_dtype=dtype) for dtype in (None, "bfloat16"))
    kernels = {node["weights"]["kernel"] for node in narrow.plan["nodes"] if node["op"] == "dense"}
    assert len(kernels) == 6
    for name, array in narrow.weights.items():
        assert array.dtype == ("bfloat16" if name in kernels else "float32")
        np.testing.assert_array_equal(array, wide.weights[name].astype(array.dtype))


REASONS = {
    "a mask that Keras reads as one of features": (
        lambda x: kl.Softmax(name="layer")(kl.Masking()(x)),
        "may look at several steps|is given a mask|mixes whole windows",
    ),
    "a mask and a causal mask under retroactive attention": (
        lambda x: ct.CoReMultiHeadAttention(N, H, D, name="layer")(
            kl.Masking()(x), use_causal_mask=True
        ),
        "is given a mask together with use_causal_mask",
    ),
    "indices that a step computes": (
        lambda x: kl.Embedding(3, 2, name="layer")(ops.cast(co_si()(x, x)[:, -1], "int32")),
        "is given integers that a step computes",
    ),
    "indices that are floats": (
        lambda x: kl.Embedding(3, 2, name="layer")(co_si()(x, x)[:, -1]),
        "is given float32: expected an input of the model of integers",
    ),
    "arithmetic of integers": (
        lambda x: ops.add(ops.cast(x, "int32"), 1),
        "computes in int32: a plan computes only in floats",
    ),
    "a dtype that no plan has": (
        lambda x: ops.cast(x, "uint8"),
        "casts to uint8: expected floats, int32, int64 or bool",
    ),
    "time on another axis": (
        lambda x: ct.CoDelay(1, temporal_dim=2, name="layer")(x),
        "has time on axis 2: expected axis 1, that of the model",
    ),
    "samples that are mixed": (
        lambda x: ops.reshape(co_si()(x, x)[:, -1], (-1, 2)),
        r"reshapes \[6\] to \[2\]",
    ),
    "tensors of different ranks": (
        lambda x: co_si()(x, x) + co_si()(x, x)[:, -1],
        "combines tensors of different ranks",
    ),
    "an operation without a node": (
        lambda x: ops.erfinv(co_si()(x, x)[:, -1]),
        "is an operation that a plan has no node for",
    ),
}


@pytest.mark.parametrize("what", REASONS)
def test_reasons(what):
    function, pattern = REASONS[what]
    first, *lines = lines_of(function, E)
    assert first == "given cannot be run by a session:"
    assert any(re.search(rf"^- \w+ \(\w+\) .*({pattern})", line) for line in lines), lines


def test_quantized_layers():
    x = keras.Input((N, E))
    dense = kl.Dense(E, name="dense")
    model = keras.Model(x, co_si()(dense(x), x), name="given")
    dense.quantize("int8")
    _, line = refused(model)
    assert line == "- dense (Dense) is quantized to int8: make the session before quantize()"


def test_low_rank_additions_are_part_of_the_kernel(random):
    layer = co_si()
    layer.build((None, N, E))
    layer.built = True
    layer._query_dense.enable_lora(2)
    addition = layer._query_dense.lora_kernel_b
    addition.assign(random.normal(size=addition.shape))
    weights = lower(layer).weights
    name = next(name for name in weights if name.endswith("query/kernel"))
    np.testing.assert_array_equal(weights[name], np.reshape(layer._query_dense.kernel, (E, H * D)))
    assert np.abs(weights[name] - np.reshape(layer._query_dense._kernel, (E, H * D))).max() > 0


def test_layers_alone_of_another_kind():
    class Other(ct.CoSiMultiHeadAttention):
        def call_steps(self, *args, **kwargs):
            return super().call_steps(*args, **kwargs)

    layer = Other(N, H, D, name="other")
    layer.build((None, N, E))
    layer.built = True
    lines = refused(layer)
    assert lines[0] == "other cannot be run by a session:"
    assert lines[1].startswith("- other (Other) computes in its own way")


def test_inputs_of_open_size_and_of_texts():
    x = keras.Input((N, None), name="open")
    assert refused(keras.Model(x, kl.ReLU()(x)))[1].startswith(
        "- open (Input) has features of unknown size"
    )
    x = keras.Input((N,), dtype="string", name="words")
    assert any(line.startswith("- words") or "no axis of time in words" in line
               for line in refused(keras.Model(x, kl.Identity()(x))))  # fmt: skip


def test_numbers_of_numpy_and_numbers_without_an_end():
    layer = ct.CoSiMultiHeadAttention(np.int64(N), H, D, query_index=np.int8(0))
    layer.build((None, N, E))
    layer.built = True
    assert lower(layer).to_bytes()
    x = keras.Input((N, E))
    y = kl.LayerNormalization(epsilon=np.float32(0.25))(x)
    model = keras.Model(x, [y, kl.Masking(np.inf, name="mask")(y)], name="given")
    _, line = refused(model)
    assert line == "- mask (Masking) has the number inf: a plan holds only finite numbers"
