"""examples/real_data runs with a few training steps; its README has the real figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "real_data" / "compare.py"


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
