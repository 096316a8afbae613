"""Whole models in a session, against a float64 reference of the plan, and against Keras' steps."""

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
import plan_reference
import reference
from continual_transformers_tf.models.lowering import lower
from continual_transformers_tf.session import OtherModelError, Session
from model_case import BOUNDS, N
from model_cases import CASES, E
from plan_files import PlanFile
from streamed import Streamed, by_streams, check

pytestmark = pytest.mark.sampled(3, rest="slow")


def referenced(plan, weights, inputs):
    """Return the outputs of the float64 reference: arrays (M, T, ...)."""
    outputs = []
    for i in range(len(inputs[0])):
        stream = plan_reference.Stream(plan, weights)
        steps = [stream.step([x[i, t] for x in inputs]) for t in range(inputs[0].shape[1])]
        outputs.append([np.stack(rows) for rows in zip(*steps, strict=True)])
    return [np.stack(rows) for rows in zip(*outputs, strict=True)]


@pytest.mark.sampled(6, rest="slow")
@pytest.mark.parametrize("name", CASES)
def test_a_session_gives_what_the_plan_says(random, tmp_path, name):
    case = CASES[name]
    model = case.build()
    session = Session(model, seq_len=case.seq_len)
    inputs = case.inputs(model, random, (3, 2 * case.window + 8))
    ids = session.open(5)[[3, 0, 4]]
    outputs = by_streams(Streamed(session), inputs, ids)
    lowered = lower(model, case.seq_len)
    expected = referenced(lowered.plan, lowered.weights, inputs)
    check(outputs, expected, BOUNDS[case.dtype])
    assert session.ready(ids).all()
    assert session.receptive_field == lowered.plan["receptive_field"]
    # A loaded file gives the same, to the bit.
    session.save(tmp_path / "model.safetensors")
    loaded = Session.load(tmp_path / "model.safetensors")
    others = loaded.open(5)[[1, 2, 4]]
    for y, x in zip(by_streams(Streamed(loaded), inputs, others), outputs, strict=True):
        np.testing.assert_array_equal(y, x)
    # A copy of a stream, made half-way, continues as the stream does.
    loaded.set_state(session.get_state(ids), others[::-1])
    step = [x[:, 0] for x in inputs]
    for y, x in zip(
        Streamed(loaded).step(step, streams=others[::-1]),
        Streamed(session).step(step, streams=ids),
        strict=True,
    ):
        np.testing.assert_array_equal(y, x)


# Models in which nothing but attention looks back, so that gaps leave no trace.
GAP_CASES = ["co_si_gate", "co_si_sliding_window", "co_si_encoder_norm_first", "demo"]

# Cases whose sessions are compared with Keras' steps and take over Keras' streams.
# (test_lowering.py compares the plan of every case with Keras.)
KERAS_CASES = [
    "co_si_gate",
    "co_si_second_query",
    "co_si_first_query_sliding",
    "co_re_gate",
    "co_re_sliding_window",
    "co_si_encoder_norm_first",
    "stack_single_output_2",
    "stack_retroactive_2",
    "positions_learned",
    "delay_int32",
    "residual_delayed",
    "demo",
    "deep_causal_stack",
    "inputs_by_name",
    "nested_structures",
    "several_tokens_a_step",
    "masked_attention",
    "streaming_model_inside_another",
    "float64",
    "mixed_bfloat16",
    "narrow_cache",
]


@pytest.mark.sampled(3, rest="slow")
@pytest.mark.parametrize("name", KERAS_CASES)
def test_a_session_goes_on_where_keras_was(random, name):
    case = CASES[name]
    model = case.build()
    streaming = case.streaming(model)
    streamed = Streamed(Session(streaming, seq_len=case.seq_len))
    session = streamed.session
    inputs = case.inputs(model, random, (2, case.window + 6))
    first, rest = ([x[:, s] for x in inputs] for s in (np.s_[:-4], np.s_[-4:]))
    ids = session.open(2)
    bound = 2 * BOUNDS[case.dtype]  # Both sides are rounded.
    check(streamed.steps(first, streams=ids), case.steps(streaming, first), bound)
    # The first stream is older than the second.
    more = [x[:1, :3] for x in first]
    check(streamed.steps(more, streams=ids[:1]), case.steps(streaming, more), bound)

    others = session.open(2)
    session.set_state(streaming.get_state([1, 0]), others)
    np.testing.assert_array_equal(session.position(others), session.position(ids[::-1]))
    expected = case.steps(streaming, rest)
    check(streamed.steps(rest, streams=ids), expected, bound)
    check(streamed.steps(rest, streams=others[::-1]), expected, bound)


def test_state_of_another_keras_model():
    model = CASES["co_si_gate"].build()
    session = Session(model)
    a = session.open()
    session.step(np.ones((1, E), np.float32), streams=a)
    before = session.get_state(a)
    other = CASES["co_re_gate"].build()
    other.ensure_streams(1)
    model.ensure_streams(2)
    for state in (other.get_state([0]), model.get_state([0, 1]), {}, 3, [b"", 1]):
        with pytest.raises((ValueError, TypeError)):
            session.set_state(state, a)
        assert session.get_state(a) == before


def test_weights_of_a_keras_model(random):
    """A session keeps the weights that it was made with, until a call gives it others."""
    case = CASES["demo"]
    model = case.build()
    session = Session(model)
    x = random.standard_normal((1, 9, E)).astype(np.float32)
    before = session.steps(x, streams=session.open())
    model.set_weights([w + 0.1 * random.standard_normal(w.shape) for w in model.get_weights()])
    np.testing.assert_array_equal(session.steps(x, streams=session.open()), before)
    session.load_weights(model)
    after = session.steps(x, streams=session.open())
    check([after], case.steps(model, [x]), 2 * BOUNDS["float32"])
    assert np.abs(after - before).max() > 1e-3


def test_weights_of_a_model_with_an_open_axis_of_time(random):
    case = CASES["deep_causal_stack"]
    model = case.build()
    session = Session(model, seq_len=case.seq_len)
    model.set_weights([w + 0.1 * random.standard_normal(w.shape) for w in model.get_weights()])
    session.load_weights(model)
    x = random.standard_normal((1, 9, E)).astype(np.float32)
    expected = Session(model, seq_len=case.seq_len)
    np.testing.assert_array_equal(
        session.steps(x, streams=session.open()), expected.steps(x, streams=expected.open())
    )
    with pytest.raises(ValueError, match="seq_len"):
        Session(model)


def test_weights_of_another_keras_model():
    session = Session(CASES["co_si_gate"].build())
    with pytest.raises(OtherModelError):
        session.load_weights(CASES["co_si_no_bias"].build())


@pytest.mark.parametrize("cache_dtype", [None, "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("weights_dtype", [None, "bfloat16", "int8"])
def test_narrow_types(random, tmp_path, cache_dtype, weights_dtype):
    model = CASES["demo"].build()
    exact = Session(model)
    narrow = Session(model, cache_dtype=cache_dtype, weights_dtype=weights_dtype)
    assert narrow.cache_dtype == (cache_dtype or "float32")
    assert narrow.weights_dtype == (weights_dtype or "float32")
    x = random.standard_normal((3, 20, E)).astype(np.float32)
    y = exact.steps(x, streams=exact.open(3))
    z = narrow.steps(x, streams=narrow.open(3))
    assert reference.relative_error(y, z) < 2e-2
    is_narrow = cache_dtype is not None or weights_dtype is not None
    assert (reference.relative_error(y, z) > 1e-5) == is_narrow
    # Dtypes that are chosen when a file is loaded give the same.
    exact.save(tmp_path / "model.safetensors")
    loaded = Session.load(
        tmp_path / "model.safetensors", cache_dtype=cache_dtype, weights_dtype=weights_dtype
    )
    np.testing.assert_array_equal(loaded.steps(x, streams=loaded.open(3)), z)


def test_gaps_and_nan_in_rings_of_int8(random):
    """A gap has no weight, and the NaN of one stream is in no other, and leaves with its step."""
    layer = CASES["co_si_window_3"].build()
    exact, narrow = Session(layer), Session(layer, cache_dtype="int8")
    x = random.standard_normal((3, 12, E)).astype(np.float32)
    mask = random.random((3, 12)) < 0.6
    broken = x.copy()
    broken[~mask] = np.nan  # Of a gap, nothing is read.
    y, z = exact.steps(x, key_mask=mask), narrow.steps(broken, key_mask=mask)
    assert 0 < reference.relative_error(y[mask], z[mask]) < 2e-2
    narrow.clean_state()
    x[1, 4, 0] = np.inf
    z = narrow.steps(x)
    y = exact.steps(x, streams=exact.open(3))
    np.testing.assert_array_equal(np.isfinite(z).all(-1), np.isfinite(y).all(-1))
    assert np.isfinite(z[[0, 2]]).all()
    assert np.isfinite(z[1, 4 + 3 :]).all()


def test_long_streams_in_int8_do_not_drift(random):
    layer = CASES["co_si_window_3"].build()
    exact, narrow = Session(layer), Session(layer, cache_dtype="int8", weights_dtype="int8")
    x = random.standard_normal((1, 100_000, E)).astype(np.float32)
    y, z = exact.steps(x)[:, -1000:], narrow.steps(x)[:, -1000:]
    assert reference.relative_error(y, z) < 2e-2


@pytest.mark.parametrize("own", ["float32", "bfloat16"])
def test_state_of_another_weights_dtype(own):
    model = CASES["demo"].build()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[own]
    session, from_ = Session(model, weights_dtype=own), Session(model, weights_dtype=other)
    stream, states = session.open(), from_.get_state(from_.open())
    with pytest.raises(OtherModelError, match=rf"weights_dtype \(this .* has {own}\)"):
        session.set_state(states, stream)
    session.set_state(states, stream, other_weights=True)


def test_inputs_by_name_as_keras_takes_them(random):
    """Keras takes a dict by the inputs' names for a model that was built with a list of inputs."""
    model = CASES["two_inputs"].build()
    x = {
        "second": random.standard_normal((1, N, 3)).astype(np.float32),
        "first": random.standard_normal((1, N, E)).astype(np.float32),
    }
    session = Session(model)
    outputs = session.steps(x)
    for y, z in zip(outputs, session.steps([x["first"], x["second"]], session.open()), strict=True):
        np.testing.assert_array_equal(y, z)
    newest = keras.ops.convert_to_numpy(model(x)[1])
    assert reference.relative_error(newest, outputs[1][:, -1]) < BOUNDS["float32"]
    with pytest.raises(ValueError, match="a list of 2: first, second; or a dict"):
        session.step(x["first"][:, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", GAP_CASES)
def test_what_is_in_a_gap_does_not_matter(random, name, bad):
    case = CASES[name]
    session = Session(case.build())
    a, b = session.open(2)
    x = random.standard_normal((3 * session.receptive_field, *session.inputs[0].shape))
    x = x.astype(np.float32)
    for step in x:
        has_key = random.random() < 0.7
        y = session.step(step[None], a, key_mask=[has_key])
        z = session.step(
            step[None] if has_key else np.full_like(step, bad)[None], b, key_mask=[has_key]
        )
        if has_key:
            np.testing.assert_array_equal(y, z)


def test_a_model_that_cannot_be_lowered_says_what_stands_in_the_way():
    x = keras.Input((N, E))
    y = keras.layers.LayerNormalization(axis=1)(x)
    y = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True))(y)
    with pytest.raises(ValueError, match=r"(?s)layer_normalization.*bidirectional"):
        Session(keras.Model(x, y))
    with pytest.raises(ValueError, match="keras"):
        Session(3)


def test_threads_give_the_same(random):
    """Many rows in two threads. Other numbers of threads may round differently."""
    model = CASES["demo"].build()
    one, two = Session(model), Session(model, threads=2)
    x = random.standard_normal((600, 12, E)).astype(np.float32)
    ids, others = one.open(600), two.open(600)
    for t in range(6):
        y, z = one.step(x[:, t], streams=ids), two.step(x[:, t], streams=others)
        assert reference.relative_error(y, z) < BOUNDS["float32"]
    y, z = one.steps(x[:, 6:], streams=ids), two.steps(x[:, 6:], streams=others)
    assert reference.relative_error(y, z) < BOUNDS["float32"]


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16", "int8"])
def test_one_query_above_retroactive_attention(random, weights_dtype, sliding_window):
    """Only the query's row is projected, except with int8 kernels, whose scales are by column."""
    n, features = 12, 8
    x = keras.Input((n, features))
    y = ct.CoReMultiHeadAttention(n, 2, 4)(x, x)
    newest = ct.CoSiMultiHeadAttention(n, 2, 4, value_dim=6, sliding_window=sliding_window)(y, y)
    model = ct.StreamingModel(keras.Model(x, newest[:, 0]), warm_up="partial")
    for w in model.model.weights:
        if "bias" in w.path:
            w.assign(random.normal(size=w.shape))
    session = Session(model, weights_dtype=weights_dtype)
    inputs = random.normal(size=(1, 3 * n, features)).astype("float32")
    expected = np.concatenate([model.model(inputs[:, t : t + n]) for t in range(2 * n + 1)])
    error = reference.relative_error(session.steps(inputs)[0, n - 1 :], expected)
    assert error < (5e-6 if weights_dtype == "float32" else 3e-2)
    assert _window_attention_of(session) == [_ops_of_few_queries(weights_dtype)]


@pytest.mark.parametrize("queries", [2, 5])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16", "int8"])
def test_few_queries_above_retroactive_attention(random, weights_dtype, queries):
    """Learned queries attend to the window's rows, which are not projected for them."""
    n, features = 20, 12
    x = keras.Input((n, features))
    window = ct.CoReMultiHeadAttention(n, 2, 4)(x, x)
    learned = ct.LearnedQueries(queries, 7)(window)
    y = keras.layers.MultiHeadAttention(3, 4, value_dim=6, output_shape=5)(learned, window)
    model = keras.Model(x, y)
    for w in model.weights:
        if "bias" in w.path or "queries" in w.path:
            w.assign(random.normal(size=w.shape))
    session = Session(model, weights_dtype=weights_dtype)
    inputs = random.normal(size=(2, 3 * n, features)).astype("float32")
    got = session.steps(inputs)
    for t in (0, n - 1, 2 * n):
        expected = model(inputs[:, t : t + n])
        error = reference.relative_error(got[:, n - 1 + t], expected)
        assert error < (5e-6 if weights_dtype == "float32" else 3e-2)
    assert _window_attention_of(session) == [_ops_of_few_queries(weights_dtype)]


def _few_queries_plan(random, queries, case="", n=8, features=6, heads=2, size=4):
    """Queries, an input, attend to projections of the window of the other input."""
    plan = PlanFile(receptive_field=n)
    plan.plan["input_structure"] = [0, 1]
    x, query = plan.input("x", features), plan.input("q", queries, heads * size)
    rows = plan.node("window", [x], plan.value(n, features), window=n)
    cut = 2 if case == "reshaped" else 1
    if cut > 1:
        rows = plan.node("reshape", [rows], plan.value(cut * n, features // cut))

    def projected():
        weights = {
            "kernel": random.standard_normal((features // cut, heads * size // cut)),
            "bias": random.standard_normal(heads * size // cut),
        }
        weights = {name: array.astype("float32") for name, array in weights.items()}
        y = plan.node("dense", [rows], plan.value(cut * n, heads * size // cut), weights)
        return y if cut == 1 else plan.node("reshape", [y], plan.value(n, heads * size))

    attributes = dict(heads=heads, scale=size**-0.5, band=0, causal=False)
    if case == "late":
        attributes |= dict(rows=1, first=-n - 3)
    inputs = [query, projected(), projected()]
    y = plan.node("window_attention", inputs, plan.value(queries, heads * size), **attributes)
    plan.output("y", y)
    return plan


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("case", ["plain", "late", "reshaped"])
def test_few_queries_of_a_hand_made_plan(random, case, queries):
    """Queries without keys give zeros. Projections that a reshape cuts are computed."""
    plan = _few_queries_plan(random, queries, case)
    x, q = random.standard_normal((2, 20, 6)), random.standard_normal((2, 20, queries, 8))
    inputs = [x.astype("float32"), q.astype("float32")]
    session = plan.session()
    outputs = by_streams(Streamed(session), inputs, session.open(2))
    check(outputs, referenced(plan.plan, plan.tensors, inputs), BOUNDS["float32"])
    together = _window_attention_of(session)
    assert together == ["window_attention" if case == "reshaped" else _ops_of_few_queries("")]


@pytest.mark.parametrize("queries", [3, 8])
def test_threads_share_the_heads_of_a_window_bit_for_bit(random, queries):
    plan = _few_queries_plan(random, queries, n=120, features=256, heads=8, size=32)
    for name in ("k", "v"):  # As outputs they are computed, and attended to.
        dense = [node for node in plan.plan["nodes"] if node["op"] == "dense"][name == "v"]
        plan.output(name, dense["outputs"][0])
    plan.plan["output_structure"] = [0, 1, 2]
    inputs = [
        random.standard_normal((1, *shape)).astype("float32") for shape in ((256,), (queries, 256))
    ]
    one, two = (plan.session(threads=threads) for threads in (1, 2))
    for _ in range(3):
        for y, z in zip(one.step(inputs), two.step(inputs), strict=True):
            np.testing.assert_array_equal(y, z)


def _window_attention_of(session):
    return [row.op for row in session.profile(repeat=1) if "window_attention" in row.op]


def _ops_of_few_queries(weights_dtype):
    return "window_attention" if weights_dtype == "int8" else "dense + dense + window_attention"
