"""Every snippet of the README: the Python runs here, the commands run here or in .ci/run.

tests/test_docs_pages.py runs those of docs/.
"""

import shlex
from pathlib import Path

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


def test_commands_run():
    assert {language for language, _ in SNIPPETS} == {"python", "bash"}
    commands = [
        line for language, code in SNIPPETS if language == "bash" for line in code.splitlines()
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
