"""LiteRT files: their steps give what a session gives, with the state in the caller's hands."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers as kl

import continual_transformers_tf as ct
import reference
from continual_transformers_tf.models.lowering import lower
from continual_transformers_tf.models.plan_in_tensorflow import PlanStep
from model_case import BOUNDS, N
from model_cases import CASES, D, E, H
from plan_files import PlanFile, attention_only_plan, attention_plan, many_ports_plan
from streamed import packed

pytestmark = pytest.mark.sampled(3, rest="slow")

litert = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="the extra test has ai-edge-litert"
)

STEPS = 200


class Stream:
    """A stream of a LiteRT file."""

    def __init__(self, path):
        self.interpreter = litert.Interpreter(str(path), num_threads=1)
        self.run = self.interpreter.get_signature_runner("step")
        self.inputs = self.run.get_input_details()
        self.state = {
            name: np.zeros(part["shape"], part["dtype"])
            for name, part in self.inputs.items()
            if name.startswith("state_")
        }

    def step(self, **inputs):
        """Take a step, and return all outputs but the state, by name."""
        outputs = self.run(**inputs, **self.state)
        for name, part in self.state.items():
            new = outputs.pop(name)
            assert (new.shape, new.dtype) == (part.shape, part.dtype)
            self.state[name] = new
        return outputs

    @property
    def ops(self):
        """The names of the file's ops. An op that is not built in has the name CUSTOM or FlexX."""
        return {op["op_name"] for op in self.interpreter._get_ops_details()}


def of_session(session, inputs, **options):
    """Take a step of a session's first stream, and return its outputs by name."""
    structure = json.loads(session._plan_json)["input_structure"]
    outputs = keras.tree.flatten(session.step(packed(structure, inputs), **options))
    return dict(zip([spec.name for spec in session.outputs], outputs, strict=True))


def outside(dtype):
    """Return the dtype of a file's tensor: browsers have these two only."""
    return np.float32 if dtype.kind == "f" else np.int32


def steps_of(session, inputs):
    """Yield the inputs of each step, from arrays (1, T, ...): the session's, and the file's."""
    for t in range(inputs[0].shape[1]):
        step = [x[:, t].astype(s.dtype) for x, s in zip(inputs, session.inputs, strict=True)]
        narrow = [x.astype(outside(x.dtype)) for x in step]
        yield step, dict(zip([spec.name for spec in session.inputs], narrow, strict=True))


def check_stream(session, path, inputs, bound, mask_of=lambda t: None):
    """Compare all steps of a file with a session's."""
    stream = Stream(path)
    expected, got = [], []
    for t, (step, by_name) in enumerate(steps_of(session, inputs)):
        has_key = mask_of(t)
        if has_key is None:
            expected.append(of_session(session, step))
            got.append(stream.step(**by_name))
        else:
            expected.append(of_session(session, step, key_mask=[has_key]))
            got.append(stream.step(**by_name, key_mask=np.array([has_key], np.int32)))
        ready = got[-1].pop("ready")
        assert ready.dtype == np.int32
        assert ready == session.ready()
    assert session.ready().all()
    for name in expected[0]:
        y, x = (np.stack([step[name] for step in steps]) for steps in (got, expected))
        assert y.shape == x.shape
        assert y.dtype == outside(x.dtype)
        if x.dtype.kind in "biu":
            np.testing.assert_array_equal(y, x)
        else:
            assert reference.relative_error(x, y) < bound, name
    return stream


# Models for every kind of state, input and output. The other cases are below.
FEW = [
    "co_si_first_query_sliding",
    "co_re_gate",
    "stack_retroactive_2",
    "positions_learned",
    "delay_int32",
    "demo",
    "inputs_by_name",
    "several_tokens_a_step",
    "masked_query_that_waits",
    "masked_self_attention",
    "convolutions",
    "recurrent",
    "pooling_of_the_window",
    "co_si_everything",
    "rotary_embedding",
]


@pytest.mark.sampled(5, rest="slow")
@pytest.mark.parametrize("name", FEW)
def test_a_file_gives_what_a_session_gives(random, tmp_path, name):
    case = CASES[name]
    model = case.build()
    ct.export_litert(model, tmp_path / "model.tflite", seq_len=case.seq_len)
    # A file's caches and weights are in float32, so those of the session are too.
    wide = lower(model, case.seq_len).plan["compute_dtype"]
    session = ct.Session(model, seq_len=case.seq_len, cache_dtype=wide, weights_dtype=wide)
    inputs = case.inputs(model, random, (1, STEPS))
    stream = check_stream(session, tmp_path / "model.tflite", inputs, 2 * BOUNDS["float32"])
    assert not {op for op in stream.ops if op.startswith(("CUSTOM", "Flex"))}


# Conversion takes seconds.
@pytest.mark.slow
@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [n for n in CASES if n not in FEW])
def test_every_model_gives_what_its_session_gives(random, tmp_path, name):
    test_a_file_gives_what_a_session_gives(random, tmp_path, name)


# Models that take a block of steps at once.


def strided_model():
    x = keras.Input((None, E))
    y = kl.Conv1D(E, 3, 2, "causal", activation="relu")(x)
    y = kl.LSTM(E, return_sequences=True)(kl.MaxPooling1D(2, 1)(y))
    y = ct.CoSiMultiHeadAttention(3, H, D, single_output=False)(y)
    return keras.Model(x, kl.Dense(3)(y))


def chunked_model():
    x = keras.Input((None, E))
    y = kl.Conv1D(E, 3, padding="causal")(x)
    y = y + ct.CoChunkedMultiHeadAttention(3, 2, H, D)(kl.LayerNormalization()(y))
    y = kl.DepthwiseConv1D(3)(kl.ZeroPadding1D((2, 0))(y))
    y = kl.Dense(4)(kl.GRU(5, return_sequences=True)(y))
    return keras.Model(x, y)


def attention_before_strides():
    """A model whose attention, positions and masks are of several rows in each step."""
    x = keras.Input((None, E))
    y = kl.Masking(0.5)(ct.CircularPositionalEncoding(7, E)(x))
    y = y + ct.CoSiMultiHeadAttention(
        5,
        4,
        6,
        value_dim=3,
        single_output=False,
        num_key_value_heads=2,
        rotary=ct.Rotary(size=4),
        position_bias=ct.ALiBi(),
        use_sinks=True,
        logit_soft_cap=3.0,
    )(y, y, use_causal_mask=True)
    y = kl.GRU(E, return_sequences=True)(ct.RotaryEmbedding()(y))
    y = kl.GroupQueryAttention(4, 4, 2, sliding_window=4)(y, y, use_causal_mask=True)
    return keras.Model(x, kl.Conv1D(4, 3, 3, padding="causal")(y))


@pytest.mark.parametrize(
    ("make", "block"), [(strided_model, 2), (chunked_model, 3), (attention_before_strides, 3)]
)
def test_a_block_of_steps(random, tmp_path, make, block):
    keras.utils.set_random_seed(5)
    session = ct.Session(ct.convert(make(), 3, warm_up="partial"))
    assert session.block == block
    ct.export_litert(session, tmp_path / "model.tflite")
    x = random.standard_normal((1, 60, block, E))
    stream = check_stream(session, tmp_path / "model.tflite", [x], 2 * BOUNDS["float32"])
    assert tuple(stream.inputs[session.inputs[0].name]["shape"]) == (1, block, E)
    assert stream.state["state_position"] == 60


@pytest.mark.parametrize("gaps", [False, True])
def test_several_rows_far_into_a_stream(random, tmp_path, gaps):
    """An int32 position begins again where every ring is at its first row."""
    keras.utils.set_random_seed(5)
    session = ct.Session(ct.convert(attention_before_strides(), 5, warm_up="partial"))
    path = tmp_path / "model.tflite"
    ct.export_litert(session, path, key_mask=gaps)
    old, young = Stream(path), Stream(path)
    rounds = 5 * 7  # Of windows and of the table.
    x = random.standard_normal((100, 1, 3, E)).astype("float32")
    x[random.random(x.shape[:3]) < 0.2] = 0.5  # Masked rows.
    has_key = random.random((100, 1)) > 0.2 * gaps
    (name,), (output,) = ([spec.name for spec in s] for s in (session.inputs, session.outputs))
    for t in range(100):
        if t == 40:
            old.state["state_position"] += np.int32((2**31 - 1 - 40 - 20) // rounds * rounds)
        more = {"key_mask": has_key[t].astype("int32")} if gaps else {}
        got, expected = (stream.step(**{name: x[t]}, **more)[output] for stream in (old, young))
        np.testing.assert_array_equal(got, expected)
        of_session = session.step(x[t], **({"key_mask": has_key[t]} if gaps else {}))
        np.testing.assert_allclose(of_session, got.reshape(of_session.shape), atol=2e-5)
    assert old.state["state_position"] < 2**31 - 200  # It began again.


# Every function of every op, in hand-made plans.

FEATURES = 6


def branches_plan(random, nodes):
    """x -> each of some nodes -> the outputs y_0, y_1, ...

    Args:
        nodes: Tuples of (op, weights, attributes), with one input and output `[6]`.
    """
    plan = PlanFile()
    x = plan.input("x", FEATURES)
    for i, (op, weights, attributes) in enumerate(nodes):
        plan.output(f"y_{i}", plan.node(op, [x], plan.value(FEATURES), weights, **attributes))
    plan.plan["output_structure"] = list(range(len(nodes)))
    return plan


NUMBERS = {
    "celu": dict(alpha=1.5), "elu": dict(alpha=0.5), "hard_shrink": dict(threshold=0.4),
    "leaky_relu": dict(negative_slope=0.3), "soft_shrink": dict(threshold=0.4),
    "squareplus": dict(b=4.0), "threshold": dict(threshold=0.2, value=-3.0),
}  # fmt: skip
RELUS = [
    dict(negative_slope=slope, max_value=most, threshold=threshold)
    for slope in (0.0, 0.2)
    for most in (None, 0.9)
    for threshold in (0.0, 0.3, -0.3)
]
OF_POSITIVE = {"log", "log1p", "sqrt", "rsqrt"}
OF_LESS_THAN_ONE = {"arccos", "arcsin", "arctanh"}
OTHERS = [
    "exponential", "gelu", "gelu_tanh", "hard_sigmoid", "hard_silu", "hard_tanh", "linear",
    "log_sigmoid", "mish", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign",
    "sparse_plus", "sparse_sigmoid", "tanh", "tanh_shrink", "absolute", "cos", "negative",
    "reciprocal", "sign", "sin", "square", "arcsinh", "arctan", "cbrt", "ceil", "cosh", "erf",
    "erfc", "expm1", "floor", "round", "sinc", "sinh", "tan", "trunc",
]  # fmt: skip


def functions(random, domain):
    """Return the nodes of functions of any number, or of one of the smaller domains."""
    if domain != "any":
        names = {"positive": OF_POSITIVE, "below_one": OF_LESS_THAN_ONE, "above_one": {"arccosh"}}
        return [("activation", {}, dict(function=name)) for name in sorted(names[domain])]
    weights = {"alpha": random.standard_normal(FEATURES).astype("float32")}
    nodes = [("activation", weights, dict(function="prelu"))]
    nodes += [("activation", {}, dict(function="relu", **numbers)) for numbers in RELUS]
    nodes += [
        ("activation", {}, dict(function=f, **NUMBERS.get(f, {}))) for f in [*NUMBERS, *OTHERS]
    ]
    features = {name: random.uniform(0.5, 2, FEATURES).astype("float32") for name in ("a", "b")}
    scaled = {"gamma": features["a"], "beta": features["b"]}
    for function in ("softmax", "log_softmax", "sparsemax"):
        nodes.append(("softmax", {}, dict(function=function, axis=0)))
    for function in ("layer", "rms", "unit"):
        nodes.append(("norm", scaled, dict(function=function, epsilon=1e-3)))
    nodes.append(("norm", {}, dict(function="layer", epsilon=1e-3)))
    nodes.append(("affine", {"scale": features["a"], "offset": features["b"]}, {}))
    moments = {"mean": features["a"], "variance": features["b"]}
    nodes.append(("batch_norm", moments, dict(epsilon=1e-3)))
    nodes.append(("batch_norm", moments | scaled, dict(epsilon=1e-3)))
    return nodes


DOMAINS = ("any", "positive", "below_one", "above_one")


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_function_of_an_element_or_row(random, tmp_path, domain):
    plan = branches_plan(random, functions(random, domain))
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    x = 2 * random.standard_normal((1, 40, FEATURES))
    if domain != "any":
        x = np.exp(4 * x)  # Small numbers too, of which log1p must keep the digits.
    if domain == "below_one":
        # Not 1 itself: there LiteRT's arctanh is 44 with AVX2, and infinite with AVX-512.
        x = np.sign(random.standard_normal(x.shape)) * np.minimum(x / (1.01 + x), 1 - 1e-6)
    if domain == "above_one":
        x += 1
    session, stream = plan.session(), Stream(tmp_path / "model.tflite")
    for step, by_name in steps_of(session, [x]):
        expected, got = of_session(session, step), stream.step(**by_name)
        for i, node in enumerate(plan.plan["nodes"]):
            np.testing.assert_allclose(
                got[f"y_{i}"], expected[f"y_{i}"], rtol=1e-5, atol=3e-6 * (domain == "any"),
                err_msg=str(node["attributes"]),
            )  # fmt: skip


def binary_plan(random):
    plan = PlanFile()
    shape = (2, 3, 4)
    x, y = plan.input("x", *shape), plan.input("y", *shape)
    made = []
    for function in (
        "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "arctan2", "equal",
        "fmod", "greater", "greater_equal", "hypot", "logaddexp", "mod", "not_equal",
    ):  # fmt: skip
        made.append(plan.node("binary", [x, y], plan.value(*shape), function=function))
    for function in ("sum", "mean", "max", "min", "product", "argmax", "argmin"):
        for axis in range(3):
            rest = shape[:axis] + shape[axis + 1 :]
            made.append(plan.node("reduce", [x], plan.value(*rest), function=function, axis=axis))
    for axis in range(3):
        total = [n * (2 if i == axis else 1) for i, n in enumerate(shape)]
        made.append(plan.node("concat", [x, y], plan.value(*total), axis=axis))
        made.append(
            plan.node("softmax", [x], plan.value(*shape), function="log_softmax", axis=axis)
        )
    for out, offset, strides in [
        ((4, 3, 2), 0, (1, 4, 12)),  # Transposed.
        ((3, 2, 4), 0, (4, 12, 1)),
        ((2, 2), 4, (12, 1)),  # Sliced.
        ((3, 4), 12, (4, 1)),
        ((2, 4), 4, (12, 1)),
        ((4,), 23, (-3,)),  # Flipped.
        ((5, 4), 8, (0, 1)),  # Broadcast.
        ((4, 5), 8, (1, 0)),
        ((2, 2, 2), 1, (12, 8, 2)),
        ((1, 1), 7, (0, 9)),
        ((), 5, ()),
    ]:
        made.append(
            plan.node("strided", [x], plan.value(*out), offset=offset, strides=list(strides))
        )
    for axis in range(3):
        for op, options in [
            ("cumulative", dict(function="sum")),
            ("cumulative", dict(function="product")),
            ("sort", dict(function="values", descending=False)),
            ("sort", dict(function="indices", descending=True)),
            ("sort", dict(function="indices", descending=False)),
        ]:
            made.append(plan.node(op, [x], plan.value(*shape), axis=axis, **options))
    other = plan.node("reshape", [y], plan.value(2, 4, 3))
    made.append(plan.node("matmul", [x, other], plan.value(2, 3, 3)))
    rows = plan.node("reshape", [x], plan.value(8, 3))
    for outputs, stride, dilation, several in ((3, 2, 1, 1), (2, 1, 3, 2), (6, 1, 1, 1)):
        weights = {"kernel": random.standard_normal((3, 3 * several)).astype("float32")}
        if several > 1:
            weights["bias"] = random.standard_normal(3 * several).astype("float32")
        made.append(
            plan.node(
                "depthwise", [rows], plan.value(outputs, 3 * several), weights, stride=stride,
                dilation=dilation,
            )
        )  # fmt: skip
    condition = plan.node("cast", [x], plan.value(*shape, dtype="bool"))
    made.append(plan.node("where", [condition, y, x], plan.value(*shape)))
    made.append(plan.node("reshape", [x], plan.value(4, 6)))
    table = random.standard_normal((2, 3, 4)).astype("float32")
    made.append(plan.node("constant", [], plan.value(*shape), {"value": table}))
    made.append(plan.node("cast", [x], plan.value(*shape, dtype="int32")))
    made.append(plan.node("cast", [x], plan.value(*shape, dtype="bool")))
    made.append(plan.node("cast", [made[-2]], plan.value(*shape, dtype="int64")))
    flags = plan.node("strided", [made[-2]], plan.value(1, dtype="bool"), offset=3, strides=[1])
    for any_ in (False, True):
        mask = plan.node("not_equal", [x], plan.value(1, dtype="bool"), value=0.0, any=any_)
        made.append(plan.node("mask_and", [mask, flags], plan.value(1, dtype="bool")))
        made.append(plan.node("masked", [y, mask], plan.value(*shape)))
    flag = plan.node("not_equal", [flags], plan.value(1, dtype="bool"), value=1.0, any=True)
    made.append(plan.node("delay", [flag], plan.value(1, dtype="bool"), steps=3))
    made.append(plan.node("delay", [y], plan.value(*shape), steps=1))
    for i, value in enumerate(made):
        plan.output(f"y_{i}", value)
    plan.plan["input_structure"] = [0, 1]
    plan.plan["output_structure"] = list(range(len(made)))
    return plan


def test_every_op_of_several_axes(random, tmp_path):
    plan = binary_plan(random)
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    x, y = 3 * random.standard_normal((2, 1, 20, 2, 3, 4))
    x = np.abs(x)
    x[0, ::3] = 0  # For the masks.
    x[0, ::2, 0] = 0
    y[0, :, 1, 1] = np.where(y[0, :, 1, 1] == 0, 1, y[0, :, 1, 1])
    session, stream = plan.session(), Stream(tmp_path / "model.tflite")
    for step, by_name in steps_of(session, [x, y]):
        step[1][0, 0, 0, 0] = by_name["y"][0, 0, 0, 0] = np.nan  # `masked` must not let it through.
        expected, got = of_session(session, step), stream.step(**by_name)
        for i in range(len(expected)):
            a, b = got[f"y_{i}"], expected[f"y_{i}"]
            assert a.dtype == outside(b.dtype)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=f"y_{i}")


def test_every_op_is_tested():
    from continual_transformers_tf.models.plan_in_tensorflow.op_table import OPS

    random = np.random.default_rng(1)
    used = {}
    plans = [branches_plan(random, functions(random, domain)).plan for domain in DOMAINS]
    plans.append(binary_plan(random).plan)
    plans.append(lower(ct.convert(chunked_model(), warm_up="partial")).plan)
    plans += [lower(CASES[name].build(), CASES[name].seq_len).plan for name in FEW]
    for node in (node for plan in plans for node in plan["nodes"]):
        used.setdefault(node["op"], set()).add(node["attributes"].get("function"))
    assert set(used) == set(OPS)
    for name, op in OPS.items():
        assert op.functions is None or op.functions == used[name], name


def test_every_op_of_a_model_file_is_there():
    from continual_transformers_tf.models.plan_in_tensorflow.op_table import OPS

    table = Path(__file__).parents[1] / "docs/model_file.md"
    nodes = table.read_text().split("## The nodes")[1].split("## Fingerprints")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", nodes, re.M)) == set(OPS)
    functions = nodes.split("**`activation`.** Functions")[1].split("\n### ")[0]
    named = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*`[^)]*\)", "", functions)))
    assert set(OPS["activation"].functions) <= named
    assert named - set(OPS["activation"].functions) <= {"value"}


SPECIAL = [
    [1, np.nan, 3, np.nan, -np.inf, 2], [np.inf, np.nan, np.inf, 0, 0, -1],
    [-np.inf, -np.inf, np.inf, np.inf, 5, 5], [np.nan] * 6,
]  # fmt: skip


def test_nan_and_infinity_in_order(tmp_path):
    nodes = [
        ("sort", {}, dict(function=function, axis=0, descending=descending))
        for function in ("values", "indices")
        for descending in (False, True)
    ]
    plan = branches_plan(None, nodes)
    for function in ("argmax", "argmin"):
        made = plan.node("reduce", [0], plan.value(), function=function, axis=0)
        plan.output(f"y_{len(plan.plan['outputs'])}", made)
    plan.plan["output_structure"] = list(range(len(plan.plan["outputs"])))
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    session, stream = plan.session(), Stream(tmp_path / "model.tflite")
    for x in np.array(SPECIAL, "float32")[:, np.newaxis]:
        expected, got = of_session(session, [x]), stream.step(x=x)
        for name, y in expected.items():
            # An infinity is as large as a NaN here, so only the sorted values are in order.
            if name in ("y_2", "y_3") and np.isnan(x).any():
                continue
            if name in ("y_0", "y_1"):
                finite = np.isfinite(y)
                np.testing.assert_array_equal(got[name][finite], y[finite], err_msg=name)
                np.testing.assert_array_equal(np.isnan(got[name]).sum(), np.isnan(y).sum())
            else:
                np.testing.assert_array_equal(got[name], y, err_msg=name)


# Recurrent cells and rotary positions, in hand-made plans.

CELLS = {
    "simple": (1, "tanh", "sigmoid"),
    "gru": (3, "softsign", "hard_sigmoid"),
    "gru_reset_before": (3, "tanh", "sigmoid"),
    "lstm": (4, "tanh", "sigmoid"),
}


@pytest.mark.parametrize("goes_on", [False, True])
def test_recurrent_cells(random, tmp_path, goes_on):
    """Cells of several rows, with and without rows before the stream, biases and masks."""
    rows, units = 3, 4
    plan = PlanFile(receptive_field=5)
    keep = plan.input("keep", rows, dtype="bool")
    outputs = []
    for name, (gates, activation, gate) in CELLS.items():
        x = plan.input(name, rows, gates * units)
        size = gates * units
        weights = {"kernel": random.standard_normal((units, size)).astype("float32")}
        if name != "gru_reset_before":
            weights["bias"] = random.standard_normal(size).astype("float32")
        options = dict(function=name, activation=activation, gate=gate, goes_on=goes_on)
        for first, masks in ((0, {}), (-4 * goes_on, {"step": keep})):
            outputs.append(
                plan.node(
                    "recurrent", [x], plan.value(rows, units), weights, masks, first=first,
                    **options,
                )
            )  # fmt: skip
    for i, value in enumerate(outputs):
        plan.output(f"y_{i}", value)
    plan.plan["input_structure"] = list(range(len(CELLS) + 1))
    plan.plan["output_structure"] = list(range(len(outputs)))
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    inputs = [random.random((1, 60, rows)) < 0.8]
    inputs += [random.standard_normal((1, 60, rows, g * units)) for g, _, _ in CELLS.values()]
    stream = check_stream(plan.session(), tmp_path / "model.tflite", inputs, 1e-5)
    assert ("state_0_state" in stream.state) == goes_on


def test_rotary_angles_are_exact_far_into_a_stream(random, tmp_path):
    """The angles are those of any position, also beyond 2^31 steps and in the browser's int32."""
    turns = random.integers(-(2**63), 2**63 - 1, 40)
    turns[:4] = 1, -1, 2**63 - 1, 2**62
    plan = PlanFile()
    x = plan.input("x", 1)
    angles = plan.node("rotary_angles", [], plan.value(2, 40), {"turns": turns})
    plan.output("x", x)
    plan.output("angles", angles)
    plan.plan["output_structure"] = [0, 1]
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    stream, session = Stream(tmp_path / "model.tflite"), plan.session()
    one = np.zeros((1, 1), "float32")
    assert {part.dtype for part in stream.state.values()} == {np.dtype("int32")}
    for _ in range(20):
        got, expected = stream.step(x=one)["angles"], of_session(session, [one])["angles"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-7)
    for position in (2**31 - 3, 10**12, 2**61 + 12345):
        exact = [position * int(turn) % 2**64 for turn in turns]
        limbs = [[angle >> 16 * i & 0xFFFF for angle in exact] for i in range(4)]
        stream.state["state_0_angles"] = np.array(limbs, np.int32)
        for step in range(5):
            exact = [(position + step) * int(turn) % 2**64 for turn in turns]
            radians = np.array(exact, "float64") * (2 * np.pi / 2**64)
            got = stream.step(x=one)["angles"][0]
            np.testing.assert_allclose(got[0], np.cos(radians), rtol=0, atol=3e-7)
            np.testing.assert_allclose(got[1], np.sin(radians), rtol=0, atol=3e-7)


# The three kinds of weights.


def wide_model():
    """A model whose kernels are large enough for LiteRT to round them."""
    x = keras.Input((16, 24))
    y = ct.CoSiTransformerEncoder(16, 64, 4, 128, key_dim=16)(kl.Dense(64)(x))
    return keras.Model(x, kl.Dense(5)(y[:, -1]))


def test_narrow_weights(random, tmp_path):
    keras.utils.set_random_seed(3)
    model = wide_model()
    session, x = ct.Session(model), random.standard_normal((1, STEPS, 24))
    sizes = {}
    # The largest error over the largest output. Session's own int8 is held to 2e-2.
    for weights, bound in {"float32": 1e-5, "float16": 2e-3, "int8": 5e-2}.items():
        path = tmp_path / f"{weights}.tflite"
        ct.export_litert(model, path, weights=weights)
        check_stream(session, path, [x], bound)
        session.clean_state()
        sizes[weights] = path.stat().st_size
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.4 * sizes["float32"]


# State.


def test_two_streams_of_a_file_are_independent(random, tmp_path):
    plan = attention_plan(random)
    path = tmp_path / "model.tflite"
    ct.export_litert(plan.write(tmp_path), path)
    x = random.standard_normal((2, 11, 6)).astype("float32")
    session, streams = plan.session(), [Stream(path), Stream(path)]
    streams[1].interpreter = streams[0].interpreter  # One interpreter, two states.
    streams[1].run = streams[0].run
    for t in range(x.shape[1]):
        expected = session.step(x[:, t])
        for i in range(2):
            np.testing.assert_allclose(
                streams[i].step(x=x[i : i + 1, t])["y"][0], expected[i], rtol=1e-5, atol=1e-5
            )


def test_a_nan_leaves_with_its_step(random, tmp_path):
    plan = attention_only_plan(window=4, size=4)
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    session, stream = plan.session(), Stream(tmp_path / "model.tflite")
    x = random.standard_normal((12, 1, 4)).astype("float32")
    x[5] = np.nan
    for t in range(12):
        y = stream.step(x=x[t])["y"]
        assert np.isnan(y).any() == (5 <= t < 9)
        np.testing.assert_allclose(y, session.step(x[t]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "retroactive"])
def test_gaps_that_the_caller_marks(random, tmp_path, kind):
    layer = CASES["co_si_gate" if kind == "attention" else "co_re_gate"].build()
    ct.export_litert(layer, tmp_path / "model.tflite", key_mask=True)
    session, stream = ct.Session(layer), Stream(tmp_path / "model.tflite")
    rows = []
    for t in range(60):
        x = random.standard_normal((1, E)).astype("float32")
        has_key = (
            t > 1 and t % 7 not in (0, 3) and not 40 <= t < 46
        )  # The first have no key at all.
        y = session.step(x, key_mask=[has_key])
        rows.append((stream.step(x=x, key_mask=np.array([has_key], np.int32))["y"], y))
    got, expected = (np.stack(part) for part in zip(*rows, strict=True))
    assert reference.relative_error(expected, got) < 1e-5


@pytest.mark.parametrize("op", ["attention", "retroactive_attention"])
def test_a_gap_may_hold_a_nan(random, tmp_path, op):
    plan = attention_only_plan(window=4, size=4)
    if op == "retroactive_attention":
        (node,) = plan.plan["nodes"]
        node["op"] = op
        node["attributes"] = dict(heads=1, window=4, scale=0.5, algorithm="auto")
        plan.plan["values"][node["outputs"][0]]["shape"] = [4, 4]
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite", key_mask=True)
    session, stream = plan.session(), Stream(tmp_path / "model.tflite")
    x = random.standard_normal((12, 1, 4)).astype("float32")
    x[[0, 4]] = np.nan
    for t in range(12):
        has_key = t not in (0, 4)
        y = stream.step(x=x[t], key_mask=np.array([has_key], np.int32))["y"]
        # A NaN query gives NaN, but zeros if there is no key.
        expected = session.step(x[t], key_mask=[has_key])
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6, err_msg=str(t))
        assert np.isfinite(y).all() or t >= 4 or op != "attention"


def test_a_stream_outlives_the_largest_position(random, tmp_path):
    """An int32 would overflow after 25 days of 1,000 steps a second."""
    model = CASES["demo"].build()
    path = tmp_path / "model.tflite"
    ct.export_litert(model, path)
    old, young = Stream(path), Stream(path)
    rounds = N * (2 * N - 1)  # The steps after which every ring is at its first row again.
    x = random.standard_normal((80, 1, E)).astype("float32")
    for t in range(40):
        young.step(x=x[t])
        old.step(x=x[t])
    old.state["state_position"] += np.int32((2**31 - 1 - 40) // rounds * rounds)
    start = int(old.state["state_position"][0])
    assert 0 < 2**31 - 1 - start < 40
    for t in range(40, 80):
        got, expected = old.step(x=x[t]), young.step(x=x[t])
        np.testing.assert_array_equal(got["y"], expected["y"])
        assert got["ready"]
    assert 0 < old.state["state_position"] < start


def test_rings_without_a_common_multiple(random, tmp_path):
    """Then the position counts in int64."""
    plan = PlanFile(receptive_field=5)
    x = plan.input("x", 2)
    for rows in (1009, 1013, 1019, 1021):
        table = random.standard_normal((rows, 2)).astype("float32")
        weights = {"rows": table, "start": np.array(3, np.int64)}
        x = plan.node("positional", [x], plan.value(2), weights)
    plan.output("y", x)
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    stream = check_stream(
        plan.session(), tmp_path / "model.tflite", [random.standard_normal((1, 9, 2))], 1e-5
    )
    assert stream.state["state_position"].dtype == np.int64


@pytest.mark.parametrize("gaps", [False, True])
def test_rows_of_the_window(random, tmp_path, gaps):
    """Attention of all rows, from the first step on: rows that were never taken are zeros."""
    window, size = 5, 4
    plan = PlanFile(receptive_field=window)
    x = plan.input("x", size)
    rows = plan.node("window", [x], plan.value(window, size), window=window)
    # A logarithm makes infinities of rows that were never taken.
    logs = plan.node("activation", [rows], plan.value(window, size), function="log")
    made = [
        plan.node(
            "retroactive_attention", [x, x, x], plan.value(window, size),
            heads=2, window=window, scale=0.7, algorithm="auto",
        ),
        plan.node("zero_untaken", [logs], plan.value(window, size)),
    ]  # fmt: skip
    for queries, band, causal in [(5, 0, False), (5, 2, False), (5, 0, True), (2, 2, True)]:
        newest = plan.node(
            "strided", [rows], plan.value(queries, size),
            offset=(window - queries) * size, strides=[size, 1],
        )  # fmt: skip
        made.append(
            plan.node(
                "window_attention", [newest, logs, logs], plan.value(queries, size),
                heads=2, scale=0.7, band=band, causal=causal,
            )
        )  # fmt: skip
    for i, value in enumerate(made):
        plan.output(f"y_{i}", value)
    plan.plan["output_structure"] = list(range(len(made)))
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite", key_mask=gaps)
    x = np.exp(random.standard_normal((1, 30, size)))
    mask_of = (lambda t: t not in (0, 1, 7, 12, 13, 14, 15, 16)) if gaps else lambda t: None
    check_stream(plan.session(), tmp_path / "model.tflite", [x], 1e-5, mask_of)


# What it takes.


def test_a_model_file_a_session_and_a_keras_file(random, tmp_path):
    model = CASES["inputs_by_name"].build()
    session = ct.Session(model)
    session.save(tmp_path / "model.safetensors")
    model.save(tmp_path / "model.keras")
    files = []
    for given in (model, session, tmp_path / "model.safetensors", str(tmp_path / "model.keras")):
        ct.export_litert(given, tmp_path / "model.tflite")
        files.append(Stream(tmp_path / "model.tflite"))
    step = {s.name: np.ones((1, *s.shape), s.dtype) for s in session.inputs}
    first, *others = [stream.step(**step) for stream in files]
    for outputs in others:
        assert set(outputs) == set(first) == {"z", "newest", "again", "ready"}
        for name, y in outputs.items():
            np.testing.assert_array_equal(y, first[name])


def test_names_are_those_of_the_session(tmp_path):
    plan, _ = many_ports_plan(np.random.default_rng(1))
    ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite")
    stream = Stream(tmp_path / "model.tflite")
    assert set(stream.inputs) == {"sound", "word", "state_position", "state_0_ring"}
    assert set(stream.run.get_output_details()) == {
        "sum", "late", "ready", "state_position", "state_0_ring"
    }  # fmt: skip
    with pytest.raises((RuntimeError, ValueError)):  # There is no such row.
        stream.step(sound=np.zeros((1, 3), "float32"), word=np.array([7], "int32"))


# What it refuses.


def test_wrong_arguments(tmp_path):
    model, path = CASES["co_si_gate"].build(), tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="Expected weights to be one of .*'int8'.*but got 'int4'"):
        ct.export_litert(model, path, weights="int4")
    with pytest.raises(ValueError, match="Expected no seq_len, .* are fixed, but got 3"):
        ct.export_litert(ct.Session(model), path, seq_len=3)
    with pytest.raises(FileNotFoundError):
        ct.export_litert(tmp_path / "none.safetensors", path)
    with pytest.raises(FileNotFoundError):
        ct.export_litert(model, tmp_path / "none" / "model.tflite")
    with pytest.raises(TypeError, match="Expected a Keras model, .* of a model file, but got 3"):
        ct.export_litert(3, path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("names", "kind", "name"),
    [
        (("state_x", "y"), "input", "state_x"),
        (("key_mask", "y"), "input", "key_mask"),
        (("x", "ready"), "output", "ready"),
        (("x", "state_0"), "output", "state_0"),
    ],
)
def test_names_that_the_step_itself_has(tmp_path, names, kind, name):
    plan = PlanFile()
    plan.output(names[1], plan.input(names[0], 2))
    with pytest.raises(
        ValueError, match=f"Expected no {kind} named '{name}', a name that the step"
    ):
        ct.export_litert(plan.write(tmp_path), tmp_path / "model.tflite", key_mask=True)


def test_models_that_do_not_stream(tmp_path):
    x = keras.Input((N, E))
    model = keras.Model(x, kl.Bidirectional(kl.LSTM(3, return_sequences=True))(x), name="stuck")
    with pytest.raises(ValueError, match="stuck cannot be run by a session:\n- ") as refused:
        ct.export_litert(model, tmp_path / "model.tflite")
    with pytest.raises(ValueError, match="stuck cannot be run by a session:\n- ") as by_session:
        ct.Session(model)
    assert str(refused.value) == str(by_session.value)


def test_nodes_that_litert_cannot_express(random):
    plan = attention_plan(random)
    plan.plan["nodes"][0]["op"] = "unheard_of"
    plan.plan["nodes"][-2]["attributes"]["function"] = "unheard_of"
    with pytest.raises(ValueError, match="plan cannot be exported to LiteRT:") as refused:
        PlanStep(plan.plan, plan.tensors)
    said = str(refused.value)
    assert re.search(r"\n- dense_0 \(unheard_of\) cannot be expressed in LiteRT's built-in", said)
    assert re.search(r"\n- binary_\d \(binary 'unheard_of'\) cannot be expressed", said)
