"""The cases of a large grid that `make test` runs: the marker `sampled`.

@pytest.mark.sampled(4)                 # The other cases are `every_case`.
@pytest.mark.sampled(4, rest="slow")    # The other cases are `slow`: .ci/run runs all.
"""

import zlib

import pytest

# For each collected item: its test's name and its markers. test_markers.py looks at them.
MARKERS = pytest.StashKey[list]()


def choose_samples(items):
    """Mark the cases of `sampled` tests that are not in the sample. It is always the same one."""
    tests = {}
    for item in items:
        if item.get_closest_marker("sampled") and hasattr(item, "callspec"):
            slow = item.get_closest_marker("slow") is not None
            tests.setdefault((item.function, slow), []).append(item)
    for cases in tests.values():
        sampled = cases[0].get_closest_marker("sampled")
        (n,) = sampled.args
        chosen = sample(cases, -(-len(cases) // n))
        for item in cases:
            if item not in chosen:
                item.add_marker(sampled.kwargs.get("rest", "every_case"))


def sample(cases, count):
    """Return `count` of a test's cases, which have as many values of its parameters as possible.

    The first case is among them. The next is the one with most values that no chosen case has.
    Among equals, the names decide.
    """
    left = sorted(cases, key=lambda item: (item is not cases[0], zlib.crc32(item.name.encode())))
    chosen, seen = set(), set()
    for _ in range(count):
        # (`indices` says for each parameter which of its values it is.)
        best = max(left, key=lambda item: len(item.callspec.indices.items() - seen))
        seen |= best.callspec.indices.items()
        chosen.add(best)
        left.remove(best)
    return chosen
