"""examples/litert: the program and the page see what a session of the demo's model sees."""

import functools
import http.server
import json
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import browser
import numpy as np
import pytest

import continual_transformers_tf as ct
from continual_transformers_tf.demo.model import trained_model

pytest.importorskip("ai_edge_litert", reason="the extra test has ai-edge-litert")

EXAMPLE = Path(__file__).parent.parent / "examples" / "litert"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder that export.py wrote."""
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "watch")])
    runpy.run_path(str(EXAMPLE / "export.py"), run_name="__main__")
    return tmp_path / "watch"


def seen_by_a_session(folder):
    """Return the lines that the example should print."""
    recording = json.loads((folder / "recording.json").read_text())
    session = ct.Session(trained_model())
    lines, seen = [], None
    for t, sample in enumerate(recording["samples"]):
        y = session.step(np.array([sample], np.float32))
        exercise = recording["exercises"][y.argmax()]
        if session.ready() and exercise != seen:
            lines.append(f"{t / recording['rate']:.2f} s: {exercise}")
            seen = exercise
    return lines


def test_the_program(folder):
    said = subprocess.run(
        [sys.executable, str(EXAMPLE / "stream.py")],
        cwd=folder, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    expected = seen_by_a_session(folder)
    assert len(expected) >= 7
    assert said.splitlines() == expected


@pytest.mark.slow
def test_the_page(folder):
    for program in (browser.PROGRAM, shutil.which("npm")):
        if program is None:
            pytest.skip("it needs Chromium and npm")
    shutil.copy(EXAMPLE / "index.html", folder)
    (install,) = (
        line.split()
        for line in (EXAMPLE / "README.md").read_text().splitlines()
        if line.startswith("npm install ")
    )
    installed = subprocess.run(install, cwd=folder, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install LiteRT.js: {installed.stderr[-300:]}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with browser.Browser() as page:
                page.open(f"http://127.0.0.1:{server.server_port}/index.html")
                page.wait("document.title === 'done'", seconds=120)
                said = page.text("#seen")
        finally:
            server.shutdown()
    assert said.splitlines() == seen_by_a_session(folder)
