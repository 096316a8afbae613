"""The tests in a clean environment for each Python and TensorFlow: `nox`, or `nox --list`."""

import runpy

import nox

PAIRS = runpy.run_path("tools/wheels.py")["supported_pairs"]()

nox.options.error_on_missing_interpreters = False


def add_tests(python: str) -> None:
    """Add the sessions of a Python, such as "tests-3.12(2.20)": `nox -s tests-3.12` runs all."""
    tensorflows = [tensorflow for of, tensorflow in PAIRS if of == python]

    @nox.session(name=f"tests-{python}", python=python, tags=["tests"])
    @nox.parametrize("tensorflow", tensorflows, ids=tensorflows)
    def tests(session: nox.Session, tensorflow: str) -> None:
        """Build the package for this TensorFlow, and run the tests that `make test` runs."""
        # First, so that the ops are built for it.
        session.install(f"tensorflow-cpu=={tensorflow}.*")
        session.install(".[client,cpu,demo,test]", env={"CONTINUAL_TRANSFORMERS_CUDA": "0"})
        session.run("pytest", "-m", "not slow and not every_case", "-n", "auto", *session.posargs)


for version in dict.fromkeys(python for python, _ in PAIRS):
    add_tests(version)


@nox.session
def lint(session: nox.Session) -> None:
    """Run what `make lint` runs."""
    session.run("make", "lint", external=True)
