"""The tables of docs/: every argument has a row, and every test that they name exists."""

import inspect
import re
from pathlib import Path

import pytest

import continual_transformers_tf as ct

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TESTS = {
    name
    for path in (ROOT / "tests").glob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("doc", DOCS)
def test_every_test_that_is_named_exists(doc):
    named = set(re.findall(r"`(test_\w+)`", DOCS[doc]))
    assert named
    assert named <= TESTS, named - TESTS
    for path in re.findall(r"`((?:tests|docs|examples)/[\w./]+)`", DOCS[doc]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "function",
    [ct.CoSiMultiHeadAttention.__init__, ct.CoSiMultiHeadAttention.call],
    ids=lambda f: f.__name__,
)
def test_every_argument_of_the_attention_has_a_row(function):
    rows = re.findall(r"^\| ([^|]*) \|", DOCS["co_si_mha.md"], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    arguments = set(inspect.signature(function).parameters) - {"self", "kwargs"}
    assert arguments <= named, arguments - named
