"""How Bazel runs a file of Python tests: `run_pytest.py FILE`.

A file of which every test was skipped passes: each skip says why, in the log. pytest by itself
fails where the whole module was skipped as it was read, since then no test was collected. A file in
which there are no tests at all is a mistake and fails.
"""

import sys

import pytest


class Skips:
    """Whether a module was skipped as it was read."""

    seen = False

    def pytest_collectreport(self, report):
        self.seen = self.seen or report.skipped


def main(arguments):
    skips = Skips()
    options = ["-p", "no:cacheprovider", "-m", "not slow"]
    status = pytest.main([*arguments, *options], plugins=[skips])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and skips.seen:
        return pytest.ExitCode.OK
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
