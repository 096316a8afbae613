"""The tables of docs/: every argument has a row, and every test that they name exists."""

import inspect
import re
from pathlib import Path

import pytest

import continual_transformers_tf as ct

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
# Measurements that check contestants before they time them, a guide whose snippets run, a format.
WITHOUT_TESTS = {"benchmarks_models.md", "layers.md", "model_file.md"}
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("doc", DOCS)
def test_every_test_that_is_named_exists(doc):
    named = set(re.findall(r"`(test_\w+)`", DOCS[doc]))
    assert bool(named) == (doc not in WITHOUT_TESTS)
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


def test_every_public_name_of_the_transformer_modules_there_has_a_row():
    co = pytest.importorskip("continual", reason="continual-inference is not installed")
    modules = [co.transformer, co.positional_encoding, co.delay]
    public = {name for module in modules for name in module.__all__}
    public |= {"SingleOutputMultiheadAttention", "RetroactiveMultiheadAttention"}
    rows = re.findall(r"^\| ([^|]*) \|", DOCS["features.md"], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert public <= named, public - named


def test_every_row_of_the_features_has_a_test_or_says_why_not():
    rows = re.findall(r"^\|([^|]*)\|([^|]*)\|([^|]*)\|$", DOCS["features.md"], re.MULTILINE)
    assert len(rows) > 40
    for there, here, test in rows:
        heading = there.strip() in ("there", "---")
        assert heading or "`test_" in test or "left out" in here or "not yet" in here, there
