"""docs/serving.md: its snippets run, and its tables are complete. deploy/: its options exist.

The snippets of docs/how-to/server.md run too.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from continual_transformers_tf import cli
from continual_transformers_tf.serving import program
from snippets import snippets_of

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "serving.md"
SNIPPETS = snippets_of(PAGE)
GRPC, HTTP = "127.0.0.1:8001", "localhost:8000"


@pytest.fixture(scope="module")
def options():
    """The server's options: {name: default}."""
    said = subprocess.run([program.PATH, "--help"], check=True, capture_output=True, text=True)
    found = re.findall(
        r"^ +(?:-\w,)?(--[\w-]+)(?: [A-Z]+(?::NONNEGATIVE|:[A-Z]+ in \[.*?\])?(?:=(\S+))?)?",
        said.stdout,
        re.MULTILINE,
    )
    assert len(found) > 15
    return {name: default for name, default in found if name != "--help"}


def test_every_setting_has_its_row_and_its_default(options):
    rows = re.findall(r"^\| `(--[\w-]+)` \| (\S*) ?\|", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == options
    assert len(rows) == len(options)


def test_the_help_has_an_example_with_options_that_exist(options):
    said = subprocess.run([program.PATH, "--help"], check=True, capture_output=True, text=True)
    (example,) = re.findall(r"Example:\n +continual-transformers (.*)\n", said.stdout)
    command, *words = shlex.split(example)
    assert command == "serve"
    named = {word for word in words if word.startswith("--")}
    assert named
    assert named <= set(options)


def test_every_reason_has_a_row():
    source = (ROOT / "cc" / "server" / "outcome.cc").read_text()
    reasons = set(re.findall(r"^ +case Reason::k\w+:\n +return \"(\w+)\";", source, re.MULTILINE))
    assert "out_of_step" in reasons
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|$", PAGE.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    # One is no refusal; the other one's client has gone.
    assert reasons - {"none", "cancelled"} <= named


def test_python_snippets_run_one_after_the_other(monkeypatch, tmp_path, start_server, watch_file):
    server = start_server(watch_file)
    shutil.copy(watch_file, tmp_path)
    monkeypatch.chdir(tmp_path)
    python = [code for language, code in SNIPPETS if language == "python"]
    assert sum(GRPC in code for code in python) >= 3
    namespace = {}
    for code in python:
        exec(compile(code.replace(GRPC, server.grpc_url), PAGE.name, "exec"), namespace)
    namespace["client"].close()
    assert namespace["logits"].shape == (50, 7)
    assert np.isfinite(namespace["logits"]).all()


def test_commands_run(options, start_server, watch_file):
    server = start_server(watch_file)
    assert {language for language, _ in SNIPPETS} == {"python", "bash"}
    code = "\n".join(code for language, code in SNIPPETS if language == "bash")
    code = code.replace("localhost:8000", f"localhost:{server.http_port}")
    curls = []
    for command in filter(None, re.split(r"^(?=\w)", code, flags=re.MULTILINE)):
        words = shlex.split(command)
        if words[0] == "curl":
            answer = subprocess.run([*words, "--fail"], check=True, capture_output=True, text=True)
            curls.append(answer.stdout)
        elif words[1] == "load":
            # Shorter. The options are the page's.
            sooner = ["--url", server.grpc_url, "--model-file", watch_file, "--seconds", "0.3"]
            arguments = [*words[1:], *map(str, sooner)]
            result = CliRunner().invoke(cli.main, arguments)
            assert result.exit_code == 0, result.output
        else:
            assert words[:2] == ["continual-transformers", "serve"]
            assert {word for word in words if word.startswith("--")} <= set(options)
    (one,), (two,) = (json.loads(answer)["outputs"] for answer in curls[:2])
    assert (one["name"], one["shape"]) == ("y", [1, 7])
    assert (two["name"], two["shape"]) == ("y", [2, 7])
    assert "continual_transformers_steps_total" in curls[-1]


def test_the_how_to_runs(monkeypatch, tmp_path, start_server):
    monkeypatch.chdir(tmp_path)
    server, namespace, curls = None, {}, 0
    for language, code in snippets_of(ROOT / "docs" / "how-to" / "server.md"):
        if server:
            code = code.replace(GRPC, server.grpc_url)
            code = code.replace(HTTP, f"localhost:{server.http_port}")
        if language == "python":
            exec(compile(code, "server.md", "exec"), namespace)
            continue
        words = shlex.split(code)
        if words[:2] == ["continual-transformers", "serve"]:
            server = start_server(*words[2:])
        else:
            answer = subprocess.run([*words, "--fail"], check=True, capture_output=True, text=True)
            assert json.loads(answer.stdout)["outputs"][0]["shape"] == [1, 3]
            curls += 1
    assert namespace["y"].shape == (2, 3)
    assert curls == 1


def test_the_how_to_names_settings_that_exist(options):
    page = (ROOT / "docs" / "how-to" / "server.md").read_text()
    assert set(re.findall(r"`(--[\w-]+)`", page)) - {"--ray"} <= set(options)


def test_what_is_deployed_has_options_of_the_server(options):
    entry = re.search(r"^ENTRYPOINT (.*)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    unit = (ROOT / "deploy/continual-transformers.service").read_text()
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    for words in (json.loads(entry[1]), start[1].split()):
        assert words[0] == f"/opt/continual-transformers/{program.PATH.name}"
        named = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        assert "--state-dir" in named
        assert named <= set(options)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_accepts_the_unit(tmp_path):
    unit = (ROOT / "deploy/continual-transformers.service").read_text()
    program_there = f"/opt/continual-transformers/{program.PATH.name}"
    assert program_there in unit
    path = tmp_path / "continual-transformers.service"
    path.write_text(unit.replace(program_there, str(program.PATH)))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continual-transformers.service" not in done.stderr
