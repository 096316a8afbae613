"""The types that the package gives to its users."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "data" / "typed_program.py"


def mypy(folder, program):
    # Outside of the checkout, whose pyproject.toml has settings for mypy.
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder / "cache"]
    done = subprocess.run([*command, "program.py"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_strictly_typed_program(tmp_path):
    status, said = mypy(tmp_path, PROGRAM.read_text())
    assert status == 0, said


def test_mistakes_are_found(tmp_path):
    program = PROGRAM.read_text().replace("session.open(3)", 'session.open("3")')
    status, said = mypy(tmp_path, program.replace("ct.cost(stack).flops", "ct.cost(stack).flop"))
    assert status == 1
    assert 'No overload variant of "open" of "Session"' in said
    assert '"Cost" has no attribute "flop"' in said
