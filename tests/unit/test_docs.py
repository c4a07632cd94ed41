"""The documentation: its links lead somewhere, and its pages name what there is."""

import importlib
import re
from pathlib import Path

import pytest

import glp_lens

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(```+|~~~+).*?^\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
PACKAGES = """
    activations corpus directions features hooks lm pipeline report
    evals.density evals.detect evals.fidelity evals.generation evals.probing evals.steering
""".split()


def pages() -> list[Path]:
    folders = (ROOT, ROOT / "benchmarks", ROOT / "findings")
    return sorted([*(page for folder in folders for page in folder.glob("*.md")), *(ROOT / "docs").rglob("*.md")])


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def dead_links(page: Path) -> list[str]:
    """The links of a page to files, folders and headings that are not there."""
    dead = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        readme = found / "README.md" if found.is_dir() else found
        if not found.exists() or (anchor and (readme.suffix != ".md" or anchor not in anchors(readme))):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in pages()])
def test_links_lead_to_files_and_headings_that_are_there(page):
    assert dead_links(ROOT / page) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# One *thing*: `a_b`\n\n```sh\n# no heading\n```\n## Two\n## Two\n")
    good = "[a](there.md) ![b](there.md#one-thing-a_b) [c](https://example.org/x) [d](there.md#two-1) `[e](code.md)`"
    bad = "[f](gone.md) [g](there.md#no-heading) [h](#nowhere) [`i`](gone/)"
    (tmp_path / "page.md").write_text(f"{good}\n{bad}\n")
    assert dead_links(tmp_path / "page.md") == ["gone.md", "there.md#no-heading", "#nowhere", "gone/"]


def test_every_page_is_in_the_contents():
    listed = set()
    for page in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(r"```\{toctree\}(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            entries = [re.sub(r".*<(.+)>$", r"\1", line.strip()) for line in block.splitlines()]
            listed |= {(page.parent / entry).resolve() for entry in entries if entry and not entry.startswith(":")}
    docs = {path.resolve().with_suffix("") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".rst")}
    assert docs - listed == {ROOT / "docs/index"}


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_every_public_name_is_in_the_reference(package):
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.rst"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", text, re.MULTILINE))
    if package:
        assert f"glp_lens.{package}" in documented  # `automodule` shows all that `__all__` names
        assert importlib.import_module(f"glp_lens.{package}").__all__
        return
    modules = {name for name in glp_lens.__all__ if (ROOT / "glp_lens" / name).is_dir()} - {"evals", "models"}
    wanted = {f"glp_lens.{name}" for name in glp_lens.__all__ if name not in ("evals", "models")}
    assert wanted <= documented
    assert modules <= set(PACKAGES)


def test_the_glossary_is_in_alphabetical_order():
    terms = re.findall(r"^- \*\*(.+?)\*\*: ", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 30
    assert terms == sorted(terms, key=str.casefold)


def test_code_that_the_paper_page_names_is_there():
    """Names of ours in the table from the paper to functions."""
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(?:gl|glp_lens)\.([A-Za-z_.]+)", text):
        found = glp_lens
        for part in name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(f"{found.__name__}.{part}")
    for name in re.findall(r"`glp\.(\w+)", text):
        assert hasattr(glp_lens.GLP, name), name
