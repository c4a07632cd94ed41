"""The documentation: its links lead somewhere, and its pages name what there is."""

import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import pytest
import typer
from glp_lens_cli import app

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


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of each `glp-lens` in a page's blocks of shell code, with the variables that the block sets put in."""
    found = []
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        values = dict(match.groups() for line in lines if (match := re.match(r'(\w+)="(.*)"$', line)))
        values["SLURM_ARRAY_TASK_ID"] = "0"
        for line in lines:
            words = shlex.split(Template(line).safe_substitute(values), comments=True)
            for name in ("glp-lens", "glp_lens_cli"):
                if name in words:
                    arguments = words[words.index(name) + 1 :]
                    ends = [i for i, word in enumerate(arguments) if word in ("&", "|", "<", ">")]
                    found.append(arguments[: min(ends, default=None)])
    return found


@cache
def made() -> Any:
    """The commands, which take a while to make."""
    return typer.main.get_command(app)


def parse(arguments: list[str]) -> None:
    """Read a command line without running the command."""
    command = made()
    while commands := getattr(command, "commands", None):
        name, *arguments = arguments
        command = commands[name]
    command.make_context("glp-lens", arguments)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in pages() if command_lines(page)])
def test_command_lines_name_commands_and_options_that_are_there(page, tmp_path, monkeypatch):
    """With the options of YAML files that they name, which lie beside the page or stand in it."""
    monkeypatch.chdir((ROOT / page).parent)
    if block := re.search(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        (tmp_path / "grid.yaml").write_text(block[1])
        monkeypatch.chdir(tmp_path)
    for arguments in command_lines(ROOT / page):
        parse(arguments)


def test_a_wrong_option_in_a_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```sh\nS="--store acts"\nglp-lens density $S --models a,b \\\n  --outt there  # why\n```\n')
    assert command_lines(page) == [["density", "--store", "acts", "--models", "a,b", "--outt", "there"]]
    with pytest.raises(Exception, match="No such option: --outt"):
        parse(command_lines(page)[0])


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
