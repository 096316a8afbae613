"""Tests of the races: they run, report missing rivals, and all rivals compute the same."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from continual_transformers_tf.bench import (
    goal,
    layer_report,
    model_race,
    model_report,
    model_rivals,
    race,
    report,
    session_goals,
    worker_process,
)
from continual_transformers_tf.bench import rounds as timing
from continual_transformers_tf.bench.goal import Goal
from continual_transformers_tf.bench.model_rivals import MODEL_MODULES
from continual_transformers_tf.bench.rivals import MODULES, RETROACTIVE
from continual_transformers_tf.bench.sizes import (
    MODEL_QUICK,
    MODEL_TABLE,
    RETROACTIVE_TABLE,
    TABLE,
    ModelSize,
    Size,
    bound_goal,
    model_bound_goal,
)
from continual_transformers_tf.cli import main
from continual_transformers_tf.native import cpu_targets

NEEDS = {"torch": "continual", "onnx": "onnxruntime", "sequence_layers": "sequence_layers"}
MODEL_NEEDS = {**NEEDS, "torch": "torch"}
BUILD_PROGRAMS = Path(__file__).parent.parent / "tools" / "build_benchmarks.py"


def installed(name):
    return (
        importlib.util.find_spec(NEEDS.get({**MODULES, **RETROACTIVE}[name], "tensorflow"))
        is not None
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return the folder of the C++ programs."""
    folder = tmp_path_factory.mktemp("programs")
    runpy.run_path(str(BUILD_PROGRAMS))["build"](folder)
    return folder


@pytest.mark.slow
def test_a_quick_race(programs, tmp_path):
    paths = {name: tmp_path / name for name in ("all.json", "page.md", "picture.png")}
    names = ("session", "bound", "onnxruntime", "retroactive_session", "retroactive_bound")
    result = CliRunner().invoke(main, [
        "bench", "--layers", "--quick", "--avx2", "--rounds", "2", "--programs", str(programs),
        *(word for name in (*names, "attention") for word in ("--only", name)),
        "--json", str(paths["all.json"]), "--markdown", str(paths["page.md"]),
        "--picture", str(paths["picture.png"]),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    everything = json.loads(paths["all.json"].read_text())
    found = everything["layers"]
    for entry in found["results"]:
        prefix = "retroactive_" if entry["part"] == "retroactive" else ""
        ours = entry["rivals"][f"{prefix}session"]
        assert ours["least"] <= ours["median"] <= ours["most"]
        if entry["threads"] == 1:
            assert 0 < entry["rivals"][f"{prefix}bound"]["median"] < ours["median"]
        else:
            assert entry["speedup"] > 0
    assert {entry["part"] for entry in found["results"]} == {"table", "retroactive"}
    assert (found["missing"] == {}) == installed("onnxruntime")
    page = paths["page.md"].read_text()
    if found["missing"]:
        assert "onnxruntime did not take part" in result.output
        assert "pip install 'continual-transformers-tf[bench]'" in result.output
        assert "onnxruntime" in page
    for held in found["memory"]:
        assert held["ring"] < held["state"] < held["ring"] + 4000
    assert [entry["dtype"] for entry in found["attention"]] == list(race.CACHE_DTYPES)
    for text in ("## Attention alone", "N=8 H=2 D=8 int8, in L2", "`retroactive_session` over"):
        assert text in page
    assert paths["picture.png"].stat().st_size > 10_000
    more = cpu_targets()[1].startswith("AVX3")
    assert ("layers_avx2" in everything) == ("on AVX2" in page) == more
    assert more or "--avx2 changes nothing" in result.output


def test_an_unknown_rival_is_refused():
    result = CliRunner().invoke(main, ["bench", "--only", "nobody"])
    assert result.exit_code == 2
    assert "onnxruntime" in result.output


def figures(*rounds):
    return timing.figures(list(rounds))


def test_a_ratio_is_the_median_of_those_of_the_rounds():
    # The machine was three times as slow in the second round.
    rivals = {"session": figures(10, 30, 10), "bound": figures(8, 24, 9)}
    assert timing.ratio(rivals, "session", "bound") == 1.25
    assert rivals["session"] == dict(median=10, least=10, most=30, rounds=[10, 30, 10])


def test_a_contestant_that_fails_drops_out():
    class Worker:
        def __init__(self, *answers):
            self.answers = list(answers)

        def ask(self, what, **arguments):
            return self.answers.pop(0)

    steady = Worker({"median": 2}, {"median": 4}, {"median": 3})
    ends = Worker({"median": 1}, {"error": "its process ended with status -9"})
    problems = {}
    found = timing.take({"a": steady, "b": ends}, 3, {}, lambda name: None, problems)
    assert found == {"a": timing.figures([2, 4, 3])}
    assert problems == {"b": {"error": "its process ended with status -9"}}


def layers_with(size, rivals, threads=1, part="table", **more):
    return dict(part=part, threads=threads, size=size._asdict(), rivals=rivals, **more)


def named_goals(checked):
    return {(name, goal.what): (goal.goal, goal.reached) for name, goal in checked}


def test_goals_of_layers_are_those_of_the_issue():
    small, large = Size(64, 128, 4), Size(64, 1024, 8)
    rings, odd = Size(256, 512, 8, streams=256), Size(64, 99, 3)
    assert {small, large, rings, odd} <= set(TABLE)
    assert {size.head for size in TABLE} >= {12, 24, 33}
    rivals = {"session": figures(12), "bound": figures(10), "onnxruntime": figures(25),
              "torch_sdpa": figures(15)}  # fmt: skip
    narrow = {"session_bfloat16": figures(7), "session_int8": figures(5)}
    found = {
        "results": [
            layers_with(small, rivals | narrow),
            layers_with(large, rivals | narrow),
            layers_with(odd, {"session": figures(12), "onnxruntime": figures(30)}),
            layers_with(rings, {**rivals, **narrow}),
            layers_with(rings, {"session": figures(7)}, threads=2, speedup=1.7),
        ]
    }
    over = "`session` over `bound`"
    assert named_goals(layer_report.check_goals(found)) == {
        (str(small), over): (1.25, True),
        (str(small), "`onnxruntime` over `session`"): (2, True),
        (str(small), "`torch_sdpa` over `session`"): (1, True),
        (str(large), over): (1.1, False),
        (str(large), "`onnxruntime` over `session`"): (2, True),
        (str(large), "`torch_sdpa` over `session`"): (1, True),
        (str(large), "`session_bfloat16` over `session`"): (0.6, True),
        (str(large), "`session_int8` over `session`"): (0.4, False),
        (str(rings), over): (1.3, True),
        (str(rings), "`onnxruntime` over `session`"): (2, True),
        (str(rings), "`torch_sdpa` over `session`"): (1, True),
        (str(rings), "`session_bfloat16` over `session`"): (0.6, True),
        (str(rings), "`session_int8` over `session`"): (0.4, False),
        (str(rings), "`session`, two threads over one"): (1.8, False),
    }
    assert bound_goal(Size(120, 192, 16)) == 1.25
    assert bound_goal(Size(64, 128, 4, streams=32)) == 1.3


def test_goals_of_retroactive_layers_and_of_attention_alone():
    size = RETROACTIVE_TABLE[-1]
    assert [size.seq_len for size in RETROACTIVE_TABLE] == [64, 128, 256, 512]
    rivals = {"retroactive_session": figures(10), "retroactive_bound": figures(4),
              "retroactive_keras": figures(50)}  # fmt: skip
    entry = dict(size=dict(seq_len=64, heads=8, head=64), dtype="int8", far=True, median=1.2,
                 bound=1, ratio=1.2)  # fmt: skip
    found = {"results": [layers_with(size, rivals, part="retroactive")], "attention": [entry]}
    assert named_goals(layer_report.check_retroactive_goals(found)) == {
        (str(size), "`retroactive_keras` over `retroactive_session`"): (4, True),
        (str(size), "`retroactive_session` over `retroactive_bound`"): (2, False),
    }
    ((name, goal),) = layer_report.check_attention_goals(found)
    assert name == "N=64 H=8 D=64 int8, beyond the last-level cache"
    assert (goal.goal, goal.reached) == (1.15, False)


def test_a_table_of_goals_has_those_of_avx2_beside_them():
    reached = Goal("`session` over `bound`", 1.25, 1.2, False, "×")
    lines = goal.table_lines("size", [("a", reached), ("b", reached)], [
        ("a", reached._replace(measured=1.3))
    ])  # fmt: skip
    assert lines[0] == "| size |  | goal | measured |  | on AVX2 |  |"
    assert lines[2].endswith("| ≤ 1.25× | 1.2× | reached | 1.3× | **not reached** |")
    assert lines[3].endswith("| 1.2× | reached |  |  |")
    assert goal.summary([("a", reached), ("b", reached._replace(measured=2))]) == (
        "1 of 2 goals were reached."
    )


def test_only_our_contestants_run_on_another_target():
    names = model_race.contestants((), 1, own=True)
    assert names == ["session", "session_cpp", "bound"]
    large = [planned for planned in race.races(False, (1, 2), ()) if planned.size == TABLE[-1]]
    assert [planned.threads for planned in large] == [1, 2]
    assert not {"keras_recompute", "continual_inference"} & {*large[0].names}
    assert {*race.OWN} <= {*MODULES, *RETROACTIVE}


def test_the_headline_needs_models(tmp_path):
    picture = str(tmp_path / "headline.png")
    result = CliRunner().invoke(main, ["bench", "--layers", "--headline", picture])
    assert result.exit_code == 2
    assert "--headline shows whole models: add --models" in result.output
    (tmp_path / "found.json").write_text("{}")
    result = CliRunner().invoke(
        main, ["bench", "--from-json", str(tmp_path / "found.json"), "--headline", picture]
    )
    assert result.exit_code == 1
    assert "Expected results of a model of one stream" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, module in {**MODULES, **RETROACTIVE}.items()
        if module != "native" and not name.endswith("session")
    ],
)
def test_every_rival_computes_the_same(name):
    if not installed(name):
        pytest.skip(
            f"{NEEDS[MODULES[name]]} is missing: pip install 'continual-transformers-tf[bench]'"
        )
    size = Size(20, 24, 3, streams=2)
    outputs = []
    for taking_part in ("retroactive_session" if name in RETROACTIVE else "session", name):
        rival = worker_process.Rival(taking_part, 1)
        assert rival.ask("prepare", size=size) == {}
        for _ in range(size.seq_len + 3):
            answer = rival.ask("outputs")
        outputs.append(np.array(answer["outputs"]))
        rival.stop()
    assert outputs[0].shape == ((2, 20, 24) if name in RETROACTIVE else (2, 24))
    bound = {"session_bfloat16": 0.02, "session_int8": 0.04}.get(name, 1e-5)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=bound)


@pytest.mark.slow
def test_a_quick_race_of_whole_models(programs, tmp_path):
    files = ("all.json", "page.md", "picture.png", "headline.png")
    paths = {name: tmp_path / name for name in files}
    names = ("session", "session_cpp", "kernels", "bound", "tf_function", "keras_windows")
    result = CliRunner().invoke(main, [
        "bench", "--models", "--session", "--quick", "--rounds", "1",
        "--programs", str(programs), *(word for name in names for word in ("--only", name)),
        "--json", str(paths["all.json"]), "--markdown", str(paths["page.md"]),
        "--picture", str(paths["picture.png"]), "--headline", str(paths["headline.png"]),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(paths["all.json"].read_text())
    # Nothing is missing, so every contestant's outputs matched the reference.
    assert found["models"]["missing"] == found["session"]["missing"] == {}
    for entry in found["models"]["results"]:
        alone = entry["threads"] == 1
        assert set(entry["rivals"]) == {
            name for name in names if alone or name not in model_rivals.ONE_THREAD
        }
        assert all(figures["median"] > 0 for figures in entry["rivals"].values())
    # With one core, two threads are not compared.
    assert len(session_goals.goals(found["session"])) in (13, 14)
    page = paths["page.md"].read_text()
    for text in ("## Whole models", "`session` less `session_cpp`", "first step of a stream"):
        assert text in page
    assert paths["picture.png"].stat().st_size > 10_000
    assert paths["headline.png"].stat().st_size > 5_000
    again = CliRunner().invoke(main, ["bench", "--from-json", str(paths["all.json"])])
    assert again.exit_code == 0
    # Run one part again, and keep the results of another.
    del found["session"]
    paths["all.json"].write_text(json.dumps(found))
    again = CliRunner().invoke(main, [
        "bench", "--session", "--quick", "--programs", str(programs), "--from-json",
        str(paths["all.json"]),
    ])  # fmt: skip
    assert "open a stream, 10 held" in again.output
    assert "session less session_cpp" in again.output


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, module in MODEL_MODULES.items() if module != "native"])
@pytest.mark.parametrize("size", MODEL_QUICK, ids=str)
def test_every_contestant_computes_the_reference(name, size, tmp_path):
    needed = MODEL_NEEDS.get(MODEL_MODULES[name], "tensorflow")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'continual-transformers-tf[bench]'")
    contestant = worker_process.Rival(name, 1, model_race.WORKER)
    if name == "session":
        packer = worker_process.Rival("packer", 1, model_race.WORKER)
        assert packer.ask("pack", size=size, directory=str(tmp_path)) == {}
        packer.stop()
    assert contestant.ask("prepare", size=size, directory=str(tmp_path)) == {}
    answer = contestant.ask("check")
    contestant.stop()
    assert answer["positions"] == (name != "sequence_layers")
    assert model_race.compare(size, answer) == {}
    # A wrong output is noticed.
    answer["outputs"][-1][-1] += 0.01
    assert "expected at most 0.0001" in model_race.compare(size, answer)["error"]
    answer["outputs"][0][0] = float("nan")
    assert "error of nan" in model_race.compare(size, answer)["error"]


def test_the_reference_of_a_model_is_the_streaming_model():
    from continual_transformers_tf.bench.model_rivals.tensorflow_models import streaming_model

    size = MODEL_QUICK[1]
    model = streaming_model(size)
    steps = size.receptive_field + 3
    for step in range(steps):
        outputs = model.call_step(model_rivals.inputs_of(size)[step]).numpy()
    rows = model_rivals.checked_rows(size)
    assert rows == [0, size.streams - 1]
    np.testing.assert_allclose(
        outputs[rows], model_rivals.reference(size, steps), rtol=0, atol=1e-5
    )
    without = model_rivals.reference(size, steps, positions=False)
    assert np.abs(without - outputs[rows]).max() > 0.01


def test_models_without_programs_say_how_to_build_them(tmp_path):
    found = model_race.run((1,), 1, True, ("bound",), tmp_path, lambda *_: None)
    assert "tools/build_benchmarks.py" in found["missing"]["bound"]["missing"]
    assert "tools/build_benchmarks.py" in str(session_goals.run(True, tmp_path)["missing"])
    # A report without results is not an error.
    page = report.markdown({"models": found})
    assert "bound did not take part: there is no " in page
    assert "### Goals" not in page


def test_goals_of_models_are_those_of_the_issue():
    medians = dict(session=10.5, session_cpp=10.2, bound=8, onnxruntime=62, torch_ring=15)
    rivals = {name: figures(median) for name, median in medians.items()}
    entry = dict(threads=1, size=MODEL_TABLE[1]._asdict(), rivals=rivals, python=0.5)
    checked = model_report.check_goals({"results": [entry, {**entry, "threads": 2}]})
    assert named_goals(checked) == {
        (str(MODEL_TABLE[1]), "`session_cpp` over `bound`"): (1.25, False),
        (str(MODEL_TABLE[1]), "`onnxruntime` over `session`"): (2, True),
        (str(MODEL_TABLE[1]), "`torch_ring` over `session`"): (1, True),
        (str(MODEL_TABLE[1]), "`session` less `session_cpp`"): (1, True),
    }
    assert checked[1][1].cells()[2] == "5.9×: 7.75× over `bound`"
    many = dict(threads=1, size=MODEL_TABLE[4]._asdict(), rivals=rivals)
    two = dict(many, threads=2, speedup=1.9)
    found = named_goals(model_report.check_goals({"results": [many, two]}))
    assert found[str(MODEL_TABLE[4]), "`session_cpp` over `bound`"] == (1.3, True)
    assert found[str(MODEL_TABLE[4]), "`session_cpp`, two threads over one"] == (1.8, True)
    # The smallest model has no goal against its bound: most of its step is calls.
    assert model_bound_goal(MODEL_TABLE[0]) is None


def test_sizes_of_models():
    size = ModelSize(1, 64, 32, 64, 4, 3)
    assert (size.head, size.position_rows, size.receptive_field) == (16, 127, 190)
    assert str(size) == "M=1 N=64 F=32 E=64 H=4 L=3"
