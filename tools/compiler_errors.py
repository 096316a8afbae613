"""Says what a compiler's error means, and checks the compiler before the wait."""

import re
import subprocess
from collections.abc import Sequence

# The oldest that compiles C++17 with floating-point std::from_chars.
OLDEST_GXX = 11

# What the first error of a compiler means, and the cure.
MEANINGS = {
    r"Python\.h: No such file": "Python's headers are missing. On Debian: apt install python3-dev",
    r"(hwy|tensorflow|Eigen|absl)/\S+: No such file": (
        "TensorFlow's headers are incomplete. Remove build/tensorflow, or install TensorFlow again"
    ),
    r"\S+: No such file": "A header is missing. CONTRIBUTING.md lists what the build needs",
    r"Killed|out of memory|virtual memory exhausted": (
        "There was not enough memory. A file takes up to 2 GB, and each processor compiles one"
    ),
    r"No space left on device": "The disk is full. The build needs 2 GB in build/ and in TMPDIR",
    r"unrecognized command.line option": "The compiler is too old, or it is not g++. CXX names it",
}


def first_error(said: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = (line for line in lines if re.search(r"\b(error|fatal|Killed)\b", line))
    return next(wrong, lines[-1] if lines else "the compiler said nothing")


def explain(command: Sequence[str], said: str) -> str:
    """Return the message of a build that fails: the first error, its meaning, and everything."""
    line = first_error(said)
    meanings = (cure for pattern, cure in MEANINGS.items() if re.search(pattern, line))
    meaning = next(meanings, "See the compiler's whole output above")
    return f"{' '.join(command)}\n{said}\nThe build failed: {line}\n{meaning}."


def check_compiler(cxx: Sequence[str]) -> str:
    """Return the first line of the compiler's `--version`.

    Raises:
        SystemExit: If there is no compiler, or a g++ that is too old.
    """
    try:
        done = subprocess.run([*cxx, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(
            f"There is no C++ compiler: {cxx[0]} cannot be run ({error.strerror}). On Debian: apt "
            "install g++. CXX names another one"
        ) from error
    version = (done.stdout or done.stderr).splitlines()[0]
    major = re.search(r"g\+\+.* (\d+)\.\d+", version)
    if major and int(major[1]) < OLDEST_GXX:
        raise SystemExit(
            f"The C++ compiler is too old: {version}. Version {OLDEST_GXX} or newer is needed. CXX "
            "names another one"
        )
    return version
