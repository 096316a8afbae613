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


def test_a_decoder_of_today_streams():
    example = runpy.run_path(str(EXAMPLES / "models" / "decoder.py"))
    keras.utils.set_random_seed(1)
    for options in (
        dict(),
        dict(query_key_norm=True, logit_soft_cap=20.0, use_sinks=True),
    ):
        model = example["build"](features=32, heads=4, blocks=2, window=7, **options)
        error, _ = example["compare"](model, steps=40)
        assert error < 5e-6


@pytest.mark.parametrize("name", ["conformer", "watch"])
def test_a_model_of_examples_equals_itself_on_the_whole_recording(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "models")
    example = runpy.run_path(str(EXAMPLES / "models" / f"{name}.py"))
    keras.utils.set_random_seed(1)
    if name == "conformer":
        model, recording = example["build"](24, 2, 1, 5), example["recording"](seconds=2)
    else:
        random = np.random.default_rng(1)
        model = example["build"](features=8, heads=2, window=16)
        recording = random.normal(size=(1, 80, 6)).astype("float32")
    result = example["compare"](model, recording, seq_len=16)
    assert result.error < 2e-5
    assert result.block == (1280 if name == "conformer" else 2)


def test_a_keyword_spotter_equals_itself_on_windows():
    example = runpy.run_path(str(EXAMPLES / "models" / "keyword_spotter.py"))
    keras.utils.set_random_seed(1)
    error, _ = example["compare"](example["build"](8, 1, 2, 3, window=12), steps=20)
    assert error < 5e-6


def test_oad_tr_with_its_decoder_equals_itself_on_windows():
    example = runpy.run_path(str(EXAMPLES / "models" / "oad_tr.py"))
    keras.utils.set_random_seed(1)
    error, _ = example["compare"](example["build"](8, 2, 3, 4, 1, window=6, inputs=5), steps=10)
    assert error < 5e-6
