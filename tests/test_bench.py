"""The race: that it runs, says who is missing, and that all rivals compute the same."""

import importlib.util
import json

import numpy as np
import pytest
from click.testing import CliRunner

from continual_transformers_tf.bench import race, report
from continual_transformers_tf.bench.rivals import MODULES
from continual_transformers_tf.bench.sizes import TABLE, Size, goals
from continual_transformers_tf.cli import main

NEEDS = {"torch": "continual", "onnx": "onnxruntime"}


def installed(name):
    return importlib.util.find_spec(NEEDS.get(MODULES[name], "tensorflow")) is not None


@pytest.mark.slow
def test_a_quick_race(tmp_path):
    paths = {name: tmp_path / name for name in ("all.json", "page.md", "picture.png")}
    result = CliRunner().invoke(main, [
        "bench", "--quick", "--rounds", "1", "--threads", "1",
        "--only", "ours", "--only", "read_bound", "--only", "onnxruntime",
        "--json", str(paths["all.json"]), "--markdown", str(paths["page.md"]),
        "--picture", str(paths["picture.png"]),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(paths["all.json"].read_text())
    for entry in found["results"]:
        assert {"ours", "read_bound"} <= set(entry["rivals"])
        assert 0 < entry["rivals"]["read_bound"]["median"] < entry["rivals"]["ours"]["median"]
    assert (found["missing"] == {}) == installed("onnxruntime")
    if found["missing"]:
        assert "onnxruntime did not take part" in result.output
        assert "pip install '.[bench]'" in result.output
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("ours", "read_bound")])
def test_every_rival_computes_the_same(name):
    if not installed(name):
        pytest.skip(f"{NEEDS[MODULES[name]]} is not installed: pip install '.[bench]'")
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
