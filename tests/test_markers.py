"""The markers that choose what `make test` runs: every test is run by something that CI calls."""

import re
from collections import Counter, defaultdict
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


def test_ci_runs_a_case_of_every_test_and_some_target_runs_every_case(request):
    """It sees the tests that were collected with it: in `make test` these are all."""
    targets = choices()
    ran_by_ci = set(re.findall(r"^step make (\S+)$", (ROOT / ".ci/run").read_text(), re.M))
    ci = [targets[name] for name in ("test", "test-slow")]
    assert {"test", "test-slow"} <= ran_by_ci
    seen, missed, never = set(), set(), []
    for test, markers in request.config.stash[MARKERS]:
        runs = Chosen(markers)
        (seen if any(eval(choice, {}, runs) for choice in ci) else missed).add(test)
        # `make test-wheels` and `make test-aarch64` choose by files.
        others = {"every_wheel", "aarch64"} & markers
        if not others and not any(eval(choice, {}, runs) for choice in targets.values()):
            never.append((test, markers))
    assert missed <= seen
    assert not never


class Case:
    def __init__(self, **values):
        self.name = str(values)
        self.callspec = self
        self.indices = values


GRID = [Case(a=a, b=b, c=c) for a in range(6) for b in range(2) for c in range(3)]


def test_a_sample_has_every_value_if_there_is_room():
    chosen = sample(GRID, 6)
    assert {case.indices["a"] for case in chosen} == set(range(6))
    counts = defaultdict(Counter)
    for case in chosen:
        for name, value in case.indices.items():
            counts[name][value] += 1
    assert set(counts["b"]) == {0, 1}
    assert set(counts["c"]) == {0, 1, 2}


@pytest.mark.parametrize("count", [1, 2, 7, 36])
def test_a_sample_is_always_the_same(count):
    names = {case.name for case in sample(GRID, count)}
    assert len(names) == count
    assert GRID[0].name in names
    assert names == {case.name for case in sample([GRID[0], *GRID[:0:-1]], count)}
