"""What all commands share: how errors are shown, and how a YAML file gives options their values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from glp_lens.errors import DISK_FULL, InputError, disk_error, first_line, memory_wanted
from glp_lens.memory import keep_few_products
from glp_lens.settings import Settings
from glp_lens.yaml_files import read_yaml

_OUT_OF_MEMORY = "out of memory: {} could not be had; what is saved is safe"
# typer brings its own copy of click from some version on, so its classes are found through what both export.
_Context: TypeAlias = Any
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """Commands whose mistakes end in one line and exit code 2."""

    def list_commands(self, ctx: _Context) -> list[str]:
        """In the order they were added: the order they are used in."""
        return list(self.commands)

    def parse_args(self, ctx: _Context, args: list[str]) -> list[str]:
        """Read the group's own options."""
        with _mistakes_told():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: _Context) -> Any:
        """Read the options of a command and run it."""
        keep_few_products()
        with _mistakes_told(), warnings_told():
            return super().invoke(ctx)


@contextmanager
def _mistakes_told() -> Iterator[None]:
    """Print a mistake in the input as one line, without usage text or traceback, and exit."""
    try:
        yield
    except InputError as error:
        _fail(str(error))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command group alone shows its help
            raise
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        _fail(error.format_message().replace("Value error, ", "") + hint)  # which pydantic puts before
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if (wanted := memory_wanted(error)) is not None:
            _fail(f"{_OUT_OF_MEMORY.format(wanted)}: use less data or a machine with more")
        code = disk_error(error)
        if code is None or isinstance(error, ConnectionError | TimeoutError):
            raise
        place = getattr(error, "filename", None) or "a file"
        reason = getattr(error, "strerror", None) or first_line(error)
        if code in DISK_FULL:
            _fail(f"cannot write {place}: {reason}; what is saved is safe: free space and run the same command again")
        _fail(f"cannot write or read {place}: {reason}; choose another folder")
    except KeyboardInterrupt:
        typer.secho("interrupted: run the same command again to go on", err=True)
        raise typer.Exit(130) from None


@contextmanager
def memory_told(settings: Settings) -> Iterator[None]:
    """When memory ends, say how much was wanted, if that is known, and which options of the job lower it.

    Raises:
        InputError: memory has ended.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if (wanted := memory_wanted(error)) is None:
            raise
        lower = f"lower {', '.join(flags)}" if (flags := settings.memory_flags()) else "use less data"
        raise InputError(f"{_OUT_OF_MEMORY.format(wanted)}: {lower}, or use a machine with more") from None


@contextmanager
def warnings_told() -> Iterator[None]:
    """A warning is told in one line too, once, without the place in the code; those for programmers keep it."""
    usual = warnings.formatwarning
    seen: set[str] = set()

    def told(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *place, **line)
        text = f"warning: {' '.join(str(message).split())}\n"
        if text in seen:  # Python forgets what it has shown whenever a library changes its filters
            return ""
        seen.add(text)
        return text

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _fail(message: str) -> None:
    typer.secho(f"error: {' '.join(message.split())}", err=True, fg="red")
    raise typer.Exit(2) from None


def _load_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Give the options not on the command line the values of a YAML file."""
    if value is None:
        return None
    settings = read_yaml(value, "config file")
    if not isinstance(settings, dict):
        raise InputError(f"config file {value} must hold 'option: value' lines, got {type(settings).__name__}")
    known = {
        name: p
        for p in ctx.command.params
        if p.name not in ("config", "help", "help_all")
        for name in (str(p.name), *(option.lstrip("-").replace("-", "_") for option in p.opts))
    }
    settings = {str(name).replace("-", "_"): item for name, item in settings.items() if item is not None}
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        flags = sorted({max(p.opts, key=len).lstrip("-") for p in known.values()})
        raise InputError(
            f"config file {value} sets {', '.join(unknown)}, not options of '{ctx.info_name}': "
            f"known are {', '.join(flags)}"
        )
    values = {str(known[name].name): _as_option(known[name], item) for name, item in settings.items()}
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return value


def _as_option(option: Any, value: Any) -> Any:
    """A value of a YAML file as click takes it: lists for options that may be repeated, else text with commas."""
    if isinstance(value, dict):
        raise InputError(f"{option.name} must be a value or a list of values, got a mapping in the config file")
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        raise InputError(f"{option.name} must be a value or a list of values, got a list of lists in the config file")
    if getattr(option, "multiple", False) or option.nargs == -1:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    return ",".join(map(str, value)) if isinstance(value, list) else value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_load_config,
        is_eager=True,
        help="YAML file with 'option: value' lines; options on the command line win.",
        rich_help_panel="Run",
    ),
]


def refuse_empty(**options: str | None) -> None:
    """Refuse options of commands without settings that are there and name nothing.

    Raises:
        InputError: an option is empty or blank.
    """
    for name, value in options.items():
        if value is not None and not value.strip():
            raise InputError(f"--{name.replace('_', '-')} must not be empty: leave it out, or name something")


def split(text: str) -> list[str]:
    """The items of a comma-separated option."""
    return [item.strip() for item in text.split(",") if item.strip()]
