"""The exit status that Bazel gets for a file of tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN_PYTEST = Path(__file__).parent / "run_pytest.py"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ("def test(): pass", 0),
        ("def test(): assert False", 1),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test(): pass", 0),
        ("import pytest\ndef test(): pytest.skip('alone')", 0),
        ("", 5),
        ("raise ValueError", 2),
    ],
    ids=["passes", "fails", "module skipped", "test skipped", "no tests", "error"],
)
def test_status_of_a_file(tmp_path, content, status):
    file = tmp_path / "test_it.py"
    file.write_text(content)
    # Without plugins it starts in half the time.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    result = subprocess.run(
        [sys.executable, RUN_PYTEST, file],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stdout
