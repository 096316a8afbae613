"""`ct.explain`: its rows and reasons, and what it says of windows, against numbers."""

import json

import keras
import numpy as np
import pytest

import continual_transformers_tf as ct
from brought_models import BROUGHT
from convert_cases import CANNOT, MODELS, D, E, H, N, attention, model_of, one_block

pytestmark = pytest.mark.sampled(3, rest="slow")


def rows_of(explanation):
    return {row.name: row for row in explanation.rows}


def test_a_model_that_streams(random):
    model = model_of(one_block, random)
    found = ct.explain(model)
    session = ct.Session(model)
    assert found.streams
    assert found.streams_in_keras
    assert found.equals_windows
    assert found.windows == f"on windows of {N} steps"
    assert (found.receptive_field, found.delay) == (session.receptive_field, session.delay)
    assert found.state_bytes == session.state_bytes
    assert not found.reasons
    kinds = {row.kind: row.how for row in found.rows}
    assert kinds["MultiHeadAttention"] == f"attention over a window of {N} steps, single output"
    assert kinds["GetItem"] == "takes the row that a step gives: nothing to do"
    assert [row.how for row in found.rows if row.kind == "Dense"] == [
        "row by row",
        "row by row",
        "on the newest row",
    ]
    # A row for each layer and operation, in the order of Keras' graph, and none for its input.
    assert sorted(rows_of(found)) == sorted(op.name for op in model.operations[1:])
    assert all(row.streams and not row.reasons for row in found.rows)


def test_it_prints_as_a_table_and_is_plain_data(random):
    found = ct.explain(model_of(one_block, random))
    lines = str(found).splitlines()
    assert lines[0] == f"{found.name} streams."
    assert lines[2].split() == ["layer", "class", "how", "it", "streams"]
    assert len([line for line in lines if "row by row" in line]) == 7
    assert f"a stream          {found.state_bytes:,} bytes" in lines
    assert max(map(len, lines)) <= 100
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["streams"] is True
    assert plain["rows"][0]["name"] == found.rows[0].name
    assert set(plain["rows"][0]) == {"name", "kind", "how", "streams", "reasons"}


@pytest.mark.parametrize("case", CANNOT)
def test_each_reason_is_that_of_convert(case):
    """Every line of ct.convert's error is in one row, and every reason of a row is in the error."""
    function, _ = CANNOT[case]
    x = keras.Input((N, E))
    model = keras.Model(x, function(x), name="given")
    with pytest.raises(ValueError, match=".") as refused:
        ct.convert(model, N)
    lines = str(refused.value).splitlines()[1:]
    found = ct.explain(model, N)
    if case == "no attention":  # Only ct.convert refuses it: there is nothing to convert.
        assert found.streams
        assert not found.streams_in_keras
        return
    assert not found.streams
    assert not found.streams_in_keras
    assert not found.reasons
    reasons = [why for row in found.rows for why in row.reasons]
    assert reasons
    if case == "grouped queries":  # ct.convert ends before it reads the graph.
        assert "keras.layers.MultiHeadAttention" in lines[0]
        assert "keras.layers.MultiHeadAttention" in reasons[0]
    else:
        assert {line.split(") ", 1)[1] for line in lines} == set(reasons)
    for row in found.rows:
        assert row.streams == (row.how != "does not stream") == (not row.reasons)
        for why in row.reasons:
            assert why.split()[0] in str(found)
    assert (found.receptive_field, found.equals_windows, found.state_bytes) == (None, None, None)


class Places(keras.layers.Layer):
    """A layer that adds to each step its place in the window."""

    def call(self, x):
        return x + keras.ops.arange(x.shape[1], dtype=x.dtype)[:, None]


def test_reasons_have_a_cure(random):
    x = keras.Input((N, E))
    y = attention("first")(x, x)
    y = keras.layers.GlobalAveragePooling1D(name="pool")(y)
    rows = rows_of(ct.explain(keras.Model(x, y)))
    assert "ct.CoReTransformerEncoder" in rows["pool"].reasons[0]
    y = attention("second")(x, x) + np.ones((N, E), "float32")
    (row,) = [row for row in ct.explain(keras.Model(x, y)).rows if row.reasons]
    assert "ct.CircularPositionalEncoding" in row.reasons[0]
    for places, cure in ((lambda x: keras.ops.cumsum(x, 1), "ct.CoWindow"), (Places(), "recycle")):
        y = attention("third")(x, keras.layers.Dense(E)(places(x)))
        (row,) = [row for row in ct.explain(keras.Model(x, y)).rows if row.reasons]
        assert cure in row.reasons[0]
    y = keras.layers.Concatenate(name="both")([attention()(x, x), x])[:, 1]
    (row,) = [row for row in ct.explain(keras.Model(x, y)).rows if row.reasons]
    assert "x[:, -1]" in row.reasons[0]


def test_what_only_a_session_refuses_is_told_apart():
    x = keras.Input((N, E))
    y = keras.layers.Reshape((2, E // 2))(attention()(x, x)[:, -1])
    y = keras.layers.LSTM(3, name="memory")(y)
    found = ct.explain(keras.Model(x, y, name="given"))
    assert not found.streams
    assert found.streams_in_keras
    assert str(found).startswith(
        "given streams in TensorFlow (ct.convert), but not in a ct.Session."
    )
    assert "ct.StreamingModel" in rows_of(found)["memory"].reasons[0]
    assert (found.receptive_field, found.state_bytes) == (N, None)
    assert found.equals_windows


def test_a_model_without_a_graph():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.attend = ct.CoSiMultiHeadAttention(N, H, D, name="attend")
            self.head = keras.layers.Dense(2, name="head")

        def call(self, x):
            return self.head(self.attend(x))

    model = Own()
    model(np.zeros((1, N, E), "float32"))
    found = ct.explain(model)
    assert not found.streams
    assert "has no graph to read" in found.reasons[0]
    assert "keras.Model(inputs, outputs)" in str(found)
    rows = rows_of(found)
    assert rows["attend"].streams
    assert rows["head"].how == "not known"


class NoConfig(keras.layers.Layer):
    """A layer that Keras cannot copy."""

    def __init__(self, function):
        super().__init__(name="no_config")
        self.function = function

    def call(self, x):
        return self.function(x)


def test_a_layer_that_cannot_be_copied():
    x = keras.Input((N, E))
    model = keras.Model(x, attention("attend")(NoConfig(lambda x: 2 * x)(x), x), name="given")
    found = ct.explain(model)
    assert not found.streams
    row = rows_of(found)["no_config"]
    assert (row.how, len(row.reasons)) == ("does not stream", 1)
    assert rows_of(found)["attend"].how == "not known"
    for make in (lambda: ct.Session(model), lambda: ct.convert(model, N)):
        with pytest.raises(
            ValueError, match=r"no_config \(NoConfig\) cannot be copied.*get_config"
        ):
            make()


def test_layers_of_a_model_within_a_model_have_its_name_too(random):
    x = keras.Input((N, E))
    inner = keras.Model(x, attention("attend")(x, x) + x, name="inner")
    x = keras.Input((N, E))
    pool = keras.layers.GlobalMaxPooling1D(name="attend")
    rows = rows_of(ct.explain(keras.Model(x, pool(inner(x)))))
    assert rows["inner/attend"].streams
    assert rows["inner/attend"].kind == "MultiHeadAttention"
    assert not rows["attend"].streams
    streaming = ct.convert(keras.Model(x, inner(x)), N)
    assert rows_of(ct.explain(streaming))["inner/attend"].kind == "CoSiMultiHeadAttention"


LAYERS = {
    "co_si": (
        lambda: ct.CoSiMultiHeadAttention(N, H, D),
        f"attention over a window of {N} steps, single output",
    ),
    "query_index": (
        lambda: ct.CoSiMultiHeadAttention(N, H, D, query_index=-3),
        f"attention over a window of {N} steps, single output, delay of 2 steps",
    ),
    "co_re": (
        lambda: ct.CoReTransformerEncoder(N, E, H, 9),
        f"attention over a window of {N} steps, retroactive",
    ),
    "stack": (
        lambda: ct.TransformerEncoder(2, N, E, H, 9, kind="retroactive"),
        f"attention over a window of {N} steps, retroactive, 2 blocks",
    ),
    "positions": (
        lambda: ct.CircularPositionalEncoding(11, E),
        "positions: row p mod 11 for step p of a stream",
    ),
    "delay": (lambda: ct.CoDelay(2), "delay of 2 steps"),
    "residual": (lambda: ct.CoResidual(ct.CoDelay(1)), "adds its input to: delay of 1 step"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer(case):
    make, how = LAYERS[case]
    layer = make()
    layer(np.zeros((1, N, E), "float32"))
    found = ct.explain(layer)
    (row,) = found.rows
    assert (row.name, row.kind, row.how) == (layer.name, type(layer).__name__, how)
    assert found.streams
    assert (found.receptive_field, found.delay) == (layer.receptive_field, layer.delay)
    assert found.state_bytes == ct.Session(layer).state_bytes


def test_layers_that_do_not_stream():
    plain = keras.layers.MultiHeadAttention(H, D)
    plain(np.zeros((1, N, E)), np.zeros((1, N, E)))
    found = ct.explain(plain)
    assert not found.streams
    assert "CoSiMultiHeadAttention.from_regular" in found.rows[0].reasons[0]
    for other in (keras.layers.Dense(2), "model.keras", None):
        with pytest.raises(ValueError, match="Expected a functional or built sequential"):
            ct.explain(other)


def test_a_window_that_is_not_known_is_asked_for(random):
    model = model_of(one_block, random, None)
    found = ct.explain(model)
    assert not found.streams
    assert "Expected seq_len" in found.reasons[0]
    assert ct.explain(model, 9).receptive_field == 9


@pytest.mark.parametrize("name", BROUGHT)
def test_it_explains_every_model_that_people_bring(name):
    make, parts = BROUGHT[name]
    found = ct.explain(make())
    said = " ".join(str(found).split())
    if parts is not None:
        assert found.streams == (not parts)
    for part in parts or []:
        assert part in said
    reasons = [*found.reasons, *(reason for row in found.rows for reason in row.reasons)]
    assert bool(reasons) != found.streams
    for reason in reasons:
        assert "\n" not in reason
        assert len(reason) < 330
    json.dumps(found.as_dict())


def test_what_it_says_to_do_about_pooling_is_done():
    model = BROUGHT["pooling"][0]()
    assert "kind='retroactive'" in " ".join(str(ct.explain(model)).split())
    assert ct.explain(ct.convert(model, 8, kind="retroactive")).equals_windows


# What it says of windows.


def encoders(layers, kind, positions=False):
    def build(x):
        if positions:
            x = ct.CircularPositionalEncoding(4 * N, E)(x)
        return ct.TransformerEncoder(layers, N, E, H, 9, kind=kind)(x)

    return build


def causal_late(x):
    x = attention()(x, x, use_causal_mask=True)
    return ct.CoDelay(2)(x)[:, -3]


def two_windows(x):
    parts = [ct.CoSiMultiHeadAttention(n, H, D, single_output=False)(x, x) for n in (N, N - 2)]
    return keras.layers.Add()(parts)[:, -1]


def narrow(x):
    return ct.CoSiMultiHeadAttention(N, H, D, sliding_window=3)(x, x)


def sliding_stack(*causal):
    """Plain Keras attention on attention, each causal or not, with sliding windows of 3 steps."""

    def build(x):
        for use_causal_mask in causal:
            attention = keras.layers.MultiHeadAttention(H, D, sliding_window=3)
            x = x + attention(x, x, use_causal_mask=use_causal_mask)
        return keras.layers.Dense(3)(x)[:, -1]

    return build


def late_query(x):
    return ct.CoResidual(ct.CoSiMultiHeadAttention(N, H, D, query_index=-3))(x)


def retroactive_then_pool(x):
    return keras.layers.GlobalMaxPooling1D()(ct.CoReTransformerEncoder(N, E, H, 9)(x))


def dense(x):
    return keras.layers.Dense(3)(x)


def convolved(padding, layer):
    """Return a layer on the rows of a convolution of 3 steps."""

    def build(x):
        y = keras.layers.Conv1D(E, 3, padding=padding)(x)
        return attention()(y, y)[:, -1] if layer == "attention" else layer()(y)

    return build


# The last has positions.
NOT_AS_ON_WINDOWS = ("causal_stack", "causal_then_full", "already_ours")
# Name: (function, length of the model's windows, whether steps equal the model on them).
CLAIMS = {
    **{f.__name__: (f, N, f.__name__ not in NOT_AS_ON_WINDOWS) for f in MODELS},
    "one encoder": (encoders(1, "single_output"), N, True),
    "one encoder, longer windows": (encoders(1, "single_output"), N + 3, True),
    "two encoders": (encoders(2, "single_output"), N, False),
    "two encoders, their receptive field": (encoders(2, "single_output"), 2 * N - 1, True),
    "retroactive": (encoders(2, "retroactive"), N, True),
    "two encoders, longer windows": (encoders(2, "single_output"), N + 3, False),
    "retroactive, longer windows": (encoders(2, "retroactive"), N + 3, False),
    "retroactive, with positions": (encoders(2, "retroactive", positions=True), N, False),
    "causal, then a delay": (causal_late, N, False),
    "two windows": (two_windows, N, False),
    "sliding window": (narrow, N + 2, True),
    "sliding causal stack": (sliding_stack(True, True, True), 7, True),
    "sliding causal stack, longer windows": (sliding_stack(True, True), 9, True),
    "sliding causal stack, shorter windows": (sliding_stack(True, True), 4, False),
    "sliding stack, not causal above": (sliding_stack(True, False), 9, True),
    "delayed query": (late_query, N, True),
    "retroactive, then pooling": (retroactive_then_pool, N, True),
    "only rows": (dense, N + 4, True),
    "valid convolution, attention": (convolved("valid", "attention"), N, False),
    "causal convolution, attention": (convolved("causal", "attention"), N, False),
    "valid convolution, pooling": (
        convolved("valid", keras.layers.GlobalAveragePooling1D),
        N,
        False,
    ),
    "causal convolution, pooling": (
        convolved("causal", keras.layers.GlobalAveragePooling1D),
        N,
        False,
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_what_it_says_of_windows_is_so(case, random):
    """The last of many steps is compared with the model on the newest window."""
    function, length, claim = CLAIMS[case]
    inputs = keras.Input((length, E))
    model = keras.Model(inputs, function(inputs))
    found = ct.explain(model)
    assert found.streams, str(found)
    x = random.standard_normal((2, 4 * N, E)).astype("float32")
    session = ct.Session(model)
    expected = np.asarray(model(x[:, -length:]))

    def equal(y):
        # The model may have a row for each step of the window.
        rows = expected[:, -1] if expected.ndim == y.ndim + 1 else expected
        return np.allclose(y, rows, rtol=1e-4, atol=1e-5)

    assert equal(session.steps(x)[:, -1]) == claim
    assert found.equals_windows == claim, found.windows
    if found.windows.startswith("only the first window of a new stream"):
        assert equal(session.steps(x[:, -length:], session.open(2))[:, -1])
    else:
        assert "positions" not in found.windows


def gru():
    return keras.layers.GRU(3)


AVERAGE = keras.layers.GlobalAveragePooling1D
PADDED = "reads outputs of attention, or of a layer with padding"


@pytest.mark.parametrize(
    ("layer", "padding", "length", "claim", "said"),
    [
        (gru, "valid", N + 2, True, f"on windows of {N + 2} steps"),
        (gru, "valid", N, False, f"depends on {N + 2} steps, and the model's windows have {N}"),
        (gru, "causal", N, False, f"a recurrent layer with a window {PADDED}"),
        (gru, "causal", N + 2, False, f"a recurrent layer with a window {PADDED}"),
        ("attention", "valid", N + 2, True, f"on windows of {N + 2} steps"),
        ("attention", "causal", N + 2, False, "attention attends to the outputs of other"),
        (AVERAGE, "valid", N + 2, True, f"on windows of {N + 2} steps"),
        (AVERAGE, "causal", N + 2, False, f"a pooling of the whole window {PADDED}"),
    ],
)
def test_what_it_says_of_layers_on_convolutions_is_so(random, layer, padding, length, claim, said):
    """Layers with a window of N rows, on the rows of a convolution of 3 steps."""
    inputs = keras.Input((length, E))
    model = keras.Model(inputs, convolved(padding, layer)(inputs))
    streaming = ct.convert(model, N, recurrence="window", warm_up="partial")
    found = ct.explain(streaming)
    assert found.equals_windows == claim
    assert said in found.windows
    x = random.standard_normal((2, 4 * N, E)).astype("float32")
    steps = np.asarray(streaming.call_steps(x))
    for end in (2 * N + 2, 4 * N):
        rows = model(x[:, end - length : end])
        assert np.allclose(steps[:, end - 1], rows, rtol=1e-4, atol=1e-5) == claim
