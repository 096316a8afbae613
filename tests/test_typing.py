"""`mypy --strict` accepts users' programs that call the whole public API."""

import importlib.util
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import continual_transformers_tf as ct

DATA = Path(__file__).parent / "data"
PROGRAMS = [DATA / "typed_user.py", DATA / "typed_program.py"]
PACKAGE = Path(ct.__file__).parent


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Return a function that runs `mypy --strict`, as a user who has installed the package does.

    The package is in an environment, so that mypy looks for its py.typed and prints no errors in
    it.
    """
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("typing")
    venv.create(folder / "environment", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "environment")}))
    (site / PACKAGE.name).symlink_to(PACKAGE)
    (site / "numpy.pth").write_text(
        str(Path(importlib.util.find_spec("numpy").origin).parent.parent)
    )
    python = folder / "environment" / "bin" / "python"

    def run(*programs):
        return subprocess.run(
            [
                *(sys.executable, "-m", "mypy", "--strict", "--config-file="),
                *("--python-executable", python, "--cache-dir", folder / "cache", *programs),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
        )

    return run


@pytest.mark.slow
def test_users_programs_are_typed(mypy):
    done = mypy(*PROGRAMS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_finds_a_user_s_mistakes(mypy, tmp_path):
    """Otherwise the test above would also pass if every name were Any."""
    program = tmp_path / "mistakes.py"
    program.write_text(
        "import continual_transformers_tf as ct\n"
        "session = ct.Session.load(3)\n"
        "a: str = session.open()\n"
        "session.receptive_feld\n"
        "ct.explain(None).row\n"
        "ct.convertt\n"
        "ct.CoSiMultiHeadAttention(num_heads=2, key_dim=3)\n"
        "ct.serving.Clientt\n"
        "ready: str = session.ready(3)\n"
        'session.open("3")\n'
    )
    done = mypy(program)
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    found = [int(re.search(r"mistakes\.py:(\d+): error", line)[1]) for line in lines]
    assert found == [2, 3, 4, 5, 6, 7, 8, 9, 10], done.stdout


def test_the_programs_use_every_public_name():
    text = "".join(program.read_text() for program in PROGRAMS)
    unused = [name for name in ct.__all__ if not re.search(rf"\bct\.{name}\b", text)]
    assert not unused
