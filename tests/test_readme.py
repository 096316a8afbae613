"""Every snippet of the README: the Python runs here, the commands run here or in .ci/run.

The snippets of some pages of docs/ run here too. Those of docs/serving.md are in
tests/serving/test_serving_page.py.
"""

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from continual_transformers_tf import cli
from snippets import snippets_of

ROOT = Path(__file__).parent.parent


SNIPPETS = snippets_of(ROOT / "README.md")


def test_python_snippets_run_one_after_the_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # They may write files.
    python = [code for language, code in SNIPPETS if language == "python"]
    assert len(python) >= 2
    namespace = {}
    for code in python:
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (1, 2)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("page", ["install.md", "layers.md", "sessions.md", "threads_and_state.md"])
def test_the_snippets_of_a_page_run(monkeypatch, tmp_path, page):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for language, code in snippets_of(ROOT / "docs" / page):
        if language == "python":
            exec(compile(code, page, "exec"), namespace)
    assert "ct" in namespace


def test_commands_run():
    assert {language for language, _ in SNIPPETS} == {"python", "bash"}
    pages = [*SNIPPETS, *snippets_of(ROOT / "docs" / "install.md")]
    commands = [
        line for language, code in pages if language == "bash" for line in code.splitlines()
    ]
    in_ci = (ROOT / ".ci" / "run").read_text()
    packaging = (ROOT / "tests" / "test_packaging.py").read_text()
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "continual-transformers":
            assert CliRunner().invoke(cli.main, arguments).exit_code == 0
        elif program == "make":
            assert f"step {command}\n" in in_ci
        else:
            assert f'"""`{command}`' in packaging  # The docstring of the test that does it.
