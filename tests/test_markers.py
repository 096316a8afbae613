"""The markers that choose what `make test` runs: every test is run by something that CI calls."""

import re
from pathlib import Path

import pytest

from sampling import MARKERS, sample

ROOT = Path(__file__).parent.parent


class Chosen(dict):
    """The names in an expression of `pytest -m`: whether a test has that marker."""

    def __init__(self, markers):
        super().__init__((name, True) for name in markers)

    def __missing__(self, name):
        return False


def choices():
    """Return the expression of each of the Makefile's targets that chooses by markers alone."""
    makefile = (ROOT / "Makefile").read_text()
    found = re.findall(r'^(\S+):.*\n\t.*-m pytest -m "(.*)" \$\(PYTEST_FLAGS\)$', makefile, re.M)
    return dict(found)


def test_the_targets():
    assert set(choices()) == {"test", "test-slow", "test-every-case"}


def test_ci_runs_a_case_of_every_test_and_every_case_has_a_target(request):
    """It sees the tests that were collected with it: in `make test` these are all."""
    targets = choices()
    steps = re.findall(r"^step make (\S+)$", (ROOT / ".ci/run").read_text(), re.M)
    by_ci = [targets[name] for name in ("test", "test-slow") if name in steps]
    # `make test-wheels` and `make test-aarch64` choose by files.
    anywhere = [*targets.values(), "every_wheel", "aarch64"]
    tests, run_by_ci, run_nowhere = set(), set(), []
    for test, markers in request.config.stash[MARKERS]:
        has = Chosen(markers)
        if "aarch64" not in markers:  # CI runs a few of the C++ tests there, and no others.
            tests.add(test)
        if any(eval(choice, {}, has) for choice in by_ci):
            run_by_ci.add(test)
        elif not any(eval(choice, {}, has) for choice in anywhere):
            run_nowhere.append((test, markers))
    assert tests <= run_by_ci
    assert not run_nowhere


class Case:
    def __init__(self, **values):
        self.name = str(values)
        self.callspec = self
        self.indices = values


GRID = [Case(a=a, b=b, c=c) for a in range(6) for b in range(2) for c in range(3)]


def test_a_sample_has_every_value_if_there_is_room():
    chosen = [case.indices for case in sample(GRID, 6)]
    for name, count in {"a": 6, "b": 2, "c": 3}.items():
        assert {indices[name] for indices in chosen} == set(range(count))


@pytest.mark.parametrize("count", [1, 2, 7, 36])
def test_a_sample_is_always_the_same(count):
    names = {case.name for case in sample(GRID, count)}
    assert len(names) == count
    assert GRID[0].name in names
    assert names == {case.name for case in sample([GRID[0], *GRID[:0:-1]], count)}
