"""The tests in a clean environment for each Python and TensorFlow: `nox`, or `nox --list`."""

import runpy

import nox

TENSORFLOWS = runpy.run_path("cc/library.bzl")["TENSORFLOWS"]
PYTHONS = [
    name.rsplit(" ", 1)[-1]
    for name in nox.project.load_toml("pyproject.toml")["project"]["classifiers"]
    if name.startswith("Programming Language :: Python :: 3.")
]
PAIRS = [
    nox.param(python, tensorflow, id=f"python='{python}', tensorflow='{tensorflow}'")
    for python in PYTHONS
    for tensorflow in TENSORFLOWS
    # There is no wheel of TensorFlow 2.19 for Python 3.13.
    if (python, tensorflow) != ("3.13", "2.19")
]

nox.options.error_on_missing_interpreters = False


@nox.session
@nox.parametrize("python,tensorflow", PAIRS)
def tests(session: nox.Session, tensorflow: str) -> None:
    """Build the package for this TensorFlow, and run the tests that `make test` runs."""
    # First, so that the ops are built for it.
    session.install(f"tensorflow-cpu=={tensorflow}.*")
    session.install(".[client,cpu,demo,test]", env={"CONTINUAL_TRANSFORMERS_CUDA": "0"})
    session.run("pytest", "-m", "not slow and not stress", "-n", "auto", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Run what `make lint` runs."""
    session.run("make", "lint", external=True)
