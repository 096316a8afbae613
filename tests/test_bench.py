"""Tests of the races: they run, report missing rivals, and all rivals compute the same."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from continual_transformers_tf.bench import (
    model_race,
    model_report,
    model_rivals,
    race,
    report,
    session_goals,
)
from continual_transformers_tf.bench.model_rivals import MODEL_MODULES
from continual_transformers_tf.bench.rivals import MODULES
from continual_transformers_tf.bench.sizes import (
    MODEL_QUICK,
    MODEL_TABLE,
    TABLE,
    ModelSize,
    Size,
    goals,
)
from continual_transformers_tf.cli import main

NEEDS = {"torch": "continual", "onnx": "onnxruntime", "sequence_layers": "sequence_layers"}
MODEL_NEEDS = {**NEEDS, "torch": "torch"}
BUILD_PROGRAMS = Path(__file__).parent.parent / "tools" / "build_benchmarks.py"


def installed(name):
    return importlib.util.find_spec(NEEDS.get(MODULES[name], "tensorflow")) is not None


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return the folder of the C++ programs."""
    folder = tmp_path_factory.mktemp("programs")
    runpy.run_path(str(BUILD_PROGRAMS))["build"](folder)
    return folder


@pytest.mark.slow
def test_a_quick_race(tmp_path):
    paths = {name: tmp_path / name for name in ("all.json", "page.md", "picture.png")}
    result = CliRunner().invoke(main, [
        "bench", "--layers", "--quick", "--rounds", "1", "--threads", "1",
        "--only", "ours", "--only", "read_bound", "--only", "onnxruntime",
        "--json", str(paths["all.json"]), "--markdown", str(paths["page.md"]),
        "--picture", str(paths["picture.png"]),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(paths["all.json"].read_text())["layers"]
    for entry in found["results"]:
        assert {"ours", "read_bound"} <= set(entry["rivals"])
        assert 0 < entry["rivals"]["read_bound"]["median"] < entry["rivals"]["ours"]["median"]
    assert (found["missing"] == {}) == installed("onnxruntime")
    if found["missing"]:
        assert "onnxruntime did not take part" in result.output
        assert "pip install 'continual-transformers-tf[bench]'" in result.output
        assert "onnxruntime" in paths["page.md"].read_text()
    for held in found["memory"]:
        assert held["ring"] < held["state"] < held["ring"] + 1000
    assert paths["picture.png"].stat().st_size > 10_000


def test_an_unknown_rival_is_refused():
    result = CliRunner().invoke(main, ["bench", "--only", "nobody"])
    assert result.exit_code == 2
    assert "onnxruntime" in result.output


def test_goals_are_those_of_the_table():
    assert goals(Size(64, 128, 4))["keras_recompute"] == 25
    assert goals(Size(4096, 1024, 16))["keras_recompute"] == 60
    assert goals(Size(64, 1024, 8))["continual_inference"] == 3
    assert goals(Size(64, 128, 4, streams=256))["ours_apart"] == 4
    figures = {"median": 10, "least": 9, "most": 11}
    rivals = {"ours": figures, "torch_sdpa": {**figures, "median": 15}}
    entry = dict(part="table", threads=1, size=TABLE[0]._asdict(), rivals=rivals)
    assert report.check_goals({"results": [entry]}) == [(TABLE[0], "torch_sdpa", 2, 1.5)]


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
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("ours", "read_bound")])
def test_every_rival_computes_the_same(name):
    if not installed(name):
        pytest.skip(
            f"{NEEDS[MODULES[name]]} is missing: pip install 'continual-transformers-tf[bench]'"
        )
    size = Size(20, 24, 3, streams=2)
    outputs = []
    for taking_part in ("ours", name):
        rival = race.Rival(taking_part, 1)
        assert rival.ask("prepare", size=size) == {}
        for _ in range(size.seq_len + 3):
            answer = rival.ask("outputs")
        outputs.append(np.array(answer["outputs"]))
        rival.stop()
    bound = 0.05 if name == "ours_bfloat16" else 1e-5
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
    for text in ("## Whole models", "`session_cpp` over `bound`", "first step of a stream"):
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
    assert "keras_windows over session" in again.output


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, module in MODEL_MODULES.items() if module != "native"])
@pytest.mark.parametrize("size", MODEL_QUICK, ids=str)
def test_every_contestant_computes_the_reference(name, size, tmp_path):
    needed = MODEL_NEEDS.get(MODEL_MODULES[name], "tensorflow")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install 'continual-transformers-tf[bench]'")
    contestant = race.Rival(name, 1, model_race.WORKER)
    if name == "session":
        packer = race.Rival("packer", 1, model_race.WORKER)
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
    def figures(median):
        return {"median": median, "least": median, "most": median}

    medians = dict(session=10.5, session_cpp=10, bound=8, onnxruntime=62, torch_ring=262)
    medians.update(sequence_layers=53, keras_windows=1000)
    rivals = {name: figures(median) for name, median in medians.items()}
    entry = dict(threads=1, size=MODEL_TABLE[1]._asdict(), rivals=rivals, python=0.5)
    checked = model_report.check_goals({"results": [entry, {**entry, "threads": 2}]})
    assert [(goal.what, goal.goal, goal.reached) for _, goal in checked] == [
        ("`onnxruntime` over `session`", 6, False),
        ("`torch_ring` over `session`", 25, False),
        ("`sequence_layers` over `session`", 5, True),
        ("`keras_windows` over `session`", 100, False),
        ("`session_cpp` over `bound`", 1.4, True),
        ("`session` less `session_cpp`", 1, True),
    ]
    assert all(size == MODEL_TABLE[1] for size, _ in checked)
    assert checked[0][1].cells()[2] == "5.9×: 7.75× over `bound`"
    many = dict(entry, size=MODEL_TABLE[4]._asdict())
    found = {goal.what: goal.goal for _, goal in model_report.check_goals({"results": [many]})}
    assert found["`onnxruntime` over `session`"] == 3
    assert found["`torch_ring` over `session`"] == 2
    assert found["`sequence_layers` over `session`"] == 4
    assert found["`session_cpp` over `bound`"] == 1.7
    assert "`keras_windows` over `session`" not in found


def test_sizes_of_models():
    size = ModelSize(1, 64, 32, 64, 4, 3)
    assert (size.head, size.position_rows, size.receptive_field) == (16, 127, 190)
    assert str(size) == "M=1 N=64 F=32 E=64 H=4 L=3"
