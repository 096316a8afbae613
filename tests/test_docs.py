"""What docs/ says of the code: every argument has a row, and every test that is named exists.

Every public name is in the reference, and every link leads somewhere.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import continual_transformers_tf as ct
from continual_transformers_tf import session

ROOT = Path(__file__).parent.parent
# Pages that say of each fact which test proves it.
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
# The first page, a guide whose snippets run, a format, and measurements that check every contestant
# before they time it.
WITHOUT_TESTS = {"index.md", "layers.md", "model_file.md"}
SITE = {".md", ".ipynb"}
REFERENCE = ROOT / "docs" / "reference"
INCLUDE = ROOT / "python" / "continual_transformers_tf" / "include"
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


def test_every_public_name_is_in_the_reference():
    entries = {
        entry
        for page in REFERENCE.glob("*.md")
        for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    }
    package = "continual_transformers_tf"
    modules = {"ops", "serving"}
    public = {f"{package}.{name}" for name in set(ct.__all__) - modules}
    for module in modules:
        public |= {f"{package}.{module}.{name}" for name in getattr(ct, module).__all__}
    public |= {f"{package}.session.{name}" for name in session.__all__ if name != "Session"}
    assert public <= entries, public - entries
    for entry in entries:
        module, name = entry.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), name), entry


def test_every_name_of_the_headers_is_in_the_reference():
    page = (REFERENCE / "c.md").read_text()
    c = (INCLUDE / "continual_transformers.h").read_text()
    names = set(re.findall(r"^CT_API .*?(\w+)\(", c, re.MULTILINE))
    names |= set(re.findall(r"^} (ct_\w+);", c, re.MULTILINE))
    names |= set(re.findall(r"^  (CT_\w+) = \d+", c, re.MULTILINE))
    cc = (INCLUDE / "continual_transformers.hpp").read_text()
    names |= {f"ct::{name}" for name in re.findall(r"^(?:class|struct) (\w+) ", cc, re.MULTILINE)}
    assert {"ct_session_step", "ct_status", "CT_UNKNOWN_STREAM", "ct::Stream"} <= names
    named = set(re.findall(r"`([\w:]+)`", page))
    assert names <= named, names - named


@pytest.mark.parametrize("name", ["step", "steps"])
def test_the_stub_has_the_docstrings_of_the_native_session(name):
    # The site reads the stub, and help() the native module.
    source = (ROOT / "cc" / "python" / "session_step.cc").read_text()
    native = re.search(rf'\(R?"?{name}\(\$self.*?\n--\n\n(.*?)\)";', source, re.DOTALL)[1]
    stub = (ROOT / "python" / "continual_transformers_tf" / "_session.pyi").read_text()
    docstring = re.search(rf'def {name}\(.*?"""(.*?)"""', stub, re.DOTALL)[1]
    assert docstring.split() == native.split()


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def anchors_of(path):
    """Return the anchors of a page: those of its headings, and of its entries of the reference."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {
        re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings
    }
    return slugs | set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    # `make docs` checks the links of the site. This also checks the pages that it does not have.
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors_of(path), link


def test_every_page_has_its_place_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in docs.rglob("*") if path.suffix in SITE}
    assert pages == set(re.findall(r"^ +- (?:.*: )?(\S+\.(?:md|ipynb))$", site, re.MULTILINE))
