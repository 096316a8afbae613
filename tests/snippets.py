"""The snippets of a page in Markdown."""

import re
from typing import NamedTuple


class Snippet(NamedTuple):
    """A block of code.

    Attributes:
        language: Such as "python".
        title: The file that the block shows; None: no file.
        code: The text.
    """

    language: str
    title: str | None
    code: str


def titled_snippets_of(path):
    """Return the `Snippet`s of a page."""
    found = re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', path.read_text(), re.MULTILINE | re.DOTALL
    )
    return [Snippet(language, title or None, code) for language, title, code in found]


def snippets_of(path):
    """Return (language, code) of each."""
    return [(snippet.language, snippet.code) for snippet in titled_snippets_of(path)]
