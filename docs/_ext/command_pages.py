"""All commands with all their options, made of the commands themselves."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer
from glp_lens_cli import app as cli
from sphinx.application import Sphinx

_LIMITS = (("at least", "min"), ("at most", "max"))
PAGE, PLACE = "docs/reference/commands", "<!-- commands -->"


def commands(command: Any, path: str) -> Iterator[str]:
    """A section in Markdown for each command, groups before what they hold."""
    if getattr(command, "commands", None):
        for name, each in command.commands.items():
            yield from commands(each, f"{path} {name}")
        return
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    yield f"## {path}\n\n{_text(command.help or '', code=True)}\n"
    yield f"```sh\n{' '.join([path, *map(_metavar, arguments), '[OPTIONS]'])}\n```\n"
    panels: dict[str, list[Any]] = {"Arguments": arguments} if arguments else {}
    for each in options:
        panels.setdefault(getattr(each, "rich_help_panel", None) or "Options", []).append(each)
    for panel, members in panels.items():
        yield f"| {panel} | |\n|---|---|"
        yield from map(_row, members)
        yield ""


def _metavar(argument: Any) -> str:
    name = str(argument.name).upper()
    name = f"{name}..." if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _row(each: Any) -> str:
    name = ", ".join(f"`{flag}`" for flag in (*each.opts, *each.secondary_opts))
    if each.param_type_name == "argument":
        name = f"`{_metavar(each)}`"
    about = [_text(each.help or "").rstrip(".") + "."] if each.help else []
    about += [f"One of {', '.join(f'`{choice}`' for choice in choices)}."] if (choices := _choices(each)) else []
    limits = [f"{word} {limit:,}" for word, bound in _LIMITS if (limit := getattr(each, bound)) is not None]
    about += [f"{' and '.join(limits).capitalize()}."] if limits else []
    default = each.default
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    about += ["Required."] if each.required else [] if default in (None, False, "") else [f"Default `{default}`."]
    return f"| {name} | {' '.join(about)} |"


def _choices(parameter: Any) -> list[str]:
    """The values that it may have, where it says so."""
    kinds = [parameter.type_descriptor.annotation]
    for kind in kinds:
        if get_origin(kind) is Literal:
            return [str(value) for value in get_args(kind)]
        kinds += get_args(kind)
    return []


def _text(text: str, *, code: bool = False) -> str:
    """Help as Markdown: without its own line breaks within paragraphs, and nothing in it but code is markup."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    for sign in ("\\", "|", "*", "_", "<", "[", "]", "$"):
        paragraphs = [part.replace(sign, "\\" + sign) for part in paragraphs]
    return ("\n\n" if code else " ").join(paragraphs)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the commands where the page has their place."""
    if docname == PAGE:
        source[0] = source[0].replace(PLACE, "\n".join(commands(typer.main.get_command(cli), "glp-lens")))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
