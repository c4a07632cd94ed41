"""The documentation site: `sphinx-build -c docs . FOLDER` from the root of the repository.

The source folder is the root, so that every relative link of the Markdown files, also one to code, means the same on a
code host and on the site.
"""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "glp-lens"
author = "the authors of glp-lens"
project_copyright = "2026, the authors of glp-lens"
release = version = installed("glp-lens")

root_doc = "docs/index"
include_patterns = ["docs/**", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md",
                    "findings/README.md"]  # fmt: skip
exclude_patterns = ["docs/_ext", "docs/_static", "**/.ipynb_checkpoints"]
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "api_pages",
    "command_pages",
    "markdown_links",
]

# Markdown and notebooks, which are shown with the outputs that they were saved with.
myst_heading_anchors = 4
nb_execution_mode = "off"

# The interface: in every package what its `__all__` names, in that order of kinds.
autodoc_default_options = {"members": True}
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 96
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "name"
smartquotes = False  # it would make one dash of the two of an option
add_module_names = False

nitpicky = True
# Names of other packages are not looked up: that would need a network. Ours must be found, but for private ones.
nitpick_ignore_regex = [(r"py:.*", r"(?!glp_lens).*"), (r"py:.*", r".*\._\w+")]

nitpick_ignore = [("py:class", "glp_lens.activations.batches.Rows"), ("py:class", "glp_lens.features.top.Reading")]

html_theme = "pydata_sphinx_theme"
html_title = "glp-lens"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in (root_doc, "README", "docs/glossary", "docs/paper")}  # they stand alone
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
linkcheck_timeout = 20
