"""Every snippet of docs/ runs: the blocks of a page one after the other, in an empty folder.

The language of a block says what a reader does with it, and what happens here:

- python and bash: it runs.
- Any language with a title, as in `cpp title="stream.cc"`: it is written to that file.
- console, with a `$` before each command: it is shown. It installs something, takes long, or needs
  a machine with a GPU. Its targets of make and its extras must exist.
- Others show a file or a format.

Two pages need a server: tests/serving/test_serving_page.py runs them.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from continual_transformers_tf import cli
from snippets import titled_snippets_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
WITH_A_SERVER = {"serving.md", "how-to/server.md"}
RUN = {
    name: snippets
    for name, path in PAGES.items()
    if name not in WITH_A_SERVER and (snippets := titled_snippets_of(path))
}
# Pages that take seconds.
LONG = {"concepts/warm_up.md", "how-to/cpp.md", "how-to/keras_model.md", "how-to/phone.md"}
NOTEBOOK = DOCS / "start" / "first_stream.ipynb"


def run_bash(code):
    """Run commands with this Python's `continual-transformers`."""
    lines = code.splitlines()
    if all(line.startswith("continual-transformers ") for line in lines):
        for line in lines:  # In this process, which has imported TensorFlow already.
            result = CliRunner().invoke(cli.main, line.split()[1:])
            assert result.exit_code == 0, result.output
        return
    for program in ("g++", "pkg-config"):
        if f"{program} " in code and shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in LONG else ()) for page in RUN]
)
def test_the_snippets_of_a_page_run(monkeypatch, tmp_path, page):
    for language, _, code in RUN[page]:
        for package, extra in {"torch": "torch", "ai_edge_litert": "test"}.items():
            imports = re.search(rf"^(import|from) {package}\b", code, re.MULTILINE)
            if language == "python" and imports:
                pytest.importorskip(package, reason=f"the extra {extra} is not installed")
    monkeypatch.chdir(tmp_path)  # They may write files.
    namespace = {}
    for language, title, code in RUN[page]:
        if title:
            (tmp_path / title).write_text(code)
        elif language == "python":
            exec(compile(code, page, "exec"), namespace)
        elif language == "bash":
            run_bash(code)


def test_every_how_to_begins_with_the_problem_and_has_code():
    for name, path in PAGES.items():
        if name.startswith("how-to/") and not name.endswith("index.md"):
            title, problem = path.read_text().split("\n\n")[:2]
            assert title.startswith("# "), name
            assert re.match(r"[A-Z][^\n]*\.$", problem), name
            assert any(snippet.language == "python" for snippet in titled_snippets_of(path)), name


def test_commands_that_are_only_shown_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    shown = [
        line
        for path in PAGES.values()
        for language, _, code in titled_snippets_of(path)
        if language == "console"
        for line in code.splitlines()
    ]
    assert len(shown) >= 3
    for line in shown:
        assert line.startswith("$ "), line
        for names in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(names.split(",")) <= extras, line
        if line.startswith("$ make "):
            assert line.split()[2] in targets, line


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    program = tmp_path / "notebook.py"
    program.write_text("\n\n".join(code))
    namespace = runpy.run_path(str(program))
    assert namespace["accuracy"] > 0.8
    assert (tmp_path / "machine.safetensors").exists()


def test_the_notebook_is_small():
    # Its outputs are stored, so that readers see them. They are text and one picture.
    assert NOTEBOOK.stat().st_size < 150_000
