"""Tests of the race of examples and stacks: its bounds, its contestants' outputs, its report."""

import importlib.util
import itertools

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import build_benchmarks
import continual_transformers_tf as ct
import example_benchmark
import example_worker
import layer_stacks
import plan_bound
from continual_transformers_tf.bench.worker_process import Rival
from plan_bound import Part


def parts_of(model, tmp_path, **options):
    """Return (ops, parts) of the instructions of a session of a model."""
    session = ct.Session(model, **options)
    session.save(tmp_path / "model.safetensors")
    profile = session.profile(repeat=1)
    plan = plan_bound.read_plan(tmp_path / "model.safetensors")
    return [row.op for row in profile], plan_bound.parts_of(plan, [row.name for row in profile])


def test_parts_of_attention(tmp_path):
    steps = keras.Input((None, 12))
    attention = keras.layers.MultiHeadAttention(2, 5, value_dim=3, sliding_window=7)
    y = attention(steps, steps, use_causal_mask=True)
    model = keras.Model(steps, keras.layers.LayerNormalization()(y))
    ops, parts = parts_of(model, tmp_path, seq_len=7)
    found = dict(zip(ops, parts, strict=True))
    assert found["norm"] == []
    # Seven keys of 10 numbers, and values of 6.
    assert found["attention"] == [Part(0, 4 * 7 * 16, 7 * 16)]
    products = [
        part for op, of_op in zip(ops, parts, strict=True) if "dense" in op for part in of_op
    ]
    expected = [(12, 10), (12, 10), (12, 6), (6, 12)]
    assert sorted(products) == sorted(Part(4 * i * o, 0, i * o) for i, o in expected)


def test_parts_of_rows_and_recurrence(tmp_path):
    steps = keras.Input((None, 3))
    x = keras.layers.Conv1D(5, 2, padding="causal")(steps)
    x = keras.layers.LSTM(4, return_sequences=True)(x)
    # Two rows in a step.
    x = keras.layers.Conv1D(6, 2, strides=2, padding="causal")(x)
    ops, parts = parts_of(keras.Model(steps, x), tmp_path)
    assert [part for of_op in parts for part in of_op] == [
        Part(4 * 6 * 5, 0, 2 * 6 * 5),
        Part(4 * 5 * 16, 0, 2 * 5 * 16),
        Part(4 * 4 * 16, 0, 2 * 4 * 16),
        Part(4 * 8 * 6, 0, 8 * 6),
    ]
    assert parts[ops.index("recurrent")] == [Part(4 * 4 * 16, 0, 2 * 4 * 16)]


def test_parts_of_retroactive_attention_and_of_few_queries(tmp_path):
    window = keras.Input((9, 8))
    stack = ct.TransformerEncoder(2, 9, 8, 2, 16, key_dim=4, kind="retroactive")
    ops, parts = parts_of(keras.Model(window, stack(window)[:, -1]), tmp_path)
    # A row of queries in float, and of sums in double: as layer_benchmark.cc has it.
    assert parts[ops.index("retroactive_attention")] == [Part(0, 9 * 8 * 12, 4 * 9 * 8)]
    # The second block computes neither keys nor values: both heads read the 9 rows of 8.
    fused = parts[ops.index("dense + dense + window_attention")]
    assert fused == [Part(256, 0, 64), Part(0, 4 * 9 * 8, 2 * 2 * 9 * 8), Part(256, 0, 64)]
    rows = ct.CoReMultiHeadAttention(9, 2, 4)(window, window)
    y = keras.layers.MultiHeadAttention(2, 4)(ct.LearnedQueries(3, 8)(rows), rows)
    ops, parts = parts_of(keras.Model(window, y), tmp_path)
    fused = parts[ops.index("dense + dense + window_attention")]
    assert fused == [Part(256, 0, 192), Part(0, 4 * 9 * 8, 3 * 2 * 2 * 9 * 8), Part(256, 0, 192)]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (dict(band=0, causal=False), 3 * 7),
        (dict(band=0, causal=True), 5 + 6 + 7),
        (dict(band=2, causal=True), 3 * 2),
        (dict(band=2, causal=False), 3 + 3 + 2),
    ],
)
def test_pairs_of_queries_and_keys(attributes, expected):
    assert plan_bound._pairs(3, 7, attributes) == expected


def test_a_product_that_no_instruction_runs_is_an_error(tmp_path):
    steps = keras.Input((None, 3))
    ct.Session(keras.Model(steps, keras.layers.Dense(4, name="d")(steps))).save(tmp_path / "m")
    with pytest.raises(ValueError, match="none runs.*'d'"):
        plan_bound.parts_of(plan_bound.read_plan(tmp_path / "m"), [])


def test_every_example_is_raced():
    found = {path.stem for path in example_worker.EXAMPLES.glob("*.py")} - {"comparison", "speech"}
    assert found == set(example_benchmark.EXAMPLES)


@pytest.mark.parametrize("model", ["watch", *layer_stacks.STACKS])
def test_contestants_give_the_outputs_of_the_model(model, tmp_path):
    packed = example_worker.ExampleWorker("packer", 1).pack(model, str(tmp_path))
    shape, dtype = packed["shape"], packed["dtype"]
    assert len(packed["ops"]) == len(packed["parts"])
    contestant = example_worker.ExampleWorker("session", 1)
    contestant.prepare(model, str(tmp_path), shape, dtype)
    outputs = contestant.steps(example_worker.STEPS)["outputs"]
    assert example_benchmark.problem_of(outputs, packed["outputs"]) is None
    assert len(contestant.profile(1, 1)["microseconds"]) == len(packed["ops"])
    if model not in layer_stacks.STACKS:
        return
    if importlib.util.find_spec("sequence_layers") is None:
        pytest.skip("sequence_layers is not installed: it is in the extra bench")
    rival = Rival("sequence_layers", 1, example_benchmark.WORKER)
    arguments = dict(model=model, directory=str(tmp_path), shape=shape, dtype=dtype)
    assert rival.ask("prepare", **arguments) == {}
    outputs = rival.ask("steps", steps=example_worker.STEPS)["outputs"]
    rival.stop()
    assert example_benchmark.problem_of(outputs, packed["outputs"]) is None


def test_weights_have_the_places_of_sequence_layers():
    weights = layer_stacks.weights_of(layer_stacks.STACKS["encoder"].keras_model())
    found = layer_stacks.parameters(weights)["params"]
    size, features, heads = layer_stacks.KERNEL, layer_stacks.FEATURES, layer_stacks.HEADS
    head = features // heads
    assert found["convolve_1"]["depthwise"]["kernel"].shape == (size, 1, features)
    attention = found["attend_0"]["attention"]["query_key_value_projection"]
    assert attention["kernel"].shape == (features, 3, heads, head)
    assert attention["bias"].shape == (3, heads, head)
    np.testing.assert_array_equal(
        attention["kernel"][:, 1], weights["attend_0.attention/key/kernel"]
    )
    assert found["attend_0"]["attention_output"]["kernel"].shape == (heads, head, features)
    assert set(found["norm_0"]) == {"scale", "bias"}


def test_wrong_outputs_are_noticed():
    expected = [1.0, -2.0, 0.5]
    assert example_benchmark.problem_of([1.0001, -2.0001, 0.5], expected) is None
    for wrong in (1.01, float("nan")):
        problem = example_benchmark.problem_of([wrong, -2.0, 0.5], expected)
        assert "expected at most 0.0001" in problem
    assert example_benchmark.problem_of([1.0], expected) == "got 1 outputs, expected 3"


def test_goals_are_ratios_within_rounds():
    figures = {
        name: dict(rounds=[time * speed for speed in (1, 2, 5)])
        for name, time in (
            ("session", 12.0), ("session_cpp", 11.0), ("bound", 10.0), ("sequence_layers", 48.0)
        )
    }  # fmt: skip
    goals = example_benchmark.goals_of({"lstm": (figures, [])})
    assert [goal.measured for _, goal in goals] == pytest.approx([1.1, 4.0])
    assert [goal.reached for _, goal in goals] == [True, False]


def test_instructions_are_shown_by_what_they_cost_over_their_bound():
    rows = [
        ("dense", 5.0, 4.0), ("norm", 3.0, 0.0), ("dense", 5.0, 5.0), ("window", 0.1, 0.0),
        ("concat", 0.2, 0.0),
    ]  # fmt: skip
    found = example_benchmark.by_op(rows, 0.3)
    assert [row[:2] for row in found] == [("norm", 1), ("dense", 2), ("others", 2)]
    assert found[1] == ("dense", 2, 10.0, 9.0)
    assert found[2][2:] == pytest.approx((0.3, 0.0))
    lines = example_benchmark.parts_lines({"a model": ({}, rows)})
    assert lines[2].endswith("| norm | 1 | 3 | 0 | 23% |")


def test_without_programs_it_says_how_to_build_them(tmp_path):
    result = CliRunner().invoke(example_benchmark.main, ["--programs", str(tmp_path)])
    assert result.exit_code == 1
    assert "tools/build_benchmarks.py" in result.output


@pytest.mark.slow
def test_a_quick_race(tmp_path):
    build_benchmarks.build(tmp_path, [example_benchmark.PROGRAM])
    names = ["watch", "oad_tr"]  # The second one has two outputs.
    if importlib.util.find_spec("sequence_layers") is not None:
        names.append("lstm")
    options = itertools.chain.from_iterable(("--only", name) for name in names)
    result = CliRunner().invoke(
        example_benchmark.main,
        [*options, "--rounds", "1", "--seconds", "0.01", "--programs", str(tmp_path)],
    )
    assert result.exit_code == 0, result.output
    for name in names:
        assert f"| {name} | `session_cpp` over `bound` | ≤ 1.25×" in result.output
    assert "| watch | recurrent | 1 |" in result.output
    assert ("`sequence_layers` over `session`" in result.output) == ("lstm" in names)
