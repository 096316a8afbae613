"""A hook of MkDocs: links from docs/ to other files of the repository.

In the repository such a link is relative, as in `../examples/cpp`: it works on GitHub and in an
editor. The site has only docs/. There the link leads to the repository's own page, at the
`repo_url` of mkdocs.yml.
"""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

BRANCH = "main"
# A link in Markdown that begins with `../`.
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]*)")
log = logging.getLogger("mkdocs.hooks.docs_links")  # `mkdocs build --strict` counts its warnings.


def on_page_markdown(markdown: str, *, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Return the page with links to files outside docs/ replaced."""
    docs = Path(config.docs_dir)
    root = docs.parent
    folder = (docs / page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[1]))
        if target.is_relative_to(docs):
            return match[1]
        if not (target.is_relative_to(root) and target.exists()):
            log.warning("%s links to %s, which does not exist", page.file.src_uri, match[1])
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/{BRANCH}/{target.relative_to(root).as_posix()}"

    return LINK.sub(replace, markdown)
