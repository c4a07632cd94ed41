"""How docstrings are shown: names in backticks, settings of jobs, and links between names."""

import pydoc
import re
from dataclasses import MISSING
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from glp_lens.settings import Settings, options

_NAME = re.compile(r"[A-Za-z]\w*(\.\w+)*(\(\))?")
_MARKUP = re.compile(r"([\\*|]|_(?=\W|$))")
_ESCAPED = r"\\\1"
_XREF = PyXRefRole()


def name_role(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *rest: Any, **more: Any) -> Any:
    """What stands between single backticks: a link if it is the name of something documented, else code."""
    if _NAME.fullmatch(text):
        return _XREF("py:obj", rawtext, text, lineno, inliner, *rest, **more)
    return [nodes.literal(rawtext, nodes.unescape(text))], []


def show_settings(app: Sphinx, what: str, name: str, obj: Any, options_: Any, lines: list[str]) -> None:
    """Append the settings of a job or suite to its docstring, as they are declared."""
    if what != "class" or not issubclass(obj, Settings) or obj is Settings:
        return
    lines.append("")
    for each in options(obj):
        about = ["Required." if each.default is MISSING else f"Default ``{each.default!r}``."]
        limits = [f"{word} {limit:,}" for word, limit in (("at least", each.min), ("at most", each.max)) if limit]
        about += [f"{' and '.join(limits).capitalize()}."] if limits else []
        lines.append(f":param {each.name}: {_MARKUP.sub(_ESCAPED, each.help)} {' '.join(about)}")


def short_signature(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, str | None] | None:
    """Of settings, whose fields are listed below it."""
    return ("(**settings)", None) if what == "class" and issubclass(obj, Settings) else None


def find_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, inside: nodes.Element) -> nodes.Element | None:
    """A name by its last part, where it is clear: classes are documented under the names that people import."""
    target = str(node.get("reftarget", "")).removesuffix("()")
    if node.get("refdomain") != "py" or not target:
        return None
    home, _, last = target.rpartition(".")
    objects = env.domains.python_domain.objects
    found = [name for name, entry in objects.items() if name.endswith(f".{last}") and entry.objtype != "module"]
    if home.startswith("glp_lens"):  # defined in a module of the package that documents it
        found = [name for name in found if f"{home}.".startswith(f"{name.rpartition('.')[0]}.")]
    if not found or (len(found) > 1 and not home):
        return None
    name = max(found, key=len)
    return make_refnode(app.builder, node["refdoc"], objects[name].docname, objects[name].node_id, [inside], name)


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options_: Any) -> bool | None:
    """Fields of settings, which stand in a list of their own."""
    owner = pydoc.locate(f"{app.env.current_document.autodoc_module}.{app.env.current_document.autodoc_class}")
    if what == "class" and isinstance(owner, type) and issubclass(owner, Settings):
        return True
    return None


def set_dashes(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Between a parameter and what it is: Sphinx leaves that to smart quotes, which would spoil options."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- " and text.parent:
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect."""
    app.add_role("name", name_role)
    app.connect("autodoc-process-docstring", show_settings)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("autodoc-skip-member", leave_out)
    app.connect("doctree-resolved", set_dashes)
    app.connect("missing-reference", find_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
