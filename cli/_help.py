"""The help of a command: what is used most on one screen, and everything for `--help-all`."""

from __future__ import annotations

import re
from collections.abc import Collection
from copy import copy
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from glp_lens.settings import Settings, options

_ALL = "glp_lens.help_all"
_LONG = 100
"""Characters of a sentence that fills two lines of short help."""
_WIDE = 24
"""Characters of choices above which they are not listed in short help, but for `--help-all` and completion."""


def essentials_first(settings: type[Settings]) -> type[TyperCommand]:
    """The class of a command whose help shows the essential settings of a job, or all where it names none.

    Arguments and what must be given are shown anyway.
    """
    one = [each for each in options(settings) if get_origin(each.type) is Literal and not each.several]
    wide = [each.name for each in one if len("|".join(map(str, get_args(each.type)))) > _WIDE]

    class EssentialsFirst(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            """Print the help; everything in its panels if `--help-all` asked for it."""
            everything = self.params
            if not ctx.meta.get(_ALL):
                self.params = _short(everything, settings.essentials, wide)
            try:
                super().format_help(ctx, formatter)
            finally:
                self.params = everything

    return EssentialsFirst


def _short(params: list[Any], names: Collection[str], wide: Collection[str]) -> list[Any]:
    """What short help shows of a command: in one panel if some of it is left out, which the last line says."""
    if not names:
        return [each for each in params if each.name != "help_all"]
    shown = []
    for each in params:
        if each.param_type_name == "argument":
            shown.append(each)
        elif each.required or each.name in (*names, "config", "help_all"):
            shown.append(each := copy(each))  # the command keeps its own as they are
            each.rich_help_panel, each.min, each.max, each.secondary_opts = None, None, None, []
            each.help = _beginning(each.help)
            if each.name in wide:
                each.metavar = "CHOICE"
            if each.name == "help_all":
                each.help = f"Show all {len(params) - 1} options in full, and exit."
    return shown


def _beginning(text: str) -> str:
    """The first sentence, and if that is long its first part."""
    sentence = text.partition(". ")[0].removesuffix(".")
    return (re.split("[;:] ", sentence)[0] if len(sentence) > _LONG else sentence) + "."


def _show_all(ctx: typer.Context, asked: bool) -> bool:
    if asked:
        ctx.meta[_ALL] = True
        typer.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
    return asked


HelpAll = Annotated[
    bool,
    typer.Option("--help-all", callback=_show_all, is_eager=True, help="Show every option and exit."),
]
