"""How Bazel runs a file of Python tests: `run_pytest.py FILE`."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider", "-m", "not slow"]))
