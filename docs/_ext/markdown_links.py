"""Links of the Markdown files that Sphinx reads differently from a code host.

A link to a folder goes to its README there; a link to a page (`report.html`) opens it, where Sphinx would offer to save
it. The page is copied to the same place in the site.
"""

import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx

_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
_FRONT = "index.html"


def to_readme(app: Sphinx, docname: str, source: list[str]) -> None:
    """Complete the links to folders."""
    here = Path(app.env.doc2path(docname)).parent

    def complete(match: re.Match[str]) -> str:
        target = match[1].rstrip("/")
        return f"{target}/README.md" if (here / target / "README.md").is_file() else match[1]

    source[0] = _LINK.sub(complete, source[0])


def to_page(app: Sphinx, doctree: nodes.document) -> None:
    """Make links to pages open them."""
    here = Path(app.env.docname).parent
    for node in list(doctree.findall(download_reference)):
        if (target := node["reftarget"]).endswith(".html"):
            page = os.path.normpath(here / target)
            app.env.metadata[app.env.docname].setdefault("pages", []).append(page)
            node.replace_self(nodes.reference("", "", *node.children, refuri=target, internal=True))


def copy_pages(app: Sphinx, error: Exception | None) -> None:
    """Put the pages that are linked where their links look, and an entry at the top of the site."""
    if error or app.builder.format != "html":
        return
    for metadata in app.env.metadata.values():
        for page in metadata.get("pages", ()):
            (app.outdir / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(app.srcdir / page, app.outdir / page)
    front = app.config.root_doc + ".html"
    (app.outdir / _FRONT).write_text(
        f'<!doctype html><meta charset="utf-8"><title>{app.config.html_title}</title>'
        f'<meta http-equiv="refresh" content="0; url={front}"><a href="{front}">{app.config.html_title}</a>\n',
        encoding="utf-8",
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect."""
    app.connect("source-read", to_readme)
    app.connect("doctree-read", to_page)
    app.connect("build-finished", copy_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
