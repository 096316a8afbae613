"""The examples run. That of examples/real_data takes only a few training steps here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
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
