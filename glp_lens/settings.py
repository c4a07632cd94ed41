"""Settings of jobs and suites: one dataclass each, whose fields are the options of library, command line and YAML.

A field has a default, its limits, and one line of documentation: the string below it.
"""

from __future__ import annotations

import ast
import inspect
import numbers
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from math import inf, isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from glp_lens.errors import InputError, first_line
from glp_lens.limits import LARGEST_INTEGER, LARGEST_NUMBER


def option(
    default: Any = MISSING,
    *,
    min: float | None = None,
    max: float | None = None,
    panel: str | None = None,
    flag: str | None = None,
    parse: Callable[[Any], Any] | None = None,
    memory: bool = False,
) -> Any:
    """A field of settings with more than a type and a default.

    Args:
        default: without one, the setting must be given.
        min: least value, or least of each of several.
        max: most; of those without one or with a smaller one, `LARGEST_INTEGER` or `LARGEST_NUMBER` is refused too.
        panel: heading of the help that it stands under; by default that of the class, `panel`.
        flag: its name on the command line, where that is not its own with dashes.
        parse: makes the value of a text or of a value, where it is no plain number, choice or text.
        memory: whether a smaller value takes less memory: what to lower is told when memory ends.
    """
    about = {"min": min, "max": max, "panel": panel, "flag": flag, "parse": parse, "memory": memory}
    return field(default=default, metadata=about)


def again(settings: type[Settings], name: str, default: Any) -> Any:
    """A field of `option` that is as in another class but for its default; its documentation is inherited.

    Args:
        settings: a class that this one derives from, whose own field it is.
        name: of the field.
        default: in this class.
    """
    key: Any = settings
    (about,) = (each.metadata for each in fields(key) if each.name == name)
    return field(default=default, metadata={**about, "panel": about.get("panel") or settings.panel})


@dataclass(frozen=True)
class Option:
    """What is known of one setting.

    Attributes:
        name: of the field.
        type: of one value; of several, of each of them. A choice is a `Literal`.
        several: whether it is a tuple of values.
        optional: whether it may be None.
        default: `MISSING` where it must be given.
        help: its documentation.
        min, max, panel, flag, parse, memory: as in `option`.
    """

    name: str
    type: Any
    several: bool
    optional: bool
    default: Any
    help: str
    min: float | None
    max: float | None
    panel: str
    flag: str
    parse: Callable[[Any], Any] | None
    memory: bool

    def check(self, value: Any) -> Any:
        """The value, texts parsed and lists as tuples.

        Raises:
            InputError: a value that the setting cannot have.
        """
        if value is None and self.optional:
            return None
        if not self.several:
            return self._one(value)
        values = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        return tuple(self._one(item) for item in values)

    def _one(self, value: Any) -> Any:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):  # also NumPy's
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
        try:
            value = self._typed(value) if self.parse is None else self.parse(value)
        except InputError:
            raise
        except (ValueError, TypeError, OverflowError) as error:  # a number of too many digits, or of another type
            raise InputError(f"{self.name} cannot be read: {first_line(error)}") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = self.min, self.max
            most = max(LARGEST_INTEGER if isinstance(value, int) else LARGEST_NUMBER, high or 0)
            if most < abs(value) != inf:
                raise InputError(f"{self.name} must be at most {most:.16g} in size")
            if not isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
                limits = {
                    (False, True): f"at least {low}",
                    (True, False): f"at most {high}",
                    (False, False): f"between {low} and {high}",
                    (True, True): "a finite number",
                }
                raise InputError(f"{self.name} must be {limits[low is None, high is None]}, got {value}")
        return value

    def _typed(self, value: Any) -> Any:
        if isinstance(value, str | Path) and (not str(value).strip() or "\0" in str(value)):
            raise InputError(f"{self.name} must not be empty or hold a null character: leave it out, or name something")
        if typing.get_origin(self.type) is Literal:
            if value not in (known := typing.get_args(self.type)):
                raise InputError(f"{self.name} must be one of {', '.join(map(str, known))}, got {value!r}")
        elif (self.type, type(value)) in _ALIKE or (self.type is str and isinstance(value, Path)):
            value = self.type(value)
        elif not isinstance(value, self.type) or (self.type is int and isinstance(value, bool)):
            raise InputError(f"{self.name} must be {TYPE_NAMES.get(self.type, self.type.__name__)}, got {value!r}")
        return value


_ALIKE = {(Path, str), (float, int)}
"""Types of settings, and of values that stand for them."""
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
"""What messages call types of values."""


class Settings:
    """Base of all settings: subclasses are frozen, keyword-only dataclasses."""

    panel: ClassVar[str] = "Run"
    """Heading of the help that a class's own fields stand under."""
    essentials: ClassVar[tuple[str, ...]] = ()
    """What the help of a command shows first, where all its settings are more than a screen."""
    acts_with: ClassVar[Mapping[str, str]] = {}
    """Settings that change nothing unless another one is set, and that other: given alone they are refused."""

    def __post_init__(self) -> None:
        """Check every setting by itself; subclasses check what several must have in common.

        Raises:
            InputError: settings that no run can have.
        """
        for known in options(type(self)):
            object.__setattr__(self, known.name, known.check(getattr(self, known.name)))
        self.refuse_ignored({each.name for each in options(type(self)) if getattr(self, each.name) != each.default})

    def take_none_for_empty(self, name: str) -> None:
        """Let 'none' stand for no value at all in a setting of several, before it is checked."""
        if getattr(self, name) in ("none", ("none",), ["none"]):
            object.__setattr__(self, name, ())

    def refuse_ignored(self, given: Collection[str]) -> None:
        """Refuse settings that would change nothing.

        Args:
            given: names of the settings that somebody chose.

        Raises:
            InputError: one of them acts only with another setting, which is not set.
        """
        flags = {each.name: each.flag for each in options(type(self))}
        for cls in type(self).__mro__:
            for name, other in vars(cls).get("acts_with", {}).items():
                if name in given and not getattr(self, other):
                    raise InputError(f"{flags[name]} acts only with {flags[other]}: pass that too, or leave it out")

    def memory_flags(self) -> list[str]:
        """The options that lower how much memory a run takes."""
        return [each.flag for each in options(type(self)) if each.memory]

    @classmethod
    def of(cls, other: Settings, **changes: Any) -> Self:
        """Settings with the values of others, for the fields that both inherit from one class, and with changes.

        Two classes may each declare a field of one name and mean two things by it, so such a value is not copied.
        """
        bases = [base for base in cls.__mro__ if issubclass(base, Settings) and isinstance(other, base)]
        shared = {
            each.name: getattr(other, each.name) for base in bases if base is not Settings for each in options(base)
        }
        return cls(**{**shared, **changes})

    def to_json(self) -> dict[str, Any]:
        """As JSON: tuples become lists, paths texts."""
        return {known.name: _plain(getattr(self, known.name)) for known in options(type(self))}


def options(settings: type[Settings]) -> tuple[Option, ...]:
    """The settings of a class, in order."""
    key: Any = settings
    return _options(key)


@cache
def _options(settings: Any) -> tuple[Option, ...]:
    docs: dict[str, str] = {}
    panels: dict[str, str] = {}
    hints: dict[str, Any] = {}
    for cls in reversed(settings.__mro__):
        if cls is not Settings and issubclass(cls, Settings):
            docs |= _docs(cls)
            panels |= dict.fromkeys(vars(cls).get("__annotations__", ()), cls.panel)
            hints |= typing.get_type_hints(cls)
    return tuple(
        _option(f.name, hints[f.name], f.default, f.metadata, docs.get(f.name, ""), panels[f.name])
        for f in fields(settings)
    )


def _option(name: str, hint: Any, default: Any, extra: typing.Mapping[str, Any], help: str, panel: str) -> Option:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kinds = [part for part in parts if part is not types.NoneType]
    several = typing.get_origin(kinds[0]) is tuple and typing.get_args(kinds[0])[-1] is Ellipsis
    kind = typing.get_args(kinds[0])[0] if several else kinds[0]
    flag = extra.get("flag") or "--" + name.replace("_", "-")
    about = extra.get("min"), extra.get("max"), extra.get("panel") or panel, flag
    return Option(
        name,
        kind,
        several,
        len(kinds) < len(parts),
        default,
        help,
        *about,
        extra.get("parse"),
        extra.get("memory", False),
    )


def _docs(cls: type) -> dict[str, str]:
    """The string below each field of a class."""
    return _docs_of_module(cls.__module__).get(cls.__name__, {})


@cache
def _docs_of_module(name: str) -> dict[str, dict[str, str]]:
    """The strings below the fields of each class of a module, which is parsed once for all."""
    docs: dict[str, dict[str, str]] = {}
    try:
        source = inspect.getsource(sys.modules[name])
    except (OSError, TypeError):  # typed into an interpreter, or installed without sources
        return docs
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            docs[node.name] = {}
            for statement, below in zip(node.body, node.body[1:], strict=False):
                match statement, below:
                    case ast.AnnAssign(target=ast.Name(id=setting)), ast.Expr(value=ast.Constant(value=str(text))):
                        docs[node.name][setting] = " ".join(text.split())
    return docs


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
