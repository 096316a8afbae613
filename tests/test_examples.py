"""The examples run. That of examples/real_data takes only a few training steps here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "real_data" / "compare.py"


@pytest.mark.slow
@pytest.mark.parametrize("data", ["smartwatch", "vowels"])
def test_stacks_on_real_recordings(tmp_path, data):
    if data == "vowels":
        pytest.importorskip("aeon", reason="the extra examples is not installed")
    options = ["--only", data, "--scale", "0.01", "--recordings", "2", "--output", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "real_data.json").read_text())[data]
    assert set(figures) == {
        "regular, on windows", "retroactive, streamed", "single_output, streamed"
    }  # fmt: skip
    assert figures["regular, on windows"]["differ_from_the_stream"] == 0
    assert figures["regular, on windows"]["predictions"] > 0
    assert (tmp_path / "real_data.png").stat().st_size > 0


@pytest.fixture
def example(monkeypatch):
    """Return a function that gives the names of a script of examples/models."""
    monkeypatch.syspath_prepend(EXAMPLES / "models")
    keras.utils.set_random_seed(1)
    return lambda name: runpy.run_path(str(EXAMPLES / "models" / f"{name}.py"))


def test_a_decoder_of_today_streams(example):
    decoder = example("decoder")
    tokens = np.random.default_rng(1).integers(0, 1000, (1, 40)).astype("int32")
    for options in (
        dict(),
        dict(query_key_norm=True, logit_soft_cap=20.0, use_sinks=True),
    ):
        model = decoder["build"](features=32, heads=4, blocks=2, window=7, **options)
        assert decoder["compare"](model, tokens).error < 5e-6


@pytest.mark.parametrize(("name", "block"), [("conformer", 1280), ("watch", 2)])
def test_a_model_of_examples_equals_itself_on_the_whole_recording(example, name, block):
    names = example(name)
    if name == "conformer":
        model, recording = names["build"](24, 2, 1, 5), names["recording"](seconds=2)
    else:
        random = np.random.default_rng(1)
        model = names["build"](features=8, heads=2, window=16)
        recording = random.normal(size=(1, 80, 6)).astype("float32")
    result = names["compare"](model, recording, seq_len=16)
    assert result.error < 2e-5
    assert result.block == block


def test_a_keyword_spotter_equals_itself_on_windows(example):
    spotter = example("keyword_spotter")
    rows = np.random.default_rng(1).normal(size=(1, 20, 40)).astype("float32")
    model = spotter["build"](8, 1, 2, 3, window=12)
    assert spotter["compare_first_window"](model, rows).error < 5e-6


def test_oad_tr_with_its_decoder_equals_itself_on_windows(example):
    oad_tr = example("oad_tr")
    video = np.random.default_rng(1).normal(size=(1, 10, 5)).astype("float32")
    model = oad_tr["build"](8, 2, 3, 4, 1, window=6, inputs=5)
    assert oad_tr["compare_first_window"](model, video).error < 5e-6
