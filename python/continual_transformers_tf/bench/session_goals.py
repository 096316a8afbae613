"""A session's goals other than a fast step, measured by benchmarks/cc/session_benchmark.cc."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from continual_transformers_tf.bench.goal import Goal
from continual_transformers_tf.bench.model_race import WORKER
from continual_transformers_tf.bench.sizes import MODEL_QUICK, MODEL_TABLE
from continual_transformers_tf.bench.worker_process import Rival, machine, missing_program

if TYPE_CHECKING:
    import rich.table

PROGRAM = "session_benchmark"
MODEL = MODEL_TABLE[1]  # Its stream block has some 100 KB, a usual size.


def run(quick: bool, programs: str | Path) -> dict[str, Any]:
    """Measure a session of one of the raced models.

    Args:
        quick: Whether to measure only for a moment, to see that it works.
        programs: The folder of the C++ programs.

    Returns:
        A dict that is JSON.
    """
    size = MODEL_QUICK[0] if quick else MODEL
    found = {"machine": machine(), "versions": {}, "size": size._asdict(), "results": []}
    program = Path(programs) / PROGRAM
    problem = missing_program(program)
    if not problem:
        with tempfile.TemporaryDirectory() as folder:
            packer = Rival("packer", 1, WORKER)
            problem = packer.ask("pack", size=size, directory=folder)
            packer.stop()
            if not problem:
                command = [str(program), f"{folder}/model.safetensors", "--json"]
                command += ["--quick"] if quick else []
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    problem = {"error": done.stderr.strip()}
                else:
                    found["results"] = json.loads(done.stdout)
    return {**found, "missing": {PROGRAM: problem} if problem else {}}


def goals(session: dict[str, Any]) -> list[Goal]:
    """Return the session's results as a list of Goal."""
    return [Goal(**result) for result in session["results"]]


def table(session: dict[str, Any]) -> rich.table.Table | None:
    """Return a rich.table.Table of the goals, or None if none was measured."""
    import rich.table

    if not session["results"]:
        return None
    made = rich.table.Table("", "goal", "measured", "", title="A session in C++")
    for goal in goals(session):
        made.add_row(*(cell.strip("*") for cell in goal.cells()))
    return made
