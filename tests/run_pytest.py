"""The program that runs a file of Python tests for Bazel: `run_pytest.py FILE`.

A file in which every test is skipped passes: each skip has its reason in the log. pytest alone
fails if a whole module is skipped on import, because no test was collected. A file without any
tests is a mistake, and fails.
"""

import sys

import pytest


class Skips:
    """A record of whether a module was skipped on import."""

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
