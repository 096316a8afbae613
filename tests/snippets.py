"""The snippets of a page in Markdown."""

import re


def snippets_of(path):
    """Return (language, code) of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
