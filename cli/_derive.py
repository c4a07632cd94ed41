"""Commands made of settings: their options, help texts and YAML keys are the fields of a settings class."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from glp_lens import pipeline
from glp_lens.errors import InputError
from glp_lens.settings import Option, Settings, options

from ._app import Config, memory_told, split
from ._completing import completion
from ._help import HelpAll, essentials_first


def add(
    app: typer.Typer,
    name: str,
    settings: type[Settings],
    job: str | Callable[[Any], object],
    help: str,
    *arguments: str,
) -> None:
    """Add the command of a job of `glp_lens.pipeline` to an app.

    Args:
        app: a group of commands.
        name: of the command.
        settings: of the job.
        job: name of its function; one that takes `command` is given the command line. Or what to do with the settings.
        help: of the command.
        arguments: settings that stand on the command line without a name.
    """
    run = job if callable(job) else _by_name(job)
    made = command(settings, run, help, arguments=arguments)
    app.command(name, cls=essentials_first(settings))(made)


def _by_name(job: str) -> Callable[[Settings], None]:
    """The job of this name, which is looked up when it is run."""
    told = {"command"} & inspect.signature(getattr(pipeline, job)).parameters.keys()

    def run(values: Settings) -> None:
        line = shlex.join(["glp-lens", *sys.argv[1:]])
        getattr(pipeline, job)(values, **dict.fromkeys(told, line))

    return run


def about(function: Callable[..., object]) -> str:
    """The help text of a command: the docstring of its job without arguments and results, a paragraph a line."""
    told = re.split(r"\n\n(?:Args|Returns|Raises):\n", inspect.cleandoc(function.__doc__ or ""))[0]
    paragraphs = told.split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def command(
    settings: type[Settings], job: Callable[[Any], object], help: str, *, arguments: Collection[str] = ()
) -> Callable[..., None]:
    """A function for `app.command`, whose parameters are the settings, that runs a job with them.

    Args:
        job: takes the settings.
        help: of the command.
        arguments: settings that stand on the command line without a name.
    """
    known = options(settings)

    def run(ctx: typer.Context, config: Path | None = None, help_all: bool = False, **values: Any) -> None:
        made = settings(**{each.name: _value(each, values[each.name], each.name in arguments) for each in known})
        sources = {each.name: ctx.get_parameter_source(each.name) for each in known}
        made.refuse_ignored({name for name, source in sources.items() if source and source.name != "DEFAULT"})
        with memory_told(made):
            job(made)

    last = sorted(known, key=lambda option: option.panel == "Run")  # where and how stands below what
    parameters = [_parameter(option, argument=option.name in arguments) for option in last]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, annotation=Config, default=None))
    parameters.append(inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, annotation=HelpAll, default=False))
    parameters.append(inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = help
    return run


def _parameter(option: Option, *, argument: bool) -> inspect.Parameter:
    """The parameter from which typer makes an option or argument."""
    kind: Any = str if option.parse is not None else option.type
    limits: dict[str, Any] = {}
    if option.several:
        kind = list[str]
    elif kind is Path:  # a text until its setting is checked: an empty one would become the current folder
        kind, limits = str, {"metavar": "PATH"}
    elif option.parse is None and kind in (int, float):
        limits = {"min": option.min, "max": option.max}
    default: Any = option.default
    if default is MISSING:
        default = ...
    elif option.several:
        default = [str(item) for item in default]
    elif (option.parse is not None or option.type is Path) and default is not None:
        default = str(default)
    if option.optional:
        kind = kind | None
    about: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel, **limits}
    if option.default is False:
        about["show_default"] = False
    if argument:
        choices = get_args(option.type) if get_origin(option.type) is Literal else ()
        about = {"help": option.help, "show_default": False, "metavar": "|".join(choices) or None}
        info = typer.Argument(**about, autocompletion=completion(option))
    else:
        negative = f"/--no-{option.flag.removeprefix('--')}" if option.type is bool else ""
        names = [option.flag + negative, *(["-o"] if option.name == "out" else [])]
        info = typer.Option(*names, **about, autocompletion=completion(option))
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default
    )


def _value(option: Option, value: Any, argument: bool) -> Any:
    """A parsed value in the type of its setting; lists may be repeated options or separated by commas."""
    if not option.several or value is None or argument:
        return value
    items: list[Any] = [item for text in value for item in split(str(text))]
    numeric = option.parse is None and option.type in (int, float)
    try:
        items = [option.type(item) for item in items] if numeric else items
        usable = option.type is not float or all(map(isfinite, items))
    except ValueError:
        usable = False
    if not usable or (not items and value and option.default is not MISSING):
        example = f", for example {','.join(map(str, option.default[:2]))}" if option.default else ""
        given = ",".join(map(str, value))
        what = "numbers" if numeric else "values"
        raise InputError(f"{option.flag} takes {what} separated by commas{example}; got {given!r}")
    return tuple(items)
